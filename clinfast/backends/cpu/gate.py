"""`gate` on the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.cpu.native import check_dtype, kernels
from clinfast.ops.gate import check
from clinfast.ops.linear import ACTIVATIONS


def gate(x: Tensor, activation: str) -> Tensor:
    dtype = check_dtype("gate", "x", x)
    check(x, activation)
    rows, outputs = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, outputs, dtype=x.dtype)
    kernels().gate(
        x.data_ptr(), out.data_ptr(), x.stride(0), outputs, rows, outputs, ACTIVATIONS.index(activation), dtype,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


IMPLEMENTATIONS = {"gate": gate}
