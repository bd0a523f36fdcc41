"""`attention_disentangled`: scores also hold a query by a position's key, and a key by a position's query.

After DeBERTa (He et al. 2021, arXiv:2006.03654, section 3.1; the log buckets are those of its version 2).
"""

from __future__ import annotations

import math

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
    position_keys: Tensor | None,
    position_queries: Tensor | None,
    buckets: Tensor,
    q_places: Tensor | None = None,
    k_places: Tensor | None = None,
) -> Tensor:
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for note in range(len(queries) - 1):
        begin, end = keys[note], keys[note + 1]
        if seqused_k is not None:
            end = begin + int(seqused_k[note])
        own, theirs = slice(queries[note], queries[note + 1]), slice(begin, end)
        if begin < end:
            at = rows_of(buckets, places_of(own, q_places), places_of(theirs, k_places))
            scores = torch.einsum("qhd,khd->hqk", q[own], k[theirs])
            scores = scores + position_scores(q[own], k[theirs], position_keys, position_queries, at)
            out[own] = torch.einsum("hqk,khd->qhd", (scores * scale).softmax(-1), v[theirs])
    return out


def rows_of(buckets: Tensor, q_places: Tensor, k_places: Tensor) -> Tensor:
    """[Q, K] int64: the row of the tables that each pair reads."""
    reach = buckets.shape[0] // 2
    distance = q_places.to(buckets.device)[:, None] - k_places.to(buckets.device)[None, :]
    return buckets[distance.clamp_(-reach, reach) + reach].long()


def position_scores(
    q: Tensor, k: Tensor, position_keys: Tensor | None, position_queries: Tensor | None, at: Tensor
) -> Tensor | float:
    """[heads, Q, K]: both terms of one note, before the scale."""
    total: Tensor | float = 0.0
    if position_keys is not None:
        products = torch.einsum("qhd,hrd->hqr", q, position_keys)
        total = total + products.gather(2, at.expand(q.shape[1], -1, -1))
    if position_queries is not None:
        products = torch.einsum("khd,hrd->hkr", k, position_queries)
        total = total + products.gather(2, at.t().expand(q.shape[1], -1, -1)).transpose(1, 2)
    return total


def fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
    position_keys: Tensor | None,
    position_queries: Tensor | None,
    buckets: Tensor,
    q_places: Tensor | None = None,
    k_places: Tensor | None = None,
) -> Tensor:
    return q.new_empty(q.shape)


_run = registry.define(
    registry.Op(
        "attention_disentangled",
        "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_k, float scale, "
        "Tensor? position_keys, Tensor? position_queries, Tensor buckets, Tensor? q_places=None, "
        "Tensor? k_places=None) -> Tensor",
        reference,
        fake,
    )
)


def attention_disentangled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
    position_keys: Tensor | None,
    position_queries: Tensor | None,
    buckets: Tensor,
    q_places: Tensor | None = None,
    k_places: Tensor | None = None,
) -> Tensor:
    """softmax(scale * (q k^T + q position_keys[r]^T + k position_queries[r]^T)) v, each query over its note's keys.

    r is `buckets` at the query's place minus the key's. Terms, softmax and sums are in fp32, and no [S, S] tensor is
    made.

    Args:
        q: [Tq, heads, head_dim], fp32 or bf16, last dimension contiguous, head_dim 1 to 256.
        k, v: [Tk, heads, head_dim], like `q`; all three may be views into one packed QKV tensor.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32, contiguous, from 0 to Tq and Tk, never decreasing.
        seqused_k: [B] int32 or None; note b attends to its first seqused_k[b] keys only.
        scale: factor on the sum of the three.
        position_keys, position_queries: [heads, R, head_dim] contiguous, in the dtype of `q`; None leaves the term out.
        buckets: [2 D + 1] int32, contiguous: the row of the tables for the distances -D to D, never decreasing; what is
            further away reads the nearer end.
        q_places, k_places: [Tq] and [Tk] int32, contiguous, rising within a note; None is a row's rank in its note.
            Only differences within a note count. Places that are not consecutive are slower.

    Returns:
        [Tq, heads, head_dim], contiguous, in the dtype of `q`; zeros for queries without keys.

    Raises:
        ValueError: a shape, dtype, stride, or boundaries that the kernels do not take.
    """
    return torch.ops.clinfast.attention_disentangled(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, scale, position_keys, position_queries, buckets, q_places,
        k_places,
    )  # fmt: skip


def log_buckets(span: int, position_buckets: int, max_relative_positions: int) -> Tensor:
    """`buckets` as DeBERTa v2 has them, for tables of 2 span rows: [2 D + 1] int32.

    Distances below half of `position_buckets` have a row each, those up to `max_relative_positions` share rows whose
    widths grow by a factor; without position_buckets (0) each has its own. In fp32, as stock computes them.
    """
    reach = max(span, max_relative_positions)
    distance = torch.arange(-reach, reach + 1)
    found = distance
    if position_buckets > 0:
        mid = position_buckets // 2
        near = distance.abs() < mid
        size = torch.where(near, mid - 1, distance.abs()).float()
        base = torch.log(torch.tensor((max_relative_positions - 1) / mid, dtype=torch.float32))
        far = torch.ceil(torch.log(size / mid) / base * (mid - 1)) + mid
        found = torch.where(size <= mid, distance.float(), far * distance.sign()).long()
    return (found + span).clamp(0, 2 * span - 1).int()


def position_scale(head_dim: int, terms: int) -> float:
    """The factor on the scores, from an fp32 square root as in stock."""
    return 1.0 / float(torch.tensor(math.sqrt(head_dim * (1 + terms)), dtype=torch.float32))
