"""`gate`: activation(first half) * second half of each row."""

import triton
import triton.language as tl

from clinfast.triton_kernels.gelu import activate


@triton.jit
def gate_kernel(
    x_ptr,  # [rows, 2 * outputs], row stride x_row
    out_ptr,  # [rows, outputs], row stride out_row
    rows,
    outputs,
    x_row,
    out_row,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row < rows) & (column < outputs)
    at = x_ptr + row * x_row + column
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + outputs, mask=mask, other=0.0).to(tl.float32)
    y = activate(x, ACTIVATION, out_ptr.dtype.element_ty) * second
    tl.store(out_ptr + row * out_row + column, y.to(out_ptr.dtype.element_ty), mask=mask)
