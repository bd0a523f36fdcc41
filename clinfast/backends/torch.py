"""Pure PyTorch: every op, every platform, no compiled code; slower than the kernels, same results."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from clinfast.backends.torch_variants import attention_windowed, gate, rotate
from clinfast.ops import attention_biased as biased
from clinfast.ops.attention_disentangled import position_scores, rows_of
from clinfast.ops.linear import activate
from clinfast.ops.packing import PackedBuffers, PackInto


def layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, shift: Tensor, eps: float) -> Tensor:
    total = x.float() if residual is None else x.float() + residual.float()
    return functional.layer_norm(total, total.shape[-1:], weight, shift, eps).to(x.dtype)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    y = activate(functional.linear(x, weight, bias), activation)
    return y if residual is None else y + residual


# Rows whose results lie between the multiplication and their place at a time: with a vocabulary of outputs, 60 MB.
SCATTER_ROWS = 512


def scatter_in_blocks(linear: Callable[[Tensor], Tensor], x: Tensor, rows: Tensor, out: Tensor) -> None:
    """out[rows] = linear(x), never with all of linear(x) in memory."""
    for start in range(0, x.shape[0], SCATTER_ROWS):
        part = slice(start, start + SCATTER_ROWS)
        out.index_copy_(0, rows[part].long(), linear(x[part]).to(out.dtype))


class FallbackLinear:
    """A plain `F.linear` on a copy of the weight, where no prepacked multiplication is to be had."""

    __slots__ = ("bias", "dtype", "in_features", "library", "nbytes", "out_features", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.detach().to(dtype, copy=True)
        self.bias = None if bias is None else bias.detach().to(dtype, copy=True)
        self.nbytes = self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)
        self.library, self.dtype = "torch", dtype
        self.out_features, self.in_features = self.weight.shape

    def __call__(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        return linear(x, self.weight, self.bias, activation, residual)

    def scatter(self, x: Tensor, rows: Tensor, out: Tensor) -> None:
        scatter_in_blocks(self, x, rows, out)


def embedding(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    indices: Tensor,
    position_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    eps: float,
    position_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    at = indices.long()
    total = functional.embedding(input_ids.reshape(-1)[at].long(), word).float()
    if token_type is not None:
        types = torch.zeros_like(at) if token_type_ids is None else token_type_ids.reshape(-1)[at].long()
        total += functional.embedding(types, token_type)
    if position_ids is None:
        positions = at % max(input_ids.shape[1], 1) + position_offset
    else:
        positions = position_ids.reshape(-1)[at].long()
    total += functional.embedding(positions, position)
    if weight is None or shift is None:
        return total.to(dtype)
    return functional.layer_norm(total, total.shape[-1:], weight, shift, eps).to(dtype)


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate is {approximate!r}; choose 'none' (erf) or 'tanh'")
    total = x.float() if bias is None else x.float() + bias
    return functional.gelu(total, approximate=approximate).to(x.dtype)


def pack(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    vocab_size: int,
    type_vocab_size: int,
    keep_padding: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fetches no value to the host: on an accelerator the caller's transfer of `facts` is the first."""
    (batch, seqlen), device = input_ids.shape, input_ids.device
    kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.ne(0)
    seqused_k = kept.sum(1, dtype=torch.int32)
    if keep_padding:
        lengths = torch.full_like(seqused_k, seqlen)
        rank = torch.where(kept, kept.cumsum(1) - 1, seqused_k[:, None] - 1 + (~kept).cumsum(1))
        rank += torch.arange(batch, device=device)[:, None] * seqlen
    else:
        # Padded positions all land in one extra slot, which is then cut off.
        lengths = seqused_k
        rank = torch.where(kept.flatten(), kept.flatten().cumsum(0) - 1, batch * seqlen)
    order = torch.arange(batch * seqlen, dtype=torch.int32, device=device)
    indices = order.new_zeros(batch * seqlen + 1).scatter_(0, rank.flatten(), order)[:-1]
    cu_seqlens = functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))

    def first(found: Tensor) -> Tensor:
        if found.numel() == 0:
            return cu_seqlens.new_full((), -1)
        return torch.where(found.any(), found.flatten().int().argmax(), -1)

    def first_outside(ids: Tensor | None, size: int) -> Tensor:
        return cu_seqlens.new_full((), -1) if ids is None else first((ids < 0) | (ids >= size))

    facts = torch.stack(
        [
            value.long()
            for value in (
                cu_seqlens[-1],
                lengths.amax() if batch else cu_seqlens[-1],
                (seqused_k == 0).sum(),
                first_outside(input_ids, vocab_size),
                first_outside(token_type_ids, type_vocab_size),
                first(~kept[:, :1]),
            )
        ]
    )
    return cu_seqlens, indices, seqused_k, facts


