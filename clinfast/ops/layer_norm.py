"""`layer_norm`: residual + LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.ops import registry


def reference(x: Tensor, residual: Tensor | None, weight: Tensor, shift: Tensor, eps: float) -> Tensor:
    total = x if residual is None else x + residual
    return torch.nn.functional.layer_norm(total, total.shape[-1:], weight.to(x.dtype), shift.to(x.dtype), eps)


def fake(x: Tensor, residual: Tensor | None, weight: Tensor, shift: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


_run = registry.define(
    registry.Op(
        "layer_norm",
        "(Tensor x, Tensor? residual, Tensor weight, Tensor shift, float eps) -> Tensor",
        reference,
        fake,
    )
)


def layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm(x + residual) * weight + shift, accumulated in fp32.

    Args:
        x: [rows, hidden], fp32 or bf16, last dimension contiguous.
        residual: like `x`, or None.
        weight, shift: [hidden], fp32.
        eps: added to the variance.

    Returns:
        [rows, hidden] in the dtype of `x`.

    Raises:
        ValueError: a shape, dtype or stride that the kernels do not take.
    """
    return torch.ops.clinfast.layer_norm(x, residual, weight, shift, eps)
