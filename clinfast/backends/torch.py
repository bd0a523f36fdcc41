"""Pure PyTorch: every op, every platform, no compiled code. Slower than the compiled kernels, same results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from clinfast.ops.linear import activate


def layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, shift: Tensor, eps: float) -> Tensor:
    total = x.float() if residual is None else x.float() + residual.float()
    return functional.layer_norm(total, total.shape[-1:], weight, shift, eps).to(x.dtype)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    y = activate(functional.linear(x, weight, bias), activation)
    return y if residual is None else y + residual


class FallbackLinear:
    """A plain `F.linear` on a copy of the weight, where no prepacked multiplication is to be had."""

    __slots__ = ("bias", "dtype", "in_features", "library", "nbytes", "out_features", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.detach().to(dtype, copy=True)
        self.bias = None if bias is None else bias.detach().to(dtype, copy=True)
        self.nbytes = self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)
        self.library, self.dtype = "torch", dtype
        self.out_features, self.in_features = self.weight.shape

    def __call__(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        return linear(x, self.weight, self.bias, activation, residual)


def implementations() -> dict[str, Callable[..., Any]]:
    return {"layer_norm": layer_norm, "linear": linear, "linear.prepack": FallbackLinear}
