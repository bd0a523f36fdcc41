"""fp8 linears whose rows are quantised by Triton, in the pass of the LayerNorm or activation before; compiled where
they run, since the package has no cubins of them."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from clinfast.backends import fp8
from clinfast.backends.triton import checks, device
from clinfast.backends.triton.launch import KernelUnavailable, _try
from clinfast.ops.registry import substitute

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
    """None where Triton cannot compile it here, or a row is too wide for a program."""
    rows, hidden = x.shape
    checks.rows("quantise", "x", x)
    if residual is not None:
        checks.rows("quantise", "residual", residual, x.dtype, (rows, hidden))
    if hidden > MAX_HIDDEN or not _compiles():
        return None
    y = x if weight is None else torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    values = torch.empty((rows, hidden), dtype=fp8.E4M3, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    if rows:
        from clinfast.triton_kernels import versions

        block = checks.width("quantise", hidden, MAX_HIDDEN)
        with torch.cuda.device(x.device) if device.TYPE == "cuda" else contextlib.nullcontext():
            _kernel()[(rows,)](
                x, residual, weight, shift, y, values, scale, hidden, x.stride(0),
                0 if residual is None else residual.stride(0), eps, NORM=weight is not None, ACTIVATION=activation,
                BLOCK=block, num_warps=8 if block >= 2048 else 4, **versions.JIT_OPTIONS,
            )  # fmt: skip
    return y, values, scale


def _kernel() -> Any:
    from clinfast.triton_kernels.quantise import quantise_kernel

    return quantise_kernel


@functools.cache
def _compiles() -> bool:
    reason = device.no_compiler()
    if reason is None and device.TYPE == "cuda":
        from clinfast.triton_kernels import versions

        try:
            x = torch.zeros(1, 16, dtype=torch.bfloat16, device="cuda")
            values, scale = torch.empty(1, 16, dtype=fp8.E4M3, device="cuda"), torch.empty(1, 1, device="cuda")
            _try("quantise_kernel", lambda: _kernel()[(1,)](
                x, None, None, None, x, values, scale, 16, 16, 0, 0.0, NORM=False, ACTIVATION="none", BLOCK=128,
                **versions.JIT_OPTIONS,
            ))  # fmt: skip
        except KernelUnavailable as error:
            reason = str(error)
    if reason is not None:
        substitute("quantise", "torch", reason)
    return reason is None


IMPLEMENTATIONS = {
    "linear.prepack_fp8": functools.partial(fp8.Fp8Linear, quantise=quantise_rows),
    "layer_norm.fp8": functools.partial(fp8.layer_norm, norm=quantised_norm),
}
