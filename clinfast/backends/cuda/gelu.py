"""`gelu` on the compiled CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.cuda.native import DTYPES, address, check_dtype, check_rows, check_vector, on, stream

KINDS = {"none": 0, "tanh": 1}


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    dtype, kind = DTYPES.get(x.dtype), KINDS.get(approximate)
    if kind is None:
        raise ValueError(f"gelu: approximate is {approximate!r}; choose 'none' (erf) or 'tanh'")
    if dtype is None:
        check_dtype("gelu", "x", x)
    device = check_rows("gelu", "x", x)
    rows, hidden = x.shape
    if bias is not None:
        check_vector("gelu", "bias", bias, hidden, device)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    on(device).gelu(
        x.data_ptr(), address(bias), out.data_ptr(), x.stride()[0], hidden, rows, hidden, kind, dtype, device,
        stream(device),
    )  # fmt: skip
    return out


IMPLEMENTATIONS = {"gelu": gelu}
