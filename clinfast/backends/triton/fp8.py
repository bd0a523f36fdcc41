"""fp8 linears whose rows are quantised by Triton, in the pass of the LayerNorm or activation before."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from clinfast.backends import fp8
from clinfast.backends.triton import checks
from clinfast.backends.triton.launch import KernelUnavailable, launch
from clinfast.ops.registry import substitute
from clinfast.triton_kernels.variants import quantise_warps

MAX_HIDDEN = 8192


def quantise_rows(x: Tensor, activation: str = "none") -> tuple[Tensor, Tensor]:
    found = _launch(x, None, None, None, 0.0, activation)
    return fp8.quantise_rows(x, activation) if found is None else found[1:]


def quantised_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    found = _launch(x, residual, weight, shift, eps, "none")
    return fp8.quantised_norm(x, residual, weight, shift, eps) if found is None else found


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, shift: Tensor | None, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor] | None:
    """None where there is no kernel for it here, or a row is too wide for a program."""
    rows, hidden = x.shape
    checks.rows("quantise", "x", x)
    if residual is not None:
        checks.rows("quantise", "residual", residual, x.dtype, (rows, hidden))
    if hidden > MAX_HIDDEN:
        return None
    y = x if weight is None else torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    values = torch.empty((rows, hidden), dtype=fp8.E4M3, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    if not rows:
        return y, values, scale
    block = checks.width("quantise", hidden, MAX_HIDDEN)
    residual_row = 0 if residual is None else residual.stride(0)
    try:
        launch(
            "quantise_kernel", (rows, 1, 1),
            (x, residual, weight, shift, y, values, scale, hidden, x.stride(0), residual_row, eps),
            (weight is not None, activation, block), quantise_warps(block),
        )  # fmt: skip
    except KernelUnavailable as reason:
        substitute("quantise", "torch", str(reason))
        return None
    return y, values, scale


IMPLEMENTATIONS = {
    "linear.prepack_fp8": functools.partial(fp8.Fp8Linear, quantise=quantise_rows),
    "layer_norm.fp8": functools.partial(fp8.layer_norm, norm=quantised_norm),
}
