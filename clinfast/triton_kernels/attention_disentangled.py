"""`attention_disentangled`: `attention_kernel` with DeBERTa's terms (arXiv:2006.03654) added to each tile of scores.

A tile of queries and keys reaches as many neighbouring table rows as it has distances: queries are multiplied by those
rows, keys too, and each score gathers its two products within the program. Where places leave some out, or a step of
distance is several rows, the rows are taken in several turns.
"""

import triton
import triton.language as tl

from clinfast.triton_kernels.attention import _load_rows

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _table_rows(ptr, base, end, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr):
    """[BLOCK_R, BLOCK_D]: rows from `base` on, zeros from `end` on."""
    rows, columns = base + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    at = ptr + rows[:, None] * HEAD_DIM + columns[None, :]
    return tl.load(at, mask=(rows < end)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def attention_disentangled_kernel(
    q_ptr,  # [q_tokens, heads, HEAD_DIM], strides q_token and q_head
    k_ptr,  # [k_tokens, heads, HEAD_DIM], strides k_token and k_head
    v_ptr,  # like k, with strides of its own
    out_ptr,  # like q, with strides of its own
    tiles_ptr,  # [5, bound] int32, as `tiles_kernel` wrote it
    position_keys_ptr,  # [heads, table_rows, HEAD_DIM] contiguous; or None
    position_queries_ptr,  # likewise
    buckets_ptr,  # [2 * reach + 1] int32: the table's row by query's place minus key's, clamped
    q_places_ptr,  # [q_tokens] int32; None where they are ranks
    k_places_ptr,  # [k_tokens] int32, likewise
    bound,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    out_token,
    out_head,
    table_rows,
    reach,
    qk_scale,  # scale * log2(e)
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,  # table rows a turn, at least BLOCK_M + BLOCK_N - 1 where one turn is to do
    PRECISION: tl.constexpr,
):
    entry = tl.program_id(1)
    queries = tl.load(tiles_ptr + bound + entry)
    if queries == 0:
        return
    q_row = tl.load(tiles_ptr + entry).to(tl.int64)
    k_row = tl.load(tiles_ptr + 2 * bound + entry).to(tl.int64)
    keys = tl.load(tiles_ptr + 3 * bound + entry)
    first_place = tl.load(tiles_ptr + 4 * bound + entry)
    head = tl.program_id(0)
    rows, columns, key_rows = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    mask = (rows < queries)[:, None] & (columns < HEAD_DIM)[None, :]
    q = tl.load(
        q_ptr + q_row * q_token + head * q_head + rows[:, None] * q_token + columns[None, :], mask=mask, other=0.0
    )
    k_at = k_ptr + k_row * k_token + head * k_head
    v_at = v_ptr + k_row * v_token + head * v_head
    place = first_place + rows
    if q_places_ptr is not None:
        place = tl.load(q_places_ptr + q_row + rows, mask=rows < queries, other=0)
    table = head.to(tl.int64) * table_rows * HEAD_DIM

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in tl.range(0, keys, BLOCK_N, num_stages=1):
        k = _load_rows(k_at, first, k_token, key_rows, columns, keys, HEAD_DIM, BLOCK_D, True)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        key_place = first + key_rows
        if k_places_ptr is not None:
            key_place = tl.load(k_places_ptr + k_row + key_place, mask=key_place < keys, other=0)
        distance = tl.minimum(tl.maximum(place[:, None] - key_place[None, :], -reach), reach)
        row = tl.load(buckets_ptr + distance + reach)
        there = (rows < queries)[:, None] & (first + key_rows < keys)[None, :]
        base = tl.min(tl.min(tl.where(there, row, table_rows), 1), 0)
        end = tl.max(tl.max(tl.where(there, row, -1), 1), 0) + 1
        for start in tl.range(base, end, BLOCK_R, num_stages=1):
            at = row - start
            inside = (at >= 0) & (at < BLOCK_R)
            at = tl.where(inside, at, 0)
            if position_keys_ptr is not None:
                rows_of_keys = _table_rows(position_keys_ptr + table, start, end, HEAD_DIM, BLOCK_D, BLOCK_R)
                products = tl.dot(q, tl.trans(rows_of_keys), input_precision=PRECISION)
                s += tl.where(inside, tl.gather(products, at, 1), 0.0)
            if position_queries_ptr is not None:
                rows_of_queries = _table_rows(position_queries_ptr + table, start, end, HEAD_DIM, BLOCK_D, BLOCK_R)
                products = tl.dot(k, tl.trans(rows_of_queries), input_precision=PRECISION)
                s += tl.where(inside, tl.trans(tl.gather(products, tl.trans(at), 1)), 0.0)
        s = tl.where((first + key_rows < keys)[None, :], s * qk_scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        v = _load_rows(v_at, first, v_token, key_rows, columns, keys, HEAD_DIM, BLOCK_D, True)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top, total = new_top, total * shrink + tl.sum(p, 1)
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    out_at = out_ptr + q_row * out_token + head * out_head + rows[:, None] * out_token + columns[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=mask)
