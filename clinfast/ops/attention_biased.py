"""`attention_biased`: attention whose scores get a term by head and relative distance."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.ops import registry


def places_of(note: slice, places: Tensor | None) -> Tensor:
    """int64: the given ones, or ranks in the note."""
    if places is None:
        return torch.arange(note.stop - note.start)
    return places[note].long()


def biases(bias: Tensor, q_places: Tensor, k_places: Tensor) -> Tensor:
    """[heads, queries, keys]: `bias` by the key's place minus the query's, clamped."""
    reach = bias.shape[1] // 2
    distances = k_places.to(bias.device)[None, :] - q_places.to(bias.device)[:, None]
    return bias[:, distances.clamp_(-reach, reach) + reach]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
    bias: Tensor,
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
            scores = torch.einsum("qhd,khd->hqk", q[own] * scale, k[used])
            scores += biases(bias.to(q.dtype), places_of(own, q_places), places_of(used, k_places))
            out[own] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[used])
    return out


def fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
    bias: Tensor,
    q_places: Tensor | None = None,
    k_places: Tensor | None = None,
) -> Tensor:
    return q.new_empty(q.shape)


_run = registry.define(
    registry.Op(
        "attention_biased",
        "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_k, "
        "float scale, Tensor bias, Tensor? q_places=None, Tensor? k_places=None) -> Tensor",
        reference,
        fake,
    )
)


def attention_biased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
    bias: Tensor,
    q_places: Tensor | None = None,
    k_places: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T + bias) v within each note, the bias by head and by distance; all but q, k and v in fp32.

    The bias of a query and a key is `bias[head, R + d]`, d being the key's place minus the query's, clamped to [-R, R]:
    a relative bias as in T5 (arXiv:1910.10683, section 2.1), its buckets expanded. No [S, S] tensor is made. A note's
    result depends on its own rows only.

    Args:
        q: [Tq, heads, head_dim], fp32 or bf16, last dimension contiguous, head_dim 1 to 256.
        k, v: [Tk, heads, head_dim], like `q`; all three may be views into one packed QKV tensor.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32, contiguous, from 0 to Tq and Tk, never decreasing.
        seqused_k: [B] int32 or None; note b attends to its first seqused_k[b] keys only.
        scale: factor on the scores, normally head_dim ** -0.5.
        bias: [heads, 2 R + 1] fp32, contiguous.
        q_places, k_places: [Tq] and [Tk] int32, contiguous: each row's place; None where it is its rank in its note.
            Only differences within a note count, so that columns and positions in the whole batch do as well. Places
            that are not consecutive are slower.

    Returns:
        [Tq, heads, head_dim], contiguous, in the dtype of `q`; zeros for queries without keys.

    Raises:
        ValueError: a shape, dtype, stride, or boundaries that the kernels do not take.
    """
    return torch.ops.clinfast.attention_biased(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, scale, bias, q_places, k_places
    )
