"""`rotate` on the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.cpu.native import address, check_dtype, kernels
from clinfast.ops.rotate import check, outside


def rotate(x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, places: Tensor | None = None) -> None:
    dtype = check_dtype("rotate", "x", x)
    check(x, cos, sin, cu_seqlens, places)
    tokens, heads, head_dim = x.shape
    bad = kernels().rotate(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), cu_seqlens.data_ptr(), address(places), x.stride(0), x.stride(1),
        len(cu_seqlens) - 1, tokens, heads, head_dim, cos.shape[0], dtype, torch.get_num_threads(),
    )  # fmt: skip
    if bad >= 0:
        raise outside(bad, cos.shape[0])


IMPLEMENTATIONS = {"rotate": rotate}
