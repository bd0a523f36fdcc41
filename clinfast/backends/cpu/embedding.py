"""`embedding` on the compiled CPU kernels."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from clinfast.backends.cpu.layer_norm import MAX_HIDDEN
from clinfast.backends.cpu.native import DTYPES, address, check_dtype, check_rows, check_vector, kernels
from clinfast.backends.cpu.packing import check_ids


def _check_table(name: str, table: Tensor, word: Tensor) -> None:
    if (
        table.dtype is word.dtype
        and table.ndim == 2
        and table.shape[1] == word.shape[1]
        and table.is_contiguous()
        and table.is_cpu
    ):
        return
    check_dtype("embedding", name, table, word.dtype)
    check_rows("embedding", name, table)
    if table.shape[1] != word.shape[1]:
        raise ValueError(f"embedding: {name} has rows of {table.shape[1]}; those of word have {word.shape[1]}")


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
    table_dtype, out_dtype = DTYPES.get(word.dtype), DTYPES.get(dtype)
    if out_dtype is None:
        raise ValueError(f"embedding: dtype is {dtype}; it must be float32 or bfloat16")
    if table_dtype is None or not (word.ndim == 2 and word.is_contiguous() and word.is_cpu):
        table_dtype = check_dtype("embedding", "word", word)
        check_rows("embedding", "word", word)
    vocab_size, hidden = word.shape
    if not 1 <= hidden <= MAX_HIDDEN:
        raise ValueError(f"embedding: hidden is {hidden}; the kernel serves 1 to {MAX_HIDDEN}")
    _check_table("position", position, word)
    types_address = type_stride = type_vocab_size = 0
    if token_type is not None:
        _check_table("token_type", token_type, word)
        types_address, type_stride, type_vocab_size = (
            token_type.data_ptr(),
            token_type.stride()[0],
            token_type.shape[0],
        )
    if weight is not None and shift is not None:
        check_vector("embedding", "weight", weight, hidden)
        check_vector("embedding", "shift", shift, hidden)
    elif weight is not None or shift is not None:
        raise ValueError("embedding: one of weight and shift is None; a LayerNorm needs both")
    ids_bytes = check_ids("embedding", "input_ids", input_ids)
    batch, seqlen = input_ids.shape
    types_bytes = types_row = types_column = 0
    if token_type_ids is not None:
        types_bytes = check_ids("embedding", "token_type_ids", token_type_ids, input_ids.shape)
        types_row, types_column = token_type_ids.stride()
    if indices.ndim != 1:
        raise ValueError(f"embedding: indices has shape {list(indices.shape)}; it must have one dimension")
    tokens = indices.shape[0]
    check_vector("embedding", "indices", indices, tokens, torch.int32)
    if position_ids is not None and not (
        position_ids.shape == input_ids.shape
        and position_ids.dtype is torch.int32
        and position_ids.is_contiguous()
        and position_ids.is_cpu
    ):
        raise ValueError(
            f"embedding: position_ids is {list(position_ids.shape)} {position_ids.dtype} on {position_ids.device}; it "
            f"must be contiguous int32 on the CPU, of the shape of input_ids, {list(input_ids.shape)}"
        )
    ids_row, ids_column = input_ids.stride()
    out = torch.empty(tokens, hidden, dtype=dtype)
    bad = kernels().embedding(
        input_ids.data_ptr(), address(token_type_ids), ids_row, ids_column, types_row, types_column,
        ids_bytes, types_bytes, indices.data_ptr(), address(position_ids), seqlen, tokens, hidden,
        position_offset, word.data_ptr(), position.data_ptr(), types_address, word.stride()[0],
        position.stride()[0], type_stride, address(weight), address(shift), out.data_ptr(), hidden, eps,
        table_dtype, out_dtype,
        torch.get_num_threads(), batch, vocab_size, position.shape[0], type_vocab_size,
    )  # fmt: skip
    if bad >= 0:
        _refuse(bad, input_ids, token_type_ids, indices, position_ids, word, position, token_type, position_offset)
    return out


def _refuse(
    bad: int,
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    indices: Tensor,
    position_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    position_offset: int,
) -> NoReturn:
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


IMPLEMENTATIONS = {"embedding": embedding}
