"""Masks that say which keys a note has, and where those keys lie in memory.

Such a mask is handed from the mask function to the attention as a boolean [B, 1, Q, K], as models expect it, but as a
view whose queries share their memory (stride 0). So it is known by its strides for what it is, however it got there,
and costs [B, K] bytes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

_FACTS = "_clinfast_keys"


class Keys(NamedTuple):
    """Arguments for the attention op over B * Q padded query rows and B * K padded key rows.

    `indices` picks the key rows first where a note's keys do not lie side by side; `version` is the mask's when this
    was computed.
    """

    queries: int
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_k: Tensor | None
    indices: Tensor | None
    version: int


def _every(step: int, count: int) -> Tensor:
    return torch.arange(0, (count + 1) * step, step, dtype=torch.int32, device="cpu")


@functools.lru_cache(maxsize=256)
def all_keys(batch: int, queries: int, keys: int) -> Keys:
    cu_seqlens_q = _every(queries, batch)
    return Keys(queries, cu_seqlens_q, cu_seqlens_q if keys == queries else _every(keys, batch), None, None, 0)


def find_keys(rows: Tensor, queries: int) -> Keys:
    """For `rows` [B, K] bool, true at real keys."""
    batch, keys = rows.shape
    lengths = rows.sum(1, dtype=torch.int32)
    columns = torch.arange(keys, dtype=torch.int32, device="cpu")
    cu_seqlens_q, cu_seqlens_k = _every(queries, batch), _every(keys, batch)
    if torch.equal(rows, columns < lengths[:, None]):
        return Keys(queries, cu_seqlens_q, cu_seqlens_k, lengths, None, 0)
    first = rows.byte().argmax(1).int()
    if torch.equal(rows, (columns >= first[:, None]) & (columns < (first + lengths)[:, None])):
        # Before every note stands one without queries, whose keys are the padding on the left.
        cu_seqlens_k = cu_seqlens_k.repeat_interleave(2)[:-1]
        cu_seqlens_k[1::2] += first
        used = torch.stack((torch.zeros_like(lengths), lengths), 1).flatten()
        return Keys(queries, cu_seqlens_q.repeat_interleave(2)[:-1], cu_seqlens_k, used, None, 0)
    cu_seqlens_k = torch.zeros(batch + 1, dtype=torch.int32, device="cpu")
    cu_seqlens_k[1:] = lengths.cumsum(0)
    return Keys(queries, cu_seqlens_q, cu_seqlens_k, None, rows.flatten().nonzero().flatten(), 0)


def make(rows: Tensor, queries: int) -> Tensor:
    """The mask [B, 1, Q, K] for `rows` [B, K] bool; what `keys_of` needs is computed here, once for all layers."""
    batch, keys = rows.shape
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor would have no version
        own = torch.empty(batch, keys, dtype=torch.bool, device="cpu").copy_(rows)
        mask = own[:, None, None, :].expand(batch, 1, queries, keys)
        setattr(mask, _FACTS, find_keys(own, queries)._replace(version=mask._version))
    return mask


def is_key_mask(mask: Tensor, batch: int, queries: int, keys: int) -> bool:
    """Whether the boolean `mask` masks the same keys for every query and head."""
    if mask.dim() != 4:
        return False
    shape, strides = mask.shape, mask.stride()
    return (
        shape[3] == keys
        and shape[0] in (1, batch)
        and (shape[1] == 1 or strides[1] == 0)
        and (shape[2] == 1 or (shape[2] == queries and strides[2] == 0))
    )


def keys_of(mask: Tensor, batch: int, queries: int, keys: int) -> Keys:
    """What a mask that `is_key_mask` says."""
    known: Keys | None = getattr(mask, _FACTS, None)
    if known is not None and not mask.is_inference() and known.queries == queries and known.version == mask._version:
        return known
    return find_keys(mask[:, 0, 0].expand(batch, keys), queries)
