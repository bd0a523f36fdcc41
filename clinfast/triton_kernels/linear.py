"""`linear`: activation(x w^T + bias) + residual, with what follows the product fused into its epilogue.

A program takes one tile after another, so that the loads of the next run under the epilogue of the last. The sums over
K run in the same order for every row, whatever rows stand beside it.
"""

import triton
import triton.language as tl

from clinfast.triton_kernels.gelu import activate


@triton.jit
def _tile_of(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """GROUP_M rows of tiles share their weights in the cache."""
    group_size = GROUP_M * tiles_n
    first = tile // group_size * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + tile % group_size % rows, tile % group_size // rows


@triton.jit
def linear_kernel(
    x_ptr,  # [m, k], row stride x_row
    w_ptr,  # [n, k], row stride w_row
    bias_ptr,  # [n] fp32, or None
    residual_ptr,  # [m, n], row stride residual_row, or None
    out_ptr,  # [m, n], row stride out_row
    m,
    n,
    k,
    x_row,
    w_row,
    residual_row,
    out_row,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,  # whether BLOCK_K divides k
    PRECISION: tl.constexpr,
):
    """For every chip: loads by pointers."""
    dtype = out_ptr.dtype.element_ty
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    lanes = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = _tile_of(tile, tiles_m, tiles_n, GROUP_M)
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # Rows past the end read the first one, and nothing of it is stored: the loads need no mask.
        x_at = x_ptr + tl.where(rows < m, rows, 0).to(tl.int64)[:, None] * x_row + lanes[None, :]
        w_at = w_ptr + tl.where(columns < n, columns, 0).to(tl.int64)[:, None] * w_row + lanes[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, k, BLOCK_K):
            if EVEN_K:
                x, w = tl.load(x_at), tl.load(w_at)
            else:
                inside = (start + lanes < k)[None, :]
                x, w = tl.load(x_at, mask=inside, other=0.0), tl.load(w_at, mask=inside, other=0.0)
            acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
            x_at += BLOCK_K
            w_at += BLOCK_K
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + columns, mask=columns < n, other=0.0)[None, :]
        y = activate(acc, ACTIVATION, dtype)
        mask = (rows < m)[:, None] & (columns < n)[None, :]
        row = rows.to(tl.int64)[:, None]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + row * residual_row + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * out_row + columns[None, :], y.to(dtype), mask=mask)


@triton.jit
def linear_tma_kernel(
    x_desc,  # [m, k] in blocks of [BLOCK_M, BLOCK_K]
    w_desc,  # [n, k] in blocks of [BLOCK_N, BLOCK_K]
    bias_ptr,  # [n] fp32, or None
    residual_ptr,  # [m, n], row stride residual_row, or None
    out_desc,  # [m, n] in blocks of [BLOCK_M, BLOCK_N]
    m,
    n,
    k,
    residual_row,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From Hopper on: the copy engine loads, stores, and fills what lies outside with zeros."""
    dtype = out_desc.dtype
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = _tile_of(tile, tiles_m, tiles_n, GROUP_M)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, k, BLOCK_K):
            x, w = x_desc.load([row, start]), w_desc.load([column, start])
            acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        columns = column + tl.arange(0, BLOCK_N)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + columns, mask=columns < n, other=0.0)[None, :]
        y = activate(acc, ACTIVATION, dtype)
        if residual_ptr is not None:
            rows = row + tl.arange(0, BLOCK_M)
            mask = (rows < m)[:, None] & (columns < n)[None, :]
            at = rows.to(tl.int64)[:, None] * residual_row + columns[None, :]
            y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        out_desc.store([row, column], y.to(dtype))
