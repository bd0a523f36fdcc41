"""From the user's padded batch to packed tokens, with the checks that need the values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clinfast.engine.spec import EncoderSpec, NotServed, Request


class PackedBatch(NamedTuple):
    """Where each packed token came from.

    `cu_seqlens` [B + 1] int32; `indices` [T] int32, flat positions in the [B, S] batch; `seqused_k` [B] int32 real
    lengths, or None where every packed token is real; `position_ids` [B, S] int32 where they were counted already;
    `columns` [T] int32, where each token stood in its note up to a number that all tokens of the note share, None where
    `indices` say that too.
    `offsets` [T] int32, each token's column from its note's first real token on, None where that is its rank or nobody
    asks.
    """

    cu_seqlens: Tensor
    indices: Tensor
    seqused_k: Tensor | None
    tokens: int
    max_seqlen: int
    batch: int
    seqlen: int
    position_ids: Tensor | None = None
    columns: Tensor | None = None
    offsets: Tensor | None = None

    @property
    def places(self) -> Tensor:
        """[T] int32: the difference of two tokens of a note is that of their columns."""
        return self.indices if self.columns is None else self.columns


def pack(
    request: Request, spec: EncoderSpec, op: Callable[..., Any], *, keep_padding: bool, first_token: bool
) -> PackedBatch:
    """Pack the request's real tokens by the op `pack` of a backend. Reading its facts is the one transfer to the host.

    Raises:
        IndexError: an id or a token type out of range (stock's class for it).
        NotServed: a masked first column under a head that reads column 0.
    """
    input_ids, mask, token_type_ids = request[:3]
    batch, seqlen = input_ids.shape
    types = spec.type_vocab_size if token_type_ids is not None else 0
    cu_seqlens, indices, seqused_k, facts = op(
        input_ids, mask, token_type_ids, spec.vocab_size, types, keep_padding
    )
    tokens, max_seqlen = check_facts(facts.tolist(), request, spec, first_token=first_token)
    kept = seqused_k if keep_padding and mask is not None else None
    packed = PackedBatch(cu_seqlens, indices[:tokens], kept, tokens, max_seqlen, batch, seqlen)
    if spec.uses_places and mask is not None and tokens:
        packed = packed._replace(offsets=offsets_of(packed))
    return packed


def offsets_of(batch: PackedBatch) -> Tensor | None:
    """`PackedBatch.offsets` of a batch that has tokens."""
    cu_seqlens = batch.cu_seqlens.long()
    lengths = cu_seqlens.diff()
    columns = batch.indices % batch.seqlen
    first = columns[cu_seqlens[:-1].clamp(max=batch.tokens - 1)]
    if batch.seqused_k is None:
        last = columns[(cu_seqlens[1:] - 1).clamp(min=0)]
        if not ((last - first + 1 != lengths) & (lengths > 0)).any():
            return None
    return columns - first.repeat_interleave(lengths)


def check_facts(facts: list[int], request: Request, spec: EncoderSpec, *, first_token: bool) -> tuple[int, int]:
    """Tokens and the longest note, from what the op `pack` reports. Raises as `pack` does."""
    tokens, max_seqlen, _, bad_id_at, bad_type_at, first_masked_note = facts
    input_ids, _, token_type_ids = request[:3]
    types = spec.type_vocab_size
    if bad_id_at >= 0:
        raise out_of_range("input_ids", input_ids, bad_id_at, spec.vocab_size, "vocabulary", "config.vocab_size")
    if bad_type_at >= 0 and token_type_ids is not None:
        raise out_of_range(
            "token_type_ids", token_type_ids, bad_type_at, types, "token type table", "config.type_vocab_size"
        )
    if first_token and first_masked_note >= 0:
        raise NotServed("column 0 is masked (left padding) under a first-token head")
    return tokens, max_seqlen


def out_of_range(name: str, values: Tensor, at: int, size: int, table: str, field: str) -> IndexError:
    row, column = divmod(at, values.shape[1])
    return IndexError(
        f"{name}[{row}, {column}] is {int(values[row, column])}, which is out of range: the {table} has {size} "
        f"entries, 0 to {size - 1} ({field}); is the tokenizer the model's own?"
    )


def one_row_a_note(batch: int, device: torch.device) -> Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=device)


def rows_of(positions: Tensor, batch: PackedBatch) -> Tensor:
    """Packed rows of the chosen positions [B, S] bool, in the order of the batch.

    Raises:
        ValueError: a padded position is among them.
    """
    row_at = torch.full((batch.batch * batch.seqlen,), -1, dtype=torch.long, device=positions.device)
    row_at[batch.indices.long()] = torch.arange(batch.tokens, device=positions.device)
    chosen = positions.reshape(-1).nonzero().view(-1)
    rows = row_at[chosen]
    if (rows < 0).any():
        row, column = divmod(int(chosen[rows < 0][0]), batch.seqlen)
        raise ValueError(
            f"logits_positions[{row}, {column}] is True, but attention_mask masks that position; choose real tokens"
        )
    return rows
