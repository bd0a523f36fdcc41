"""`linear`: a dense layer with an optional activation or residual fused behind it.

Engines do not call the op but `prepack`, which lays the weight out once for the library that multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from clinfast.ops import registry

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "tanh", "silu")


def activate(x: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return x
    if activation == "gelu":
        return functional.gelu(x)
    if activation == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    if activation == "relu":
        return torch.relu(x)
    if activation == "tanh":
        return torch.tanh(x)
    if activation == "silu":
        return functional.silu(x)
    raise ValueError(f"linear: activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    y = activate(functional.linear(x, weight, bias), activation)
    return y if residual is None else y + residual


def fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_run = registry.define(
    registry.Op(
        "linear",
        '(Tensor x, Tensor weight, Tensor? bias, str activation="none", Tensor? residual=None) -> Tensor',
        reference,
        fake,
    )
)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """activation(x @ weight.T + bias) + residual.

    Args:
        x: [rows, in_features], fp32 or bf16.
        weight: [out_features, in_features] in the dtype of `x`.
        bias: [out_features] or None.
        activation: one of `ACTIVATIONS`; `"gelu"` is the exact erf form.
        residual: [rows, out_features] or None.

    Returns:
        [rows, out_features] in the dtype of `x`.
    """
    return torch.ops.clinfast.linear(x, weight, bias, activation, residual)


class PackedLinear(Protocol):
    """A dense layer whose weight was laid out once; its result for a row does not depend on the other rows."""

    library: str
    dtype: torch.dtype
    in_features: int
    out_features: int
    nbytes: int

    def __call__(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor: ...

    def scatter(self, x: Tensor, rows: Tensor, out: Tensor) -> None:
        """out[rows[i]] = linear(x)[i], for results too large to be held twice.

        Args:
            x: [N, in_features].
            rows: [N] int32, distinct, each within `out`.
            out: [M, out_features], fp32 or bf16, contiguous; its other rows are not touched.
        """


class GatedLinear:
    """A packed linear of 2 N outputs whose halves the op `gate` then multiplies: N outputs."""

    __slots__ = ("_gate", "_whole", "dtype", "in_features", "library", "nbytes", "out_features")

    def __init__(self, whole: PackedLinear, gate: Callable[[Tensor, str], Tensor]) -> None:
        self._whole, self._gate = whole, gate
        self.library, self.dtype, self.nbytes = whole.library, whole.dtype, whole.nbytes
        self.in_features, self.out_features = whole.in_features, whole.out_features // 2

    def __call__(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        y = self._gate(self._whole(x), activation)
        return y if residual is None else y + residual

    def scatter(self, x: Tensor, rows: Tensor, out: Tensor) -> None:
        out.index_copy_(0, rows.long(), self(x).to(out.dtype))


def prepack(
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    backend: str = "auto",
    kind: str = "",
    *,
    gated: bool = False,
) -> PackedLinear:
    """Lay `weight` [out_features, in_features] out in `dtype` for the chosen backend. The source is copied.

    `kind`: `"fp8"` multiplies in e4m3, `"fixed"` in the same tiles at any number of rows; by default as is fastest.
    `gated`: `weight` and `bias` have 2 out_features rows, and the result is activation(first half) * second half.
    """
    device = weight.device.type
    if gated and not kind:
        fused = registry.optional("linear.prepack_gated", backend, device)
        found: PackedLinear | None = None if fused is None else fused(weight, bias, dtype)
        if found is not None:
            return found
    name = f"linear.prepack_{kind}" if kind else "linear.prepack"
    packed: PackedLinear = registry.implementation(name, backend, device)(weight, bias, dtype)
    return GatedLinear(packed, registry.implementation("gate", backend, device)) if gated else packed
