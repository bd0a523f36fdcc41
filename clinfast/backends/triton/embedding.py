"""`embedding` on the Triton kernels."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from clinfast.backends.triton import checks, device
from clinfast.backends.triton.launch import launch
from clinfast.backends.triton.layer_norm import MAX_HIDDEN
from clinfast.triton_kernels import configs
from clinfast.triton_kernels.variants import SUM_REGISTERS

NOTHING_BAD = 2**31 - 1


def _table(name: str, table: Tensor, word: Tensor) -> None:
    checks.rows("embedding", name, table, word.dtype)
    if table.shape[1] != word.shape[1]:
        raise ValueError(f"embedding: {name} has rows of {table.shape[1]}; those of word have {word.shape[1]}")


def _embed(
    input_ids: Tensor, token_type_ids: Tensor | None, indices: Tensor, position_ids: Tensor | None, word: Tensor,
    position: Tensor, token_type: Tensor | None, weight: Tensor | None, shift: Tensor | None, eps: float,
    position_offset: int, dtype: torch.dtype, bad: Tensor | None,
) -> Tensor:  # fmt: skip
    if dtype not in checks.FLOATS:
        raise ValueError(f"embedding: dtype is {dtype}; it must be {checks.FLOAT_NAMES}")
    checks.rows("embedding", "word", word)
    vocab_size, hidden = word.shape
    block = checks.width("embedding", hidden, MAX_HIDDEN)
    _table("position", position, word)
    if token_type is not None:
        _table("token_type", token_type, word)
    if (weight is None) != (shift is None):
        raise ValueError("embedding: one of weight and shift is None; pass both, or neither where no LayerNorm follows")
    if weight is not None and shift is not None:
        checks.vector("embedding", "weight", weight, hidden)
        checks.vector("embedding", "shift", shift, hidden)
    checks.ids("embedding", "input_ids", input_ids)
    batch, seqlen = input_ids.shape
    if token_type_ids is not None:
        checks.ids("embedding", "token_type_ids", token_type_ids, input_ids.shape)
    if indices.dim() != 1:
        raise ValueError(f"embedding: indices has shape {list(indices.shape)}; it must have one dimension")
    tokens = indices.shape[0]
    checks.vector("embedding", "indices", indices, tokens, torch.int32)
    if position_ids is not None and not (
        position_ids.shape == input_ids.shape and position_ids.dtype is torch.int32 and position_ids.is_contiguous()
    ):
        raise ValueError(
            f"embedding: position_ids is {list(position_ids.shape)} {position_ids.dtype} on {position_ids.device}; it "
            f"must be contiguous int32, of the shape of input_ids, {list(input_ids.shape)}"
        )
    out = torch.empty((tokens, hidden), dtype=dtype, device=word.device)
    if not tokens:
        return out
    rows, warps = configs.rows(device.device_class(device.index_of(word)), block)
    # What is absent is passed as something that is there, and not read.
    types = input_ids if token_type_ids is None else token_type_ids
    table = word if token_type is None else token_type
    launch(
        "embedding_kernel", (checks.cdiv(tokens, rows), 1, 1),
        (input_ids, types, indices, indices if position_ids is None else position_ids, word, position, table, weight,
         shift, out, bad, tokens, batch, seqlen, hidden, vocab_size, position.shape[0],
         0 if token_type is None else token_type.shape[0], position_offset, int(token_type_ids is not None),
         int(position_ids is not None), *input_ids.stride(), *types.stride(), word.stride(0), position.stride(0),
         table.stride(0), float(eps)),
        (rows, block), warps, registers=SUM_REGISTERS if weight is None else 0,
    )  # fmt: skip
    return out


def prechecked(
    input_ids: Tensor, token_type_ids: Tensor | None, indices: Tensor, position_ids: Tensor | None, word: Tensor,
    position: Tensor, token_type: Tensor | None, weight: Tensor | None, shift: Tensor | None, eps: float,
    position_offset: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """For ids that `pack` found in range. Others read nothing either, and give rows of NaN."""
    return _embed(
        input_ids, token_type_ids, indices, position_ids, word, position, token_type, weight, shift, eps,
        position_offset, dtype, None,
    )  # fmt: skip


def embedding(
    input_ids: Tensor, token_type_ids: Tensor | None, indices: Tensor, position_ids: Tensor | None, word: Tensor,
    position: Tensor, token_type: Tensor | None, weight: Tensor | None, shift: Tensor | None, eps: float,
    position_offset: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Waits for the device, to raise where an id is out of range."""
    bad = torch.full((1,), NOTHING_BAD, dtype=torch.int32, device=word.device)
    out = _embed(
        input_ids, token_type_ids, indices, position_ids, word, position, token_type, weight, shift, eps,
        position_offset, dtype, bad,
    )  # fmt: skip
    first = int(bad)
    if first != NOTHING_BAD:
        _refuse(first, input_ids, token_type_ids, indices, position_ids, word, position, token_type, position_offset)
    return out


def _refuse(
    bad: int, input_ids: Tensor, token_type_ids: Tensor | None, indices: Tensor, position_ids: Tensor | None,
    word: Tensor, position: Tensor, token_type: Tensor | None, position_offset: int,
) -> NoReturn:  # fmt: skip
    index, (batch, seqlen) = int(indices[bad]), input_ids.shape
    if not 0 <= index < batch * seqlen:
        raise IndexError(f"embedding: indices[{bad}] is {index}; input_ids has {batch} x {seqlen} positions")
    row, column = divmod(index, seqlen)
    looked_up = [("input_ids", int(input_ids[row, column]), "word", word)]
    if token_type is not None:
        type_id = 0 if token_type_ids is None else int(token_type_ids[row, column])
        looked_up.append(("token_type_ids", type_id, "token_type", token_type))
    at = column + position_offset if position_ids is None else int(position_ids[row, column])
    looked_up.append(("the position", at, "position", position))
    for source, value, name, table in looked_up:
        if not 0 <= value < table.shape[0]:
            raise IndexError(
                f"embedding: {source} at row {row}, column {column} is {value}; {name} has {table.shape[0]} rows"
            )
    raise RuntimeError(f"embedding: the ids changed during the call (row {row}, column {column})")


IMPLEMENTATIONS = {"embedding": embedding, "embedding.prechecked": prechecked}
