"""`pack` and `unpack`: from a padded batch to packed tokens and back; `position_ids` of a padded batch."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from clinfast.ops import registry

FACTS = ("tokens", "max_seqlen", "empty_notes", "bad_id_at", "bad_type_at", "first_masked_note")


def pack_reference(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    vocab_size: int,
    type_vocab_size: int,
    keep_padding: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, seqlen = input_ids.shape
    mask = torch.ones(batch, seqlen) if attention_mask is None else attention_mask
    kept = [[bool(value) for value in row] for row in mask.tolist()]
    cu_seqlens, indices, seqused_k = [0], [], []
    for note, row in enumerate(kept):
        real = [note * seqlen + column for column in range(seqlen) if row[column]]
        padded = [note * seqlen + column for column in range(seqlen) if not row[column]]
        indices += real + padded if keep_padding else real
        cu_seqlens.append(len(indices))
        seqused_k.append(len(real))

    def first_bad(ids: Tensor | None, size: int) -> int:
        flat = [] if ids is None else ids.reshape(-1).tolist()
        return next((i for i, value in enumerate(flat) if not 0 <= value < size), -1)

    facts = [
        len(indices),
        max((b - a for a, b in itertools.pairwise(cu_seqlens)), default=0),
        sum(length == 0 for length in seqused_k),
        first_bad(input_ids, vocab_size),
        first_bad(token_type_ids, type_vocab_size),
        next((note for note, row in enumerate(kept) if row and not row[0]), -1),
    ]
    indices += [0] * (batch * seqlen - len(indices))
    return (
        torch.tensor(cu_seqlens, dtype=torch.int32),
        torch.tensor(indices, dtype=torch.int32),
        torch.tensor(seqused_k, dtype=torch.int32),
        torch.tensor(facts, dtype=torch.int64),
    )


def pack_fake(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    vocab_size: int,
    type_vocab_size: int,
    keep_padding: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, seqlen = input_ids.shape
    return (
        input_ids.new_empty((batch + 1,), dtype=torch.int32),
        input_ids.new_empty((batch * seqlen,), dtype=torch.int32),
        input_ids.new_empty((batch,), dtype=torch.int32),
        input_ids.new_empty((len(FACTS),), dtype=torch.int64),
    )


_run_pack = registry.define(
    registry.Op(
        "pack",
        "(Tensor input_ids, Tensor? attention_mask, Tensor? token_type_ids, int vocab_size, "
        "int type_vocab_size, bool keep_padding=False) -> (Tensor cu_seqlens, Tensor indices, "
        "Tensor seqused_k, Tensor facts)",
        pack_reference,
        pack_fake,
    )
)


def pack(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    vocab_size: int,
    type_vocab_size: int,
    keep_padding: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the real tokens of a padded batch are, and what a caller must know before reading any table.

    Args:
        input_ids: [B, S] int32 or int64, any strides.
        attention_mask: [B, S] bool or an integer dtype, any strides; a token is real where it is not zero, as
            in transformers 5. None: every token is.
        token_type_ids: [B, S] int32 or int64, or None; only looked at for values out of range.
        vocab_size, type_vocab_size: ids must lie in [0, size).
        keep_padding: keep every position; each note's real tokens come first, then its padded ones.

    Returns:
        cu_seqlens: [B + 1] int32, the note boundaries among the packed tokens.
        indices: [B * S] int32, row * S + column of each packed token; entries past `tokens` mean nothing.
        seqused_k: [B] int32, the number of real tokens of each note.
        facts: [6] int64 in the order of `FACTS`: tokens (packed rows), max_seqlen (the longest note, in
            packed rows), empty_notes (without a real token), bad_id_at and bad_type_at (row * S + column of
            the first value out of range, in padded positions too), first_masked_note (whose column 0 is masked);
            the last three are -1 where there is none.

    Raises:
        ValueError: a shape or dtype that the kernels do not take.
    """
    return torch.ops.clinfast.pack(input_ids, attention_mask, token_type_ids, vocab_size, type_vocab_size, keep_padding)


def unpack_reference(packed: Tensor, indices: Tensor, positions: int, dtype: torch.dtype) -> Tensor:
    out = packed.new_zeros((positions, packed.shape[1]), dtype=dtype)
    for row, position in zip(packed, indices.tolist(), strict=False):
        out[position] = row.to(dtype)
    return out


