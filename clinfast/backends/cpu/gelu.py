"""`gelu` on the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.cpu.native import DTYPES, address, check_dtype, check_rows, check_vector, kernels

KINDS = {"none": 0, "tanh": 1}


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    dtype, kind = DTYPES.get(x.dtype), KINDS.get(approximate)
    plain = x.ndim == 2 and x.is_contiguous() and x.is_cpu
    if dtype is None or kind is None or not plain:
        if kind is None:
            raise ValueError(f"gelu: approximate is {approximate!r}; choose 'none' (erf) or 'tanh'")
        check_dtype("gelu", "x", x)
        check_rows("gelu", "x", x)
    rows, hidden = x.shape
    if bias is not None:
        check_vector("gelu", "bias", bias, hidden)
    out = torch.empty_like(x) if plain else torch.empty(rows, hidden, dtype=x.dtype)
    kernels().gelu(
        x.data_ptr(), address(bias), out.data_ptr(), x.stride()[0], hidden, rows, hidden, kind, dtype,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


IMPLEMENTATIONS = {"gelu": gelu}
