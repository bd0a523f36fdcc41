"""`pack`, `unpack` and `position_ids` on the compiled CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.cuda.native import (
    DTYPE_NAMES,
    DTYPES,
    address,
    check_device,
    check_dtype,
    check_rows,
    is_ours,
    on,
    stream,
)
from clinfast.backends.cuda.values import check_indices
from clinfast.ops.packing import PackedBuffers, PackInto

ID_BYTES = {torch.int64: 8, torch.int32: 4}
# The kernel's mask types are named by their bytes; bool and the 8-bit integers read the same.
MASK_BYTES = {torch.int64: 8, torch.int32: 4, torch.bool: 1, torch.uint8: 1, torch.int8: 1}
INT32_MAX = 2**31 - 1


def check_ids(op: str, name: str, ids: Tensor, device: int | None = None, shape: torch.Size | None = None) -> int:
    """Bytes of one id; refuses anything but int32 or int64 [B, S]."""
    itemsize = ID_BYTES.get(ids.dtype)
    if itemsize is None:
        raise ValueError(f"{op}: {name} has dtype {ids.dtype}; it must be int32 or int64")
    if ids.ndim != 2 or (shape is not None and ids.shape != shape):
        wanted = "two dimensions, [B, S]" if shape is None else f"the shape of input_ids, {list(shape)}"
        raise ValueError(f"{op}: {name} has shape {list(ids.shape)}; it must have {wanted}")
    check_device(op, name, ids, device)
    return itemsize


def _check_mask(mask: Tensor, shape: torch.Size, device: int) -> Tensor:
    if mask.shape != shape:
        raise ValueError(f"pack: attention_mask has shape {list(mask.shape)}; input_ids has {list(shape)}")
    check_device("pack", "attention_mask", mask, device)
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(f"pack: attention_mask has dtype {mask.dtype}; it must be bool or an integer dtype")
    return mask if mask.dtype in MASK_BYTES else mask != 0


def pack(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    vocab_size: int,
    type_vocab_size: int,
    keep_padding: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fetches no value to the host: the caller's transfer of `facts` is the first."""
    ids_bytes = check_ids("pack", "input_ids", input_ids)
    shape, where, device = input_ids.shape, input_ids.device, input_ids.get_device()
    batch, seqlen = shape
    if vocab_size < 0 or type_vocab_size < 0:
        raise ValueError(
            f"pack: vocab_size is {vocab_size} and type_vocab_size {type_vocab_size}; neither may be negative"
        )
    if batch * seqlen >= INT32_MAX:
        raise ValueError(f"pack: input_ids has shape {list(shape)}; batch x seqlen must be below {INT32_MAX}")
    mask = mask_bytes = mask_row = mask_column = 0
    if attention_mask is not None:
        attention_mask = _check_mask(attention_mask, shape, device)
        mask, mask_bytes = attention_mask.data_ptr(), MASK_BYTES[attention_mask.dtype]
        mask_row, mask_column = attention_mask.stride()
    types = types_bytes = types_row = types_column = 0
    if token_type_ids is not None:
        types_bytes = check_ids("pack", "token_type_ids", token_type_ids, device, shape)
        types = token_type_ids.data_ptr()
        types_row, types_column = token_type_ids.stride()
    ids_row, ids_column = input_ids.stride()
    cu_seqlens, indices, seqused_k, notes = (
        torch.empty(size, dtype=torch.int32, device=where) for size in (batch + 1, batch * seqlen, batch, 2 * batch)
    )
    facts = torch.empty(6, dtype=torch.int64, device=where)
    on(device).pack(
        mask, input_ids.data_ptr(), types, mask_row, mask_column, ids_row, ids_column, types_row, types_column,
        mask_bytes, ids_bytes, types_bytes, batch, seqlen, vocab_size, type_vocab_size, keep_padding,
        cu_seqlens.data_ptr(), indices.data_ptr(), seqused_k.data_ptr(), notes.data_ptr(), facts.data_ptr(), device,
        stream(device),
    )  # fmt: skip
    return cu_seqlens, indices, seqused_k, facts