def unpack_fake(packed: Tensor, indices: Tensor, positions: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((positions, packed.shape[1]), dtype=dtype)


_run_unpack = registry.define(
    registry.Op(
        "unpack",
        "(Tensor packed, Tensor indices, SymInt positions, ScalarType dtype) -> Tensor",
        unpack_reference,
        unpack_fake,
    )
)


def unpack(packed: Tensor, indices: Tensor, positions: int, dtype: torch.dtype) -> Tensor:
    """The packed rows at their padded positions, zeros elsewhere.

    Args:
        packed: [T, H], fp32 or bf16, last dimension contiguous.
        indices: [T] or longer, int32; row t goes to position indices[t]. Ascending order is fastest.
        positions: rows of the result, B * S.
        dtype: of the result, fp32 or bf16.

    Returns:
        [positions, H] in `dtype`.

    Raises:
        ValueError: a shape, dtype or stride that the kernels do not take.
        IndexError: an index outside [0, positions); nothing is written outside.
    """
    return torch.ops.clinfast.unpack(packed, indices, positions, dtype)


def position_ids_reference(input_ids: Tensor, padding_idx: int) -> Tensor:
    rows = []
    for row in input_ids.tolist():
        last, out = padding_idx, []
        for value in row:
            last += value != padding_idx
            out.append(padding_idx if value == padding_idx else last)
        rows.append(out)
    return torch.tensor(rows, dtype=torch.int32).view(input_ids.shape)


def position_ids_fake(input_ids: Tensor, padding_idx: int) -> Tensor:
    return input_ids.new_empty(input_ids.shape, dtype=torch.int32)


_run_position_ids = registry.define(
    registry.Op(
        "position_ids", "(Tensor input_ids, int padding_idx) -> Tensor", position_ids_reference, position_ids_fake
    )
)


def position_ids(input_ids: Tensor, padding_idx: int) -> Tensor:
    """Positions as RoBERTa counts them, whatever the attention mask says.

    Args:
        input_ids: [B, S] int32 or int64, any strides.
        padding_idx: the pad token's id, which is also the position of pad tokens; not negative.

    Returns:
        [B, S] int32: padding_idx + the number of ids up to this column that are not `padding_idx`, and `padding_idx`
        itself where the id is it.

    Raises:
        ValueError: a shape or dtype that the kernels do not take.
    """
    return torch.ops.clinfast.position_ids(input_ids, padding_idx)


class PackedBuffers(NamedTuple):
    """Memory of a fixed address that `pack.into` fills: a packed batch of at most R rows and N notes.

    The notes are followed by empty ones and, as note number `notes`, the rows that nobody asked for, which have no
    keys: so boundaries and lengths are valid whatever the batch.

    Attributes:
        input_ids, token_type_ids, position_ids, indices: [R] int32. Rows past the batch's keep values of an earlier
            one, or zeros: always in range. Ids out of range, which the facts report, become 0.
        cu_seqlens: [N + 2] int32; seqused_k: [N + 1] int32.
        facts: [6] int64, as of `pack`.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    indices: Tensor
    cu_seqlens: Tensor
    seqused_k: Tensor
    facts: Tensor

    @classmethod
    def of(cls, rows: int, notes: int, device: torch.device) -> PackedBuffers:
        sizes = (rows, rows, rows, rows, notes + 2, notes + 1)
        vectors = [torch.zeros(size, dtype=torch.int32, device=device) for size in sizes]
        return cls._make([*vectors, torch.zeros(len(FACTS), dtype=torch.int64, device=device)])


class PackInto(NamedTuple):
    """The constants of `pack.into`, an op without a schema: `implementation("pack.into", ...)` is a function
    (input_ids, attention_mask, token_type_ids, constants, rows, notes, buffers) that packs as `pack` does and fetches
    nothing to the host. `rows` and `notes` are how much of the buffers is in use: at least the batch's own.

    Positions are column + `position_offset`, or counted as `position_ids` does where `padding_idx` is not None.
    """

    vocab_size: int
    type_vocab_size: int
    position_offset: int
    padding_idx: int | None
    keep_padding: bool
