"""`gelu` on the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.triton import checks
from clinfast.backends.triton.launch import launch

KINDS = {"none": "gelu", "tanh": "gelu_tanh"}
ROWS, BLOCK = 4, 512


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    if approximate not in KINDS:
        raise ValueError(f"gelu: approximate is {approximate!r}; choose 'none' (erf) or 'tanh'")
    checks.rows("gelu", "x", x)
    count, hidden = x.shape
    if bias is not None:
        checks.vector("gelu", "bias", bias, hidden)
    out = torch.empty((count, hidden), dtype=x.dtype, device=x.device)
    if out.numel():
        launch(
            "gelu_kernel", (checks.cdiv(count, ROWS), checks.cdiv(hidden, BLOCK), 1),
            (x, bias, out, count, hidden, x.stride(0), hidden), (KINDS[approximate], ROWS, BLOCK),
        )  # fmt: skip
    return out


IMPLEMENTATIONS = {"gelu": gelu}
