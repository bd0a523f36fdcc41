"""Rows to e4m3 with a scale a row, behind a LayerNorm or an activation in the same pass."""

import triton
import triton.language as tl

from clinfast.triton_kernels.gelu import activate
from clinfast.triton_kernels.layer_norm import normalise


@triton.jit
def quantise_kernel(
    x_ptr,  # [rows, hidden], row stride x_row
    residual_ptr,  # like x, row stride residual_row, or None
    weight_ptr,  # [hidden] fp32, as shift; only read if NORM
    shift_ptr,
    y_ptr,  # [rows, hidden] contiguous; only written if NORM
    values_ptr,  # [rows, hidden] e4m3, contiguous
    scale_ptr,  # [rows] fp32
    hidden,
    x_row,
    residual_row,
    eps,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least hidden
):
    """One row a program. What is quantised is the row as it is rounded to the dtype of x."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < hidden
    x = tl.load(x_ptr + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        if residual_ptr is not None:
            x += tl.load(residual_ptr + row * residual_row + column, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
        shift = tl.load(shift_ptr + column, mask=inside, other=0.0)
        x = normalise(x, inside, hidden, eps) * weight + shift
    else:
        x = activate(x, ACTIVATION, x_ptr.dtype.element_ty)
    rounded = x.to(x_ptr.dtype.element_ty)
    if NORM:
        tl.store(y_ptr + row * hidden + column, rounded, mask=inside)
    y = tl.where(inside, rounded.to(tl.float32), 0.0)
    scale = tl.maximum(tl.max(tl.abs(y), 1) / 448.0, 7.888609052210118e-31)
    values = tl.minimum(tl.maximum(y / scale[:, None], -448.0), 448.0)
    tl.store(values_ptr + row * hidden + column, values.to(values_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row + tl.arange(0, 1), scale)
