"""Windows, rotation and gates in pure PyTorch: part of `backends.torch`."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from clinfast.ops import gate as gates
from clinfast.ops import rotate as rotation
from clinfast.ops.attention_biased import places_of
from clinfast.ops.attention_windowed import check_window
from clinfast.ops.linear import activate

# Queries that meet the keys of their windows at a time.
WINDOWED_QUERIES = 128


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
    """scaled_dot_product_attention on a block of one note's queries at a time, with the keys that one of them sees."""
    check_window(window)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    used = [b - a for a, b in itertools.pairwise(keys)] if seqused_k is None else seqused_k.tolist()
    for note, count in enumerate(used):
        own, of_keys = slice(queries[note], queries[note + 1]), slice(keys[note], keys[note] + count)
        at, to = places_of(own, q_places).to(q.device), places_of(of_keys, k_places).to(q.device)
        for start in range(0, own.stop - own.start if count else 0, WINDOWED_QUERIES):
            here = at[start : start + WINDOWED_QUERIES]
            near = ((to >= here.min() - window) & (to <= here.max() + window)).nonzero()
            if not len(near):
                continue
            first, last = int(near[0]), int(near[-1]) + 1
            sees = (to[None, first:last] - here[:, None]).abs() <= window
            rows = slice(own.start + start, own.start + start + len(here))
            part = slice(of_keys.start + first, of_keys.start + last)
            own_q, own_k, own_v = (t.transpose(0, 1)[None] for t in (q[rows], k[part], v[part]))
            result = functional.scaled_dot_product_attention(own_q, own_k, own_v, sees, scale=scale)
            out[rows] = result[0].transpose(0, 1).masked_fill(~sees.any(1)[:, None, None], 0)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, places: Tensor | None = None) -> None:
    rotation.check(x, cos, sin, cu_seqlens, places)
    at = rotation.ranks(x.shape[0], cu_seqlens) if places is None else places.long()
    bad = (at.abs() >= cos.shape[0]).nonzero()
    if len(bad):
        raise rotation.outside(int(bad[0]), cos.shape[0])
    x.copy_(rotation.reference(x.float(), cos, sin, cu_seqlens, at))


def gate(x: Tensor, activation: str) -> Tensor:
    gates.check(x, activation)
    first, second = x.float().chunk(2, -1)
    return (activate(first, activation) * second).to(x.dtype)

