"""`pooling`: one row a note from its packed rows."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from clinfast.ops import registry

KINDS = ("first_token", "mean", "max")


def reference(x: Tensor, cu_seqlens: Tensor, kind: str) -> Tensor:
    bounds = cu_seqlens.tolist()
    out = x.new_zeros((len(bounds) - 1, x.shape[1]))
    for note, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin < end:
            rows = x[begin:end]
            out[note] = {"first_token": rows[0], "mean": rows.mean(0), "max": rows.amax(0)}[kind]
    return out


def fake(x: Tensor, cu_seqlens: Tensor, kind: str) -> Tensor:
    return x.new_empty((cu_seqlens.shape[0] - 1, x.shape[1]))


_run = registry.define(registry.Op("pooling", "(Tensor x, Tensor cu_seqlens, str kind) -> Tensor", reference, fake))


def pooling(x: Tensor, cu_seqlens: Tensor, kind: str) -> Tensor:
    """Each note's first row, mean or maximum over its rows, accumulated in fp32.

    A note's result does not depend on the other notes or on the number of threads: its rows are added in a
    fixed order that starts at its first one.

    Args:
        x: [T, H] packed rows, fp32 or bf16, last dimension contiguous.
        cu_seqlens: [B + 1] int32; note b owns rows cu_seqlens[b] to cu_seqlens[b + 1].
        kind: `"first_token"`, `"mean"` or `"max"`.

    Returns:
        [B, H] in the dtype of `x`; zeros for a note without rows.

    Raises:
        ValueError: a shape, dtype, stride or `kind` that the kernels do not take, or `cu_seqlens` that
            decrease or leave [0, T].
    """
    return torch.ops.clinfast.pooling(x, cu_seqlens, kind)
