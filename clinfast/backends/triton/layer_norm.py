"""`layer_norm` on the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.triton import checks, device
from clinfast.backends.triton.launch import launch
from clinfast.triton_kernels import configs

MAX_HIDDEN = 8192


def layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, shift: Tensor, eps: float) -> Tensor:
    return with_bias(x, residual, None, weight, shift, eps)


def with_bias(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, weight: Tensor, shift: Tensor, eps: float
) -> Tensor:
    """LayerNorm(x + residual + bias); `bias` [hidden] fp32 is that of a linear that left it out."""
    checks.rows("layer_norm", "x", x)
    count, hidden = x.shape
    block = checks.width("layer_norm", hidden, MAX_HIDDEN)
    if residual is not None:
        checks.rows("layer_norm", "residual", residual, x.dtype, (count, hidden))
    if bias is not None:
        checks.vector("layer_norm", "bias", bias, hidden)
    checks.vector("layer_norm", "weight", weight, hidden)
    checks.vector("layer_norm", "shift", shift, hidden)
    out = torch.empty((count, hidden), dtype=x.dtype, device=x.device)
    if count:
        rows, warps = configs.rows(device.device_class(device.index_of(x)), block)
        launch(
            "layer_norm_kernel", (checks.cdiv(count, rows), 1, 1),
            (x, residual, bias, weight, shift, out, count, hidden, x.stride(0),
             0 if residual is None else residual.stride(0), hidden, float(eps)),
            (rows, block), warps,
        )  # fmt: skip
    return out


IMPLEMENTATIONS = {"layer_norm": layer_norm}
