"""`gate`: activation(first half) * second half of each row, for products that cannot end in it."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.ops import registry
from clinfast.ops.linear import ACTIVATIONS, activate


def reference(x: Tensor, activation: str) -> Tensor:
    first, second = x.chunk(2, -1)
    return activate(first, activation) * second


def fake(x: Tensor, activation: str) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


_run = registry.define(registry.Op("gate", "(Tensor x, str activation) -> Tensor", reference, fake))


def check(x: Tensor, activation: str) -> None:
    if x.dim() != 2 or x.shape[1] % 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        raise ValueError(
            f"gate: x is {list(x.shape)} with strides {x.stride()}; it must be [rows, 2 outputs] with contiguous rows"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"gate: activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")


def gate(x: Tensor, activation: str) -> Tensor:
    """activation(x[:, :n]) * x[:, n:], a gated linear unit (arXiv:2002.05202), computed in fp32 and rounded once.

    Args:
        x: [rows, 2 n], fp32 or bf16, rows contiguous.
        activation: one of `linear.ACTIVATIONS`: `"gelu"` makes GeGLU, `"silu"` SwiGLU.

    Returns:
        [rows, n] in the dtype of `x`.

    Raises:
        ValueError: a shape, dtype, stride or activation that the kernels do not take.
    """
    return torch.ops.clinfast.gate(x, activation)
