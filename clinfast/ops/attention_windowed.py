"""`attention_windowed`: attention in which a token sees the tokens near it."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.ops import registry
from clinfast.ops.attention_biased import places_of


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
    window: int,
    q_places: Tensor | None = None,
    k_places: Tensor | None = None,
) -> Tensor:
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for note in range(len(queries) - 1):
        begin, end = keys[note], keys[note + 1]
        if seqused_k is not None:
            end = begin + int(seqused_k[note])
        own, used = slice(queries[note], queries[note + 1]), slice(begin, end)
        if begin < end:
            distances = places_of(used, k_places)[None, :] - places_of(own, q_places)[:, None]
            unseen = (distances.abs() > window).to(q.device)
            scores = torch.einsum("qhd,khd->hqk", q[own] * scale, k[used])
            weights = scores.masked_fill(unseen, -torch.inf).softmax(-1).nan_to_num(0.0)
            out[own] = torch.einsum("hqk,khd->qhd", weights, v[used])
    return out


def fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
    window: int,
    q_places: Tensor | None = None,
    k_places: Tensor | None = None,
) -> Tensor:
    return q.new_empty(q.shape)


_run = registry.define(
    registry.Op(
        "attention_windowed",
        "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_k, "
        "float scale, int window, Tensor? q_places=None, Tensor? k_places=None) -> Tensor",
        reference,
        fake,
    )
)


def check_window(window: int) -> None:
    if window < 0:
        raise ValueError(f"attention_windowed: window is {window}; it must not be negative")


def attention_windowed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
    window: int,
    q_places: Tensor | None = None,
    k_places: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v, each query over the keys of its own note whose place is at most `window` from its own.

    The sliding window of Longformer (arXiv:2004.05150, section 3.1), by half-width: keys outside are skipped, so that
    time and memory grow with the number of tokens. A note's result depends on its own rows only.

    Args:
        q: [Tq, heads, head_dim], fp32 or bf16, last dimension contiguous, head_dim 1 to 256.
        k, v: [Tk, heads, head_dim], like `q`; all three may be views into one packed QKV tensor.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32, contiguous, from 0 to Tq and Tk, never decreasing.
        seqused_k: [B] int32 or None; note b attends to its first seqused_k[b] keys only.
        scale: factor on the scores, normally head_dim ** -0.5.
        window: from 0 on; half the width of a window that is given as a whole.
        q_places, k_places: [Tq] and [Tk] int32, contiguous: each row's place; None where it is its rank in its note.
            Those of a note's used keys must ascend. Only differences within a note count.

    Returns:
        [Tq, heads, head_dim], contiguous, in the dtype of `q`; zeros for queries that see no key.

    Raises:
        ValueError: a shape, dtype, stride, window, or boundaries that the kernels do not take.
    """
    return torch.ops.clinfast.attention_windowed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, scale, window, q_places, k_places
    )
