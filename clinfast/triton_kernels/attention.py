"""`attention`: softmax(scale q k^T) v within each note, tile by tile, after FlashAttention (arXiv:2205.14135).

`tiles_kernel` lists the work once a batch, the longest notes first, so that they start first; `attention_kernel` takes
one entry of the list and a few heads a program. A tile starts at its note's first row and a note's keys are taken in
the same steps wherever it lies, so its bits do not depend on its batch.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tiles_kernel(
    cu_seqlens_q_ptr,  # [batch + 1] int32
    cu_seqlens_k_ptr,  # [batch + 1] int32
    seqused_ptr,  # [batch] int32; not read unless has_used
    tiles_ptr,  # [5, bound] int32: first query row, queries, first key row, keys, first query's place in its note
    batch,
    q_tokens,
    k_tokens,
    has_used,
    block_m,
    bound,
    NOTES: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """Boundaries are clamped, so that whatever they hold, no tile reaches outside q, k and v."""
    own = tl.program_id(0) * NOTES + tl.arange(0, NOTES)
    exists = own < batch
    q_begin = tl.load(cu_seqlens_q_ptr + own, mask=exists, other=0)
    q_end = tl.load(cu_seqlens_q_ptr + own + 1, mask=exists, other=0)
    q_begin, q_end = tl.maximum(q_begin, 0), tl.minimum(q_end, q_tokens)
    queries = tl.maximum(q_end - q_begin, 0)
    k_begin = tl.load(cu_seqlens_k_ptr + own, mask=exists, other=0)
    k_end = tl.load(cu_seqlens_k_ptr + own + 1, mask=exists, other=0)
    used = tl.load(seqused_ptr + own, mask=exists & (has_used != 0), other=0)
    keys = tl.where(has_used != 0, tl.minimum(used, k_end - k_begin), k_end - k_begin)
    k_begin = tl.maximum(k_begin, 0)
    keys = tl.maximum(tl.minimum(keys, k_tokens - k_begin), 0)
    own_tiles = tl.where(exists, (queries + block_m - 1) // block_m, 0)

    # A note's place in the list: the tiles of all notes with more keys, and of earlier ones with as many.
    first = tl.zeros([NOTES], tl.int32)
    total = 0
    for start in range(0, batch, OTHERS):
        other = start + tl.arange(0, OTHERS)
        there = other < batch
        a = tl.maximum(tl.load(cu_seqlens_q_ptr + other, mask=there, other=0), 0)
        b = tl.minimum(tl.load(cu_seqlens_q_ptr + other + 1, mask=there, other=0), q_tokens)
        count = tl.where(there, (tl.maximum(b - a, 0) + block_m - 1) // block_m, 0)
        a = tl.load(cu_seqlens_k_ptr + other, mask=there, other=0)
        b = tl.load(cu_seqlens_k_ptr + other + 1, mask=there, other=0)
        length = tl.load(seqused_ptr + other, mask=there & (has_used != 0), other=0)
        length = tl.where(has_used != 0, tl.minimum(length, b - a), b - a)
        length = tl.maximum(tl.minimum(length, k_tokens - tl.maximum(a, 0)), 0)
        longer = length[None, :] > keys[:, None]
        earlier = (length[None, :] == keys[:, None]) & (other[None, :] < own[:, None])
        first += tl.sum(tl.where(longer | earlier, count[None, :], 0), 1)
        total += tl.sum(count, 0)

    for tile in range(0, tl.max(own_tiles, 0)):
        entry = tiles_ptr + first + tile
        write = (tile < own_tiles) & (first + tile < bound)
        tl.store(entry, q_begin + tile * block_m, mask=write)
        tl.store(entry + bound, tl.minimum(queries - tile * block_m, block_m), mask=write)
        tl.store(entry + 2 * bound, k_begin, mask=write)
        tl.store(entry + 3 * bound, keys, mask=write)
        tl.store(entry + 4 * bound, tile * block_m + tl.zeros([NOTES], tl.int32), mask=write)
    for start in range(total + tl.program_id(0) * OTHERS, bound, tl.num_programs(0) * OTHERS):
        rest = start + tl.arange(0, OTHERS)
        tl.store(tiles_ptr + bound + rest, tl.zeros([OTHERS], tl.int32), mask=rest < bound)


@triton.jit
def _load_rows(
    ptr, first, stride, rows, columns, count, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """[rows, BLOCK_D] from row `first` on; zeros past `count` rows where MASKED, and past HEAD_DIM columns."""
    at = ptr + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if MASKED:
        if HEAD_DIM == BLOCK_D:
            return tl.load(at, mask=(first + rows < count)[:, None], other=0.0)
        return tl.load(at, mask=(first + rows < count)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    if HEAD_DIM == BLOCK_D:
        return tl.load(at)
    return tl.load(at, mask=(columns < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _step(
    q, k_ptr, v_ptr, k_token, v_token, first, keys, top, total, acc, qk_scale, place, bias_ptr, bias_reach,
    bias_place, k_places_ptr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: running maximum `top`, sum `total` and weighted values `acc`, all in powers of two."""
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k = _load_rows(k_ptr, first, k_token, rows, columns, keys, HEAD_DIM, BLOCK_D, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    factor = qk_scale
    if bias_ptr is not None:
        key_place = first + rows
        if k_places_ptr is not None:
            key_place = tl.load(k_places_ptr + key_place, mask=key_place < keys, other=0)
        distance = key_place[None, :] - bias_place[:, None]
        distance = tl.minimum(tl.maximum(distance, -bias_reach), bias_reach)
        s = s * qk_scale + tl.load(bias_ptr + distance + bias_reach) * LOG2E
        factor = 1.0
    if MASKED:
        s = tl.where((first + rows < keys)[None, :], s, float("-inf"))
    if WINDOW >= 0:
        distance = (first + rows)[None, :] - place[:, None]
        s = tl.where((distance <= WINDOW) & (distance >= -WINDOW), s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * factor)
    # With a window, a row may have met none of its keys yet.
    base = tl.where(new_top == float("-inf"), 0.0, new_top) if WINDOW >= 0 else new_top
    p = tl.exp2(s * factor - base[:, None])
    shrink = tl.exp2(top - base)
    v = _load_rows(v_ptr, first, v_token, rows, columns, keys, HEAD_DIM, BLOCK_D, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return new_top, total * shrink + tl.sum(p, 1), acc


@triton.jit
def attention_kernel(
    q_ptr,  # [q_tokens, heads, HEAD_DIM], strides q_token and q_head
    k_ptr,  # [k_tokens, heads, HEAD_DIM], strides k_token and k_head
    v_ptr,  # like k, with strides of its own
    out_ptr,  # like q, with strides of its own
    tiles_ptr,  # [5, bound] int32, as `tiles_kernel` wrote it
    bias_ptr,  # [heads, 2 * bias_reach + 1] fp32, by key's place minus query's, clamped; or None
    q_places_ptr,  # [q_tokens] int32, places for the bias; None where they are ranks, as those of a window are
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
    bias_reach,
    qk_scale,  # scale * log2(e), more than 0
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr,  # heads a program
    WINDOW: tl.constexpr,  # keys further away are not looked at; -1 for none
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
    head = tl.program_id(0) * HEADS
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q_ptr += q_row * q_token + head * q_head
    out_ptr += q_row * out_token + head * out_head
    k_ptr += k_row * k_token + head * k_head
    v_ptr += k_row * v_token + head * v_head
    at = rows[:, None] * q_token + columns[None, :]
    out_at = rows[:, None] * out_token + columns[None, :]
    mask = (rows < queries)[:, None] & (columns < HEAD_DIM)[None, :]
    place = first_place + rows
    bias_place = place
    if q_places_ptr is not None:
        bias_place = tl.load(q_places_ptr + q_row + rows, mask=rows < queries, other=0)
    k_places = k_places_ptr if k_places_ptr is None else k_places_ptr + k_row

    if HEADS > 1:  # noqa: SIM102 - known when compiled
        if keys <= BLOCK_N:
            # The whole note is one tile of keys: nothing to rescale, and the next head's loads run ahead.
            key_rows = tl.arange(0, BLOCK_N)
            key_mask = (key_rows < keys)[:, None] & (columns < HEAD_DIM)[None, :]
            for i in tl.range(0, HEADS, num_stages=2):
                q = tl.load(q_ptr + i * q_head + at, mask=mask, other=0.0)
                k_at = k_ptr + i * k_head + key_rows[:, None] * k_token + columns[None, :]
                k = tl.load(k_at, mask=key_mask, other=0.0)
                v_at = v_ptr + i * v_head + key_rows[:, None] * v_token + columns[None, :]
                v = tl.load(v_at, mask=key_mask, other=0.0)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                s = tl.where((key_rows < keys)[None, :], s, float("-inf"))
                top = tl.max(s, 1) * qk_scale
                p = tl.exp2(s * qk_scale - tl.where(keys > 0, top, 0.0)[:, None])
                total = tl.sum(p, 1)
                acc = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
                acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
                tl.store(out_ptr + i * out_head + out_at, acc.to(out_ptr.dtype.element_ty), mask=mask)
            return

    for i in range(0, HEADS):
        q = tl.load(q_ptr + i * q_head + at, mask=mask, other=0.0)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        bias = bias_ptr if bias_ptr is None else bias_ptr + (head + i) * (2 * bias_reach + 1)
        keys_at, values_at = k_ptr + i * k_head, v_ptr + i * v_head
        begin = 0
        end = keys
        if WINDOW >= 0:
            begin = tl.maximum(first_place - WINDOW, 0) // BLOCK_N * BLOCK_N
            end = tl.minimum(keys, first_place + queries + WINDOW)
        whole = keys // BLOCK_N * BLOCK_N
        for first in tl.range(begin, tl.minimum(whole, end), BLOCK_N):
            top, total, acc = _step(
                q, keys_at, values_at, k_token, v_token, first, keys, top, total, acc, qk_scale, place, bias,
                bias_reach, bias_place, k_places, HEAD_DIM, BLOCK_D, BLOCK_N, False, WINDOW, PRECISION,
            )  # fmt: skip
        # The masked tail, at most once: peeled, the loop above tests nothing.
        for first in tl.range(tl.maximum(whole, begin), end, BLOCK_N, num_stages=1):
            top, total, acc = _step(
                q, keys_at, values_at, k_token, v_token, first, keys, top, total, acc, qk_scale, place, bias,
                bias_reach, bias_place, k_places, HEAD_DIM, BLOCK_D, BLOCK_N, True, WINDOW, PRECISION,
            )  # fmt: skip
        acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(out_ptr + i * out_head + out_at, acc.to(out_ptr.dtype.element_ty), mask=mask)
