"""`layer_norm` on the compiled CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.cuda import native
from clinfast.backends.cuda.native import check_dtype, check_rows, check_vector

MAX_HIDDEN = 16384


def _refuse(x: Tensor, residual: Tensor | None, weight: Tensor, shift: Tensor) -> None:
    """Raises where an argument is wrong; returns where the caller's quick test was only too strict."""
    check_dtype("layer_norm", "x", x)
    device = check_rows("layer_norm", "x", x)
    hidden = x.shape[1]
    if not 1 <= hidden <= MAX_HIDDEN:
        raise ValueError(f"layer_norm: hidden is {hidden}; the kernel serves 1 to {MAX_HIDDEN}")
    if residual is not None:
        check_dtype("layer_norm", "residual", residual, x.dtype)
        check_rows("layer_norm", "residual", residual, device, x.shape)
    check_vector("layer_norm", "weight", weight, hidden, device)
    check_vector("layer_norm", "shift", shift, hidden, device)


def layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, shift: Tensor, eps: float) -> Tensor:
    shape, device, dtype = x.shape, x.get_device(), native.DTYPES.get(x.dtype)
    if not (
        dtype is not None
        and len(shape) == 2
        and native.is_ours(x)
        and x.is_contiguous()
        and 1 <= shape[1] <= MAX_HIDDEN
        and weight.dtype is torch.float32 is shift.dtype
        and weight.shape == shift.shape == shape[1:]
        and weight.get_device() == device == shift.get_device()
        and weight.is_contiguous()
        and shift.is_contiguous()
        and (
            residual is None
            or (
                residual.dtype is x.dtype
                and residual.shape == shape
                and residual.get_device() == device
                and residual.is_contiguous()
            )
        )
    ):
        _refuse(x, residual, weight, shift)
    rows, hidden = shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    residual_address = residual_stride = 0
    if residual is not None:
        residual_address, residual_stride = residual.data_ptr(), residual.stride()[0]
    native.on(device).layer_norm(
        x.data_ptr(), residual_address, 0, weight.data_ptr(), shift.data_ptr(), out.data_ptr(), x.stride()[0],
        residual_stride, hidden, rows, hidden, eps, dtype, device, native.stream(device),
    )  # fmt: skip
    return out


IMPLEMENTATIONS = {"layer_norm": layer_norm}
