"""The bias of attention scores by relative distance, its buckets expanded to a value for each distance."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bucket_of(distances: Tensor, buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance, key's place minus query's: T5's bidirectional ones (arXiv:1910.10683, section 2.1).

    Half of the buckets are for keys behind the query. Of each half, one half holds a distance each, the other ranges
    that grow by a factor up to `max_distance`; from there on all share the last.
    """
    half = buckets // 2
    exact = half // 2
    n = distances.abs()
    # In the order in which transformers computes it, since a float that is about a whole number decides.
    far = exact + (torch.log(n.float() / exact) / math.log(max_distance / exact) * (half - exact)).to(torch.long)
    near = torch.where(n < exact, n, far.clamp(max=half - 1))
    return near + (distances > 0).to(torch.long) * half


def expanded(table: Tensor, buckets: int, max_distance: int) -> Tensor:
    """[heads, 2 * max_distance + 1] fp32, as `attention_biased` takes it, from the weights [rows, heads]."""
    distances = torch.arange(-max_distance, max_distance + 1, device=table.device)
    return table.detach()[bucket_of(distances, buckets, max_distance)].float().T.contiguous()
