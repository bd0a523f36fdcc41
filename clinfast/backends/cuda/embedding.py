"""`embedding` on the compiled CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.cuda.layer_norm import MAX_HIDDEN
from clinfast.backends.cuda.native import (
    DTYPE_NAMES,
    DTYPES,
    address,
    check_dtype,
    check_rows,
    check_vector,
    is_ours,
    on,
    stream,
)
from clinfast.backends.cuda.packing import check_ids
from clinfast.backends.cuda.values import check_embedding


def _check_table(name: str, table: Tensor, word: Tensor, device: int) -> None:
    check_dtype("embedding", name, table, word.dtype)
    check_rows("embedding", name, table, device)
    if table.shape[1] != word.shape[1]:
        raise ValueError(f"embedding: {name} has rows of {table.shape[1]}; those of word have {word.shape[1]}")


def prechecked(
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
    """A token outside a table gives a row of NaN: raising would wait for the device. `pack` reports such ids."""
    out_dtype = DTYPES.get(dtype)
    if out_dtype is None:
        raise ValueError(f"embedding: dtype is {dtype}; it must be {DTYPE_NAMES}")
    table_dtype = check_dtype("embedding", "word", word)
    device = check_rows("embedding", "word", word)
    vocab_size, hidden = word.shape
    if not 1 <= hidden <= MAX_HIDDEN:
        raise ValueError(f"embedding: hidden is {hidden}; the kernel serves 1 to {MAX_HIDDEN}")
    _check_table("position", position, word, device)
    types_address = type_stride = type_vocab_size = 0
    if token_type is not None:
        _check_table("token_type", token_type, word, device)
        types_address, type_stride, type_vocab_size = (
            token_type.data_ptr(),
            token_type.stride()[0],
            token_type.shape[0],
        )
    if (weight is None) != (shift is None):
        raise ValueError("embedding: one of weight and shift is None; pass both, or neither where no LayerNorm follows")
    if weight is not None and shift is not None:
        check_vector("embedding", "weight", weight, hidden, device)
        check_vector("embedding", "shift", shift, hidden, device)
    ids_bytes = check_ids("embedding", "input_ids", input_ids, device)
    batch, seqlen = input_ids.shape
    types_bytes = types_row = types_column = 0
    if token_type_ids is not None:
        types_bytes = check_ids("embedding", "token_type_ids", token_type_ids, device, input_ids.shape)
        types_row, types_column = token_type_ids.stride()
    if indices.ndim != 1:
        raise ValueError(f"embedding: indices has shape {list(indices.shape)}; it must have one dimension")
    tokens = indices.shape[0]
    check_vector("embedding", "indices", indices, tokens, device, torch.int32)
    if position_ids is not None and not (
        position_ids.shape == input_ids.shape
        and position_ids.dtype is torch.int32
        and position_ids.is_contiguous()
        and is_ours(position_ids)
        and position_ids.get_device() == device
    ):
        raise ValueError(
            f"embedding: position_ids is {list(position_ids.shape)} {position_ids.dtype} on {position_ids.device}; it "
            f"must be contiguous int32 on the device of word, of the shape of input_ids, {list(input_ids.shape)}"
        )
    ids_row, ids_column = input_ids.stride()
    out = torch.empty(tokens, hidden, dtype=dtype, device=word.device)
    on(device).embedding(
        input_ids.data_ptr(), address(token_type_ids), ids_row, ids_column, types_row, types_column, ids_bytes,
        types_bytes, indices.data_ptr(), address(position_ids), batch, seqlen, tokens, hidden, position_offset,
        word.data_ptr(), position.data_ptr(), types_address, word.stride()[0], position.stride()[0], type_stride,
        vocab_size, position.shape[0], type_vocab_size, address(weight), address(shift), out.data_ptr(), hidden,
        eps, table_dtype, out_dtype, device, stream(device),
    )  # fmt: skip
    return out


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
    out = prechecked(
        input_ids, token_type_ids, indices, position_ids, word, position, token_type, weight, shift, eps,
        position_offset, dtype,
    )  # fmt: skip
    check_embedding(
        input_ids, token_type_ids, indices, position_ids, word, position, token_type, position_offset
    )
    return out


IMPLEMENTATIONS = {"embedding": embedding, "embedding.prechecked": prechecked}