def unpack_prechecked(packed: Tensor, indices: Tensor, positions: int, dtype: torch.dtype) -> Tensor:
    """A row whose index is no position is left out: raising would wait for the device."""
    padded_dtype = DTYPES.get(dtype)
    if padded_dtype is None:
        raise ValueError(f"unpack: dtype is {dtype}; it must be {DTYPE_NAMES}")
    packed_dtype = check_dtype("unpack", "packed", packed)
    device = check_rows("unpack", "packed", packed)
    tokens, hidden = packed.shape
    if (
        indices.dtype is not torch.int32
        or indices.ndim != 1
        or indices.shape[0] < tokens
        or not (indices.is_contiguous() and is_ours(indices) and indices.get_device() == device)
    ):
        raise ValueError(
            f"unpack: indices is {list(indices.shape)} {indices.dtype} on {indices.device}; it must be a contiguous "
            f"int32 vector of at least {tokens} entries, one for each row of packed, on its device"
        )
    if not 0 <= positions <= INT32_MAX:
        raise ValueError(f"unpack: positions is {positions}; it must lie between 0 and {INT32_MAX}")
    padded = torch.empty(positions, hidden, dtype=dtype, device=packed.device)
    on(device).unpack(
        packed.data_ptr(), padded.data_ptr(), indices.data_ptr(), packed.stride()[0], tokens, positions, hidden,
        packed_dtype, padded_dtype, device, stream(device),
    )  # fmt: skip
    return padded


def unpack(packed: Tensor, indices: Tensor, positions: int, dtype: torch.dtype) -> Tensor:
    padded = unpack_prechecked(packed, indices, positions, dtype)
    used = indices[: packed.shape[0]]
    check_indices("unpack", used, positions, f"it must lie within the {positions} positions")
    return padded


def position_ids(input_ids: Tensor, padding_idx: int) -> Tensor:
    itemsize = check_ids("position_ids", "input_ids", input_ids)
    batch, seqlen = input_ids.shape
    if not 0 <= padding_idx <= INT32_MAX - seqlen:
        raise ValueError(f"position_ids: padding_idx is {padding_idx}; it must not be negative, nor overflow int32")
    device = input_ids.get_device()
    out = torch.empty(batch, seqlen, dtype=torch.int32, device=input_ids.device)
    row_stride, column_stride = input_ids.stride()
    on(device).position_ids(
        address(input_ids), row_stride, column_stride, itemsize, batch, seqlen, padding_idx, out.data_ptr(), device,
        stream(device),
    )  # fmt: skip
    return out


def _addresses(buffers: PackedBuffers) -> list[int]:
    """Kept with them: they do not move."""
    addresses = list(map(Tensor.data_ptr, buffers))
    buffers.facts.clinfast_addresses = addresses  # type: ignore[attr-defined]
    return addresses


def pack_into(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    constants: PackInto,
    rows: int,
    notes: int,
    buffers: PackedBuffers,
) -> None:
    """One launch, two for a batch of thousands of positions. The engine's own inputs: their shapes and dtypes, and the
    sizes of the buffers, were looked at."""
    (batch, seqlen), device = input_ids.shape, input_ids.get_device()
    vocab_size, type_vocab_size, position_offset, padding_idx, keep_padding = constants
    mask = mask_bytes = mask_row = mask_column = types = types_bytes = types_row = types_column = room = 0
    if attention_mask is not None:
        if attention_mask.dtype not in MASK_BYTES:
            attention_mask = attention_mask != 0
        mask, mask_bytes = attention_mask.data_ptr(), MASK_BYTES[attention_mask.dtype]
        mask_row, mask_column = attention_mask.stride()
    if token_type_ids is not None:
        types, types_bytes = token_type_ids.data_ptr(), ID_BYTES[token_type_ids.dtype]
        types_row, types_column = token_type_ids.stride()
    kernels = on(device)
    if kernels.pack_into_counts_first(batch * seqlen):
        counts = torch.empty(2 * batch, dtype=torch.int32, device=input_ids.device)
        room = counts.data_ptr()
    addresses = getattr(buffers.facts, "clinfast_addresses", None)
    if addresses is None:
        addresses = _addresses(buffers)
    out_ids, out_types, out_positions, indices, cu_seqlens, seqused_k, facts = addresses
    ids_row, ids_column = input_ids.stride()
    kernels.pack_into(
        mask, input_ids.data_ptr(), types, mask_row, mask_column, ids_row, ids_column, types_row, types_column,
        mask_bytes, ID_BYTES[input_ids.dtype], types_bytes, batch, seqlen, vocab_size, type_vocab_size, keep_padding,
        cu_seqlens, indices, seqused_k, room, facts, out_ids, out_types, out_positions, rows, notes, position_offset,
        padding_idx or 0, padding_idx is not None, device, stream(device),
    )  # fmt: skip


IMPLEMENTATIONS = {
    "pack": pack,
    "pack.into": pack_into,
    "position_ids": position_ids,
    "unpack": unpack,
    "unpack.prechecked": unpack_prechecked,
}
