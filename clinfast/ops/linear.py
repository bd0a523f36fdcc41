"""`linear`: a dense layer with an optional activation or residual fused behind it.

Engines do not call the op but `prepack`, which lays the weight out once for the library that multiplies.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from clinfast.ops import registry

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "tanh")


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


def prepack(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, backend: str = "auto", kind: str = ""
) -> PackedLinear:
    """Lay `weight` [out_features, in_features] out in `dtype` for the chosen backend. The source is copied.

    `kind`: `"fp8"` multiplies in e4m3, `"fixed"` in the same tiles at any number of rows; by default as is fastest.
    """
    name = f"linear.prepack_{kind}" if kind else "linear.prepack"
    return registry.implementation(name, backend, weight.device.type)(weight, bias, dtype)
