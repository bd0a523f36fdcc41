"""`attention`: softmax(scale q k^T) v within each note of a packed batch."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.ops import registry


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
) -> Tensor:
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for note in range(len(queries) - 1):
        begin, end = keys[note], keys[note + 1]
        if seqused_k is not None:
            end = begin + int(seqused_k[note])
        own = slice(queries[note], queries[note + 1])
        if begin < end:
            scores = torch.einsum("qhd,khd->hqk", q[own] * scale, k[begin:end])
            out[own] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[begin:end])
    return out


def fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
) -> Tensor:
    return q.new_empty(q.shape)


_run = registry.define(
    registry.Op(
        "attention",
        "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_k, "
        "float scale) -> Tensor",
        reference,
        fake,
    )
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
) -> Tensor:
    """softmax(scale * q k^T) v, each query over the keys of its own note; softmax and sums in fp32.

    No [S, S] tensor is made. A note's result depends on its own rows only.

    Args:
        q: [Tq, heads, head_dim], fp32 or bf16, last dimension contiguous, head_dim 1 to 256.
        k, v: [Tk, heads, head_dim], like `q`; all three may be views into one packed QKV tensor.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32, contiguous, from 0 to Tq and Tk, never decreasing.
        seqused_k: [B] int32 or None; note b attends to its first seqused_k[b] keys only.
        scale: factor on the scores, normally head_dim ** -0.5.

    Returns:
        [Tq, heads, head_dim], contiguous, in the dtype of `q`; zeros for queries without keys.

    Raises:
        ValueError: a shape, dtype, stride, or boundaries that the kernels do not take.
    """
    return torch.ops.clinfast.attention(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, scale)
