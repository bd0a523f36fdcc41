"""`pooling` on the compiled CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.cuda.native import check_boundaries, check_dtype, check_rows, on, stream
from clinfast.backends.cuda.values import check_pooling

KINDS = {"first_token": 0, "mean": 1, "max": 2}


def prechecked(x: Tensor, cu_seqlens: Tensor, kind: str) -> Tensor:
    """A note whose boundaries leave [0, T] or decrease gives NaN: raising would wait for the device."""
    code = KINDS.get(kind)
    if code is None:
        raise ValueError(f"pooling: kind is {kind!r}; choose " + ", ".join(map(repr, KINDS)))
    dtype = check_dtype("pooling", "x", x)
    device = check_rows("pooling", "x", x)
    batch = check_boundaries("pooling", "cu_seqlens", cu_seqlens, device)
    rows, hidden = x.shape
    out = torch.empty(batch, hidden, dtype=x.dtype, device=x.device)
    on(device).pooling(
        x.data_ptr(), out.data_ptr(), cu_seqlens.data_ptr(), x.stride()[0], hidden, batch, rows, hidden, code, dtype,
        device, stream(device),
    )  # fmt: skip
    return out


def pooling(x: Tensor, cu_seqlens: Tensor, kind: str) -> Tensor:
    out = prechecked(x, cu_seqlens, kind)
    check_pooling(x.shape[0], cu_seqlens)
    return out


IMPLEMENTATIONS = {"pooling": pooling, "pooling.prechecked": prechecked}
