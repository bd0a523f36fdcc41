"""`layer_norm`: residual + bias + LayerNorm in one pass over memory."""

import triton
import triton.language as tl


@triton.jit
def normalise(x, inside, hidden, eps):
    """(x - mean) / sqrt(var + eps) along the last axis of fp32 lanes, in two passes over registers; 0 outside."""
    mean = tl.sum(x, 1) / hidden
    centred = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / hidden
    return centred * (1.0 / tl.sqrt_rn(variance + eps))[:, None]


@triton.jit
def layer_norm_kernel(
    x_ptr,  # [rows, hidden], row stride x_row
    residual_ptr,  # like x, row stride residual_row, or None
    bias_ptr,  # [hidden] fp32, or None: added before the norm, as the bias of a linear that left it out
    weight_ptr,  # [hidden] fp32
    shift_ptr,  # [hidden] fp32
    out_ptr,  # [rows, hidden], row stride out_row
    rows,
    hidden,
    x_row,
    residual_row,
    out_row,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least hidden
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < hidden
    mask = (row < rows) & inside
    x = tl.load(x_ptr + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + row * residual_row + column, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, mask=inside, other=0.0)
    # Asked for before the reductions, which they do not wait for.
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + column, mask=inside, other=0.0)
    y = normalise(x, inside, hidden, eps) * weight + shift
    tl.store(out_ptr + row * out_row + column, y.to(out_ptr.dtype.element_ty), mask=mask)
