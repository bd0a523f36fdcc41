"""`gate` on the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.triton import checks
from clinfast.backends.triton.launch import launch
from clinfast.ops.gate import check

ROWS, BLOCK = 4, 512


def gate(x: Tensor, activation: str) -> Tensor:
    check(x, activation)
    checks.rows("gate", "x", x)
    count, outputs = x.shape[0], x.shape[1] // 2
    out = torch.empty((count, outputs), dtype=x.dtype, device=x.device)
    if out.numel():
        launch(
            "gate_kernel", (checks.cdiv(count, ROWS), checks.cdiv(outputs, BLOCK), 1),
            (x, out, count, outputs, x.stride(0), outputs), (activation, ROWS, BLOCK),
        )  # fmt: skip
    return out


IMPLEMENTATIONS = {"gate": gate}
