"""`layer_norm` on the compiled CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.cuda.native import address, check_dtype, check_rows, check_vector, on, stream

MAX_HIDDEN = 16384


def layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, shift: Tensor, eps: float) -> Tensor:
    dtype = check_dtype("layer_norm", "x", x)
    device = check_rows("layer_norm", "x", x)
    rows, hidden = x.shape
    if not 1 <= hidden <= MAX_HIDDEN:
        raise ValueError(f"layer_norm: hidden is {hidden}; the kernel serves 1 to {MAX_HIDDEN}")
    residual_stride = 0
    if residual is not None:
        check_dtype("layer_norm", "residual", residual, x.dtype)
        check_rows("layer_norm", "residual", residual, device, x.shape)
        residual_stride = residual.stride()[0]
    check_vector("layer_norm", "weight", weight, hidden, device)
    check_vector("layer_norm", "shift", shift, hidden, device)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    on(device).layer_norm(
        x.data_ptr(), address(residual), 0, weight.data_ptr(), shift.data_ptr(), out.data_ptr(), x.stride()[0],
        residual_stride, hidden, rows, hidden, eps, dtype, device, stream(device),
    )  # fmt: skip
    return out


IMPLEMENTATIONS = {"layer_norm": layer_norm}