def pack_into(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    constants: PackInto,
    rows: int,
    notes: int,
    buffers: PackedBuffers,
) -> None:
    """`pack`, then `place`."""
    vocab_size, types, _, _, keep_padding = constants
    packed = pack(input_ids, attention_mask, token_type_ids, vocab_size, types, keep_padding)
    place(input_ids, token_type_ids, packed, constants, rows, notes, buffers)


def place(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    packed: tuple[Tensor, Tensor, Tensor, Tensor],
    constants: PackInto,
    rows: int,
    notes: int,
    buffers: PackedBuffers,
) -> None:
    """What `pack` of any backend returned, into `buffers`."""
    cu_seqlens, indices, seqused_k, facts = packed
    (batch, seqlen), held = input_ids.shape, min(rows, indices.shape[0])
    at = torch.arange(held, device=indices.device)
    # Entries past the tokens mean nothing, and are not to be followed.
    at = torch.where(at < facts[0], indices[:held], 0).long()
    ids = input_ids.reshape(-1)[at]
    buffers.input_ids[:held] = torch.where((ids < 0) | (ids >= constants.vocab_size), 0, ids)
    if token_type_ids is None:
        buffers.token_type_ids[:held] = 0
    else:
        types = token_type_ids.reshape(-1)[at]
        buffers.token_type_ids[:held] = torch.where((types < 0) | (types >= constants.type_vocab_size), 0, types)
    if constants.padding_idx is None:
        buffers.position_ids[:held] = at % max(seqlen, 1) + constants.position_offset
    else:
        buffers.position_ids[:held] = position_ids(input_ids, constants.padding_idx).reshape(-1)[at]
    buffers.indices[:held] = at
    buffers.cu_seqlens[: batch + 1] = cu_seqlens
    buffers.cu_seqlens[batch + 1 : notes + 1] = cu_seqlens[-1]
    buffers.cu_seqlens[notes + 1] = rows
    buffers.seqused_k[:batch] = seqused_k
    buffers.seqused_k[batch : notes + 1] = 0
    buffers.facts.copy_(facts)


def position_ids(input_ids: Tensor, padding_idx: int) -> Tensor:
    counts = input_ids.ne(padding_idx).int()
    return counts.cumsum(1, dtype=torch.int32).mul_(counts).add_(padding_idx)


def unpack(packed: Tensor, indices: Tensor, positions: int, dtype: torch.dtype) -> Tensor:
    out = packed.new_zeros((positions, packed.shape[1]), dtype=dtype)
    return out.index_copy_(0, indices[: packed.shape[0]].long(), packed.to(dtype))


