"""`gelu`: bias + GELU."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.ops import registry

APPROXIMATIONS = ("none", "tanh")


def reference(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    total = x if bias is None else x + bias.to(x.dtype)
    return torch.nn.functional.gelu(total, approximate=approximate)


def fake(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    return x.new_empty(x.shape)


_run = registry.define(
    registry.Op("gelu", '(Tensor x, Tensor? bias, str approximate="none") -> Tensor', reference, fake)
)


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """gelu(x + bias), computed in fp32 and rounded once.

    Args:
        x: [rows, hidden], fp32 or bf16, last dimension contiguous.
        bias: [hidden], fp32, or None.
        approximate: `"none"` is x Phi(x), the erf form; `"tanh"` the approximation of Hendrycks and Gimpel
            (arXiv:1606.08415).

    Returns:
        [rows, hidden] in the dtype of `x`. Its relative error is small on the negative tail too, where
        1 + erf(x / sqrt(2)) cancels; gelu(-inf) is 0, the limit.

    Raises:
        ValueError: a shape, dtype, stride or `approximate` that the kernels do not take.
    """
    return torch.ops.clinfast.gelu(x, bias, approximate)
