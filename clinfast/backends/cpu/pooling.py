"""`pooling` on the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.cpu.native import DTYPES, check_boundaries, check_dtype, check_rows, kernels

KINDS = {"first_token": 0, "mean": 1, "max": 2}


def pooling(x: Tensor, cu_seqlens: Tensor, kind: str) -> Tensor:
    dtype, code = DTYPES.get(x.dtype), KINDS.get(kind)
    if dtype is None or code is None or not (x.ndim == 2 and x.is_contiguous() and x.is_cpu):
        if code is None:
            raise ValueError(f"pooling: kind is {kind!r}; choose " + ", ".join(map(repr, KINDS)))
        check_dtype("pooling", "x", x)
        check_rows("pooling", "x", x)
    batch = check_boundaries("pooling", "cu_seqlens", cu_seqlens)
    rows, hidden = x.shape
    out = torch.empty(batch, hidden, dtype=x.dtype)
    bad = kernels().pooling(
        x.data_ptr(), out.data_ptr(), cu_seqlens.data_ptr(), x.stride()[0], hidden, batch, rows, hidden, code,
        dtype, torch.get_num_threads(),
    )  # fmt: skip
    if bad >= 0:
        begin, end = cu_seqlens[bad : bad + 2].tolist()
        raise ValueError(
            f"pooling: cu_seqlens gives note {bad} the rows {begin} to {end}; they must not decrease and "
            f"must lie within the {rows} rows of x"
        )
    return out


IMPLEMENTATIONS = {"pooling": pooling}
