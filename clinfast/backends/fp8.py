"""fp8 (e4m3) linears with a scale a row of the input and a scale an output, and what quantises for them.

x W^T is about s_x (x / s_x)(W / s_w)^T s_w with s = largest magnitude of the row / 448, so that every row uses the
whole range; products are exact, sums are the library's. `torch._scaled_mm` multiplies. Rows come quantised from the
LayerNorm or the GELU before it where that could be done in one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clinfast.backends import torch as plain
from clinfast.ops.linear import ACTIVATIONS, activate

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
# Of a row of zeros, or of values that a scale could not divide.
LEAST_SCALE = 2.0**-100


def quantise_rows(x: Tensor, activation: str = "none") -> tuple[Tensor, Tensor]:
    """Rows of activation(x) as e4m3 [rows, N] and fp32 scales [rows, 1]."""
    y = activate(x.float(), activation).to(x.dtype).float()
    scale = (y.abs().amax(1, keepdim=True) / LARGEST).clamp_min(LEAST_SCALE)
    return (y / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def quantised_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(x + residual) [rows, N] in the dtype of x, and the same quantised."""
    y = plain.layer_norm(x, residual, weight, shift, eps)
    return (y, *quantise_rows(y))


def attach(x: Tensor, values: Tensor | None, scale: Tensor) -> Tensor:
    """Hand the quantised form of `x` along with it, to the linear that takes it next."""
    x.clinfast_fp8 = (values, scale)  # type: ignore[attr-defined]
    return x


def attached(x: Tensor) -> tuple[Tensor, Tensor] | None:
    found = getattr(x, "clinfast_fp8", None)
    return None if found is None else (x if found[0] is None else found[0], found[1])


class Fp8Linear:
    """A copy of the weight in e4m3. What an activation is fused into comes out quantised, for another of these."""

    library = "cuBLAS and CUTLASS, fp8"
    __slots__ = ("_quantise", "bias", "dtype", "in_features", "nbytes", "out_features", "scale", "weight")

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, quantise: Callable[..., Any] = quantise_rows
    ) -> None:
        self.out_features, self.in_features = weight.shape
        if self.out_features % 16 or self.in_features % 16:
            raise ValueError(
                f"linear: the weight is {list(weight.shape)}; fp8 products need multiples of 16, so pass another "
                "precision"
            )
        self.weight, scale = quantise_rows(weight.detach().float())
        self.scale = scale.view(1, -1).contiguous()
        self.bias = None if bias is None else bias.detach().to(dtype, copy=True)
        self.dtype, self._quantise = dtype, quantise
        self.nbytes = sum(t.nbytes for t in (self.weight, self.scale, self.bias) if t is not None)

    def __call__(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        if activation not in ACTIVATIONS:
            raise ValueError(f"linear: activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
        values, scale = attached(x) or self._quantise(x)
        y: Tensor = torch._scaled_mm(
            values, self.weight.t(), scale_a=scale, scale_b=self.scale, bias=self.bias, out_dtype=self.dtype
        )
        if residual is not None:
            y = y + residual
        if activation == "none":
            return y
        values, scale = self._quantise(y, activation)
        return attach(values, None, scale)

    def scatter(self, x: Tensor, rows: Tensor, out: Tensor) -> None:
        plain.scatter_in_blocks(self, x, rows, out)


def layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, shift: Tensor, eps: float,
    norm: Callable[..., tuple[Tensor, Tensor, Tensor]] = quantised_norm,
) -> Tensor:  # fmt: skip
    """The op, with its result's quantised form attached."""
    y, values, scale = norm(x, residual, weight, shift, eps)
    return attach(y, values, scale)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"linear.prepack_fp8": Fp8Linear, "layer_norm.fp8": layer_norm}