def pooling(x: Tensor, cu_seqlens: Tensor, kind: str) -> Tensor:
    if kind not in ("first_token", "mean", "max"):
        raise ValueError(f"pooling: kind is {kind!r}; choose 'first_token', 'mean' or 'max'")
    bounds = cu_seqlens.tolist()
    out = x.new_zeros((len(bounds) - 1, x.shape[1]))
    for note, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin < end:
            rows = x[begin:end]
            out[note] = rows[0] if kind == "first_token" else rows.mean(0) if kind == "mean" else rows.amax(0)
    return out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
) -> Tensor:
    """One scaled_dot_product_attention for each run of neighbours with the same lengths."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    batch = len(queries) - 1
    used = [b - a for a, b in itertools.pairwise(keys)] if seqused_k is None else seqused_k.tolist()
    lengths = [(queries[b + 1] - queries[b], keys[b + 1] - keys[b], used[b]) for b in range(batch)]
    begin = 0
    while begin < batch:
        end = begin + 1
        while end < batch and lengths[end] == lengths[begin]:
            end += 1
        own, (_, key_length, key_count) = slice(queries[begin], queries[end]), lengths[begin]
        if key_count == 0:
            out[own] = 0
        elif queries[end] > queries[begin]:
            notes = (end - begin, -1)
            q_run = q[own].unflatten(0, notes).transpose(1, 2)
            of_run = slice(keys[begin], keys[begin] + (end - begin) * key_length)
            k_run, v_run = (t[of_run].unflatten(0, notes)[:, :key_count].transpose(1, 2) for t in (k, v))
            result = functional.scaled_dot_product_attention(q_run, k_run, v_run, scale=scale)
            out[own] = result.transpose(1, 2).flatten(0, 1)
        begin = end
    return out


# Queries whose position scores are in memory at a time.
SCORED_ROWS = 256


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
    """Note by note, the position scores as the mask of scaled_dot_product_attention."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for note in range(len(queries) - 1):
        theirs = slice(keys[note], keys[note + 1] if seqused_k is None else keys[note] + int(seqused_k[note]))
        if theirs.start == theirs.stop:
            continue
        own = slice(queries[note], queries[note + 1])
        q_all, k_all = biased.places_of(own, q_places), biased.places_of(theirs, k_places)
        for first in range(own.start, own.stop, SCORED_ROWS):
            some = slice(first, min(first + SCORED_ROWS, own.stop))
            at = rows_of(buckets, q_all[some.start - own.start : some.stop - own.start], k_all)
            # Only rows that these distances reach are multiplied.
            low, high = int(at.min()), int(at.max()) + 1
            by_query, by_key = (None if t is None else t[:, low:high] for t in (position_keys, position_queries))
            scores = position_scores(q[some], k[theirs], by_query, by_key, at - low)
            mask = (scores * scale)[None] if isinstance(scores, Tensor) else None
            found = functional.scaled_dot_product_attention(
                q[some].transpose(0, 1)[None], k[theirs].transpose(0, 1)[None], v[theirs].transpose(0, 1)[None],
                attn_mask=mask, scale=scale,
            )  # fmt: skip
            out[some] = found[0].transpose(0, 1)
    return out


# Queries that meet all the keys of a note at a time: their biases are in memory.
BIASED_QUERIES = 128


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
    """scaled_dot_product_attention in fp32, whose mask is the bias, a block of one note's queries at a time."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    used = [b - a for a, b in itertools.pairwise(keys)] if seqused_k is None else seqused_k.tolist()
    for note, count in enumerate(used):
        if not count:
            continue
        of_keys = slice(keys[note], keys[note] + count)
        own_k, own_v = (t[of_keys].float().transpose(0, 1) for t in (k, v))
        own = slice(queries[note], queries[note + 1])
        at, to = biased.places_of(own, q_places), biased.places_of(of_keys, k_places)
        for start in range(0, own.stop - own.start, BIASED_QUERIES):
            rows = slice(own.start + start, min(own.start + start + BIASED_QUERIES, own.stop))
            mask = biased.biases(bias, at[start : start + BIASED_QUERIES], to)
            result = functional.scaled_dot_product_attention(
                q[rows].float().transpose(0, 1)[None], own_k[None], own_v[None], mask[None], scale=scale
            )
            out[rows] = result[0].transpose(0, 1).to(q.dtype)
    return out


def implementations() -> dict[str, Callable[..., Any]]:
    from clinfast.backends import fp8  # which has this module's functions in it

    return {
        **fp8.IMPLEMENTATIONS,
        "attention": attention,
        "attention_biased": attention_biased,
        "attention_disentangled": attention_disentangled,
        "attention_windowed": attention_windowed,
        # A note's bits do not depend on the others; the kernels leave masks with holes to it.
        "attention_windowed.fixed": attention_windowed,
        "gate": gate,
        "embedding": embedding,
        "gelu": gelu,
        "layer_norm": layer_norm,
        "linear": linear,
        "linear.prepack": FallbackLinear,
        "pack": pack,
        "pack.into": pack_into,
        "pooling": pooling,
        "position_ids": position_ids,
        "rotate": rotate,
        "unpack": unpack,
    }
