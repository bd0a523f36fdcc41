"""`pooling` on the Triton kernels."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from clinfast.backends.triton import checks
from clinfast.backends.triton.launch import launch

KINDS = ("first_token", "mean", "max")
ROWS, BLOCK = 16, 128


def prechecked(x: Tensor, cu_seqlens: Tensor, kind: str) -> Tensor:
    """For boundaries that `pack` made: their values are not looked at, which would wait for the device."""
    if kind not in KINDS:
        raise ValueError(f"pooling: kind is {kind!r}; choose " + ", ".join(map(repr, KINDS)))
    checks.rows("pooling", "x", x)
    batch = checks.boundaries("pooling", "cu_seqlens", cu_seqlens)
    tokens, hidden = x.shape
    out = torch.empty((batch, hidden), dtype=x.dtype, device=x.device)
    if out.numel():
        launch(
            "pooling_kernel", (batch, checks.cdiv(hidden, BLOCK), 1),
            (x, cu_seqlens, out, tokens, hidden, x.stride(0)), (kind, ROWS, BLOCK),
        )  # fmt: skip
    return out


def pooling(x: Tensor, cu_seqlens: Tensor, kind: str) -> Tensor:
    out = prechecked(x, cu_seqlens, kind)
    bounds = cu_seqlens.tolist()
    for note, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if not 0 <= begin <= end <= x.shape[0]:
            raise ValueError(
                f"pooling: cu_seqlens gives note {note} the rows {begin} to {end}; they must not decrease and must "
                f"lie within the {x.shape[0]} rows of x"
            )
    return out


IMPLEMENTATIONS = {"pooling": pooling, "pooling.prechecked": prechecked}
