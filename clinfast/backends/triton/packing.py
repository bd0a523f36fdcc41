"""`pack`, `unpack` and `position_ids` on the Triton kernels."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from clinfast.backends.triton import checks, cubins
from clinfast.backends.triton import device as gpu
from clinfast.backends.triton.launch import launch
from clinfast.triton_kernels.variants import (
    PACK_REGISTERS,
    PACK_TILES,
    POSITION_BLOCK,
    SCAN_HEAD,
    SCAN_TILES,
)

INT32_MAX = 2**31 - 1
ROWS, BLOCK = 8, 256
_states = threading.local()


def _mask(mask: Tensor, shape: torch.Size) -> None:
    if mask.shape != shape:
        raise ValueError(f"pack: attention_mask has shape {list(mask.shape)}; input_ids has {list(shape)}")
    checks.on_gpu("pack", "attention_mask", mask)
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(f"pack: attention_mask has dtype {mask.dtype}; it must be bool or an integer dtype")


def pack(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    vocab_size: int,
    type_vocab_size: int,
    keep_padding: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fetches no value to the host: the caller's transfer of `facts` is the first."""
    checks.ids("pack", "input_ids", input_ids)
    shape, device = input_ids.shape, input_ids.device
    batch, seqlen = shape
    if vocab_size < 0 or type_vocab_size < 0:
        raise ValueError(
            f"pack: vocab_size is {vocab_size} and type_vocab_size {type_vocab_size}; neither may be negative"
        )
    if batch * seqlen > INT32_MAX:
        raise ValueError(f"pack: input_ids has shape {list(shape)}; batch x seqlen must not exceed {INT32_MAX}")
    if attention_mask is not None:
        _mask(attention_mask, shape)
    if token_type_ids is not None:
        checks.ids("pack", "token_type_ids", token_type_ids, shape)
    cu_seqlens = torch.empty(batch + 1, dtype=torch.int32, device=device)
    indices = torch.empty(batch * seqlen, dtype=torch.int32, device=device)
    seqused_k = torch.empty(batch, dtype=torch.int32, device=device)
    facts = torch.empty(6, dtype=torch.int64, device=device)
    # What is absent is passed as something that is there, and not read.
    mask = input_ids if attention_mask is None else attention_mask
    types = input_ids if token_type_ids is None else token_type_ids
    has_mask, has_types = int(attention_mask is not None), int(token_type_ids is not None)
    flags = (has_mask, has_types, int(keep_padding))
    strides = (*input_ids.stride(), *mask.stride(), *types.stride())
    tile = tile_of(batch, seqlen)
    if tile is not None:
        launch(
            "pack_kernel", (1, 1, 1),
            (input_ids, mask, types, cu_seqlens, indices, seqused_k, facts, batch, seqlen, vocab_size, type_vocab_size,
             *flags, *strides),
            tile, registers=PACK_REGISTERS,
        )  # fmt: skip
    else:
        scan(
            (input_ids, mask, types, None, None, None, indices, cu_seqlens, seqused_k, facts),
            (batch, seqlen, 0, 0, vocab_size, type_vocab_size, 0, 0, *flags, 0, *strides),
        )  # fmt: skip
    return cu_seqlens, indices, seqused_k, facts


def scan(tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...]) -> None:
    """`pack_scan_kernel`, with what it takes before and after its state."""
    ids = tensors[0]
    assert ids is not None
    batch, seqlen = ids.shape
    tile = next((t for t in SCAN_TILES if seqlen <= t[1]), SCAN_TILES[-1])
    programs = max(1, checks.cdiv(batch, tile[0]))
    with gpu.on(ids):
        state = _state(ids, SCAN_HEAD + programs)
        launch("pack_scan_kernel", (programs, 1, 1), (*tensors, state, *numbers), tile, registers=PACK_REGISTERS)


def _state(like: Tensor, size: int) -> Tensor:
    """Zeros, which the kernel leaves as zeros. Launches that may run at the same time must not share it: there is one a
    thread and stream, and one a graph that the caller captures."""
    if gpu.capturing():
        return torch.zeros(size, dtype=torch.int64, device=like.device)
    index = gpu.index_of(like)
    key = (index, cubins.stream(index))
    held: dict[Any, Tensor] = _states.__dict__
    state = held.get(key)
    if state is None or state.shape[0] < size:
        state = held[key] = torch.zeros(max(1024, checks.power_of_two(size)), dtype=torch.int64, device=like.device)
    return state


def tile_of(batch: int, seqlen: int) -> tuple[int, int] | None:
    """The smallest tile that holds the batch, None where none does."""
    return next(((b, s) for b, s in PACK_TILES if batch <= b and seqlen <= s), None)


def _check_unpack(packed: Tensor, indices: Tensor, positions: int, dtype: torch.dtype) -> None:
    if dtype not in checks.FLOATS:
        raise ValueError(f"unpack: dtype is {dtype}; it must be {checks.FLOAT_NAMES}")
    checks.rows("unpack", "packed", packed)
    tokens = packed.shape[0]
    if (
        indices.dtype is not torch.int32
        or indices.dim() != 1
        or indices.shape[0] < tokens
        or not indices.is_contiguous()
        or indices.device != packed.device
    ):
        raise ValueError(
            f"unpack: indices is {list(indices.shape)} {indices.dtype} on {indices.device}; it must be a contiguous "
            f"int32 GPU vector of at least {tokens} entries, one for each row of packed"
        )
    if not 0 <= positions <= INT32_MAX:
        raise ValueError(f"unpack: positions is {positions}; it must lie between 0 and {INT32_MAX}")


def prechecked(packed: Tensor, indices: Tensor, positions: int, dtype: torch.dtype) -> Tensor:
    """For indices that `pack` made: ascending, or all positions once in any order."""
    _check_unpack(packed, indices, positions, dtype)
    tokens, hidden = packed.shape
    out = torch.empty((positions, hidden), dtype=dtype, device=packed.device)
    if not out.numel():
        return out
    if tokens == positions:
        _scatter(packed, indices, out)
    else:
        launch(
            "unpack_kernel", (checks.cdiv(positions, ROWS), checks.cdiv(hidden, BLOCK), 1),
            (packed, indices, out, tokens, positions, hidden, packed.stride(0), tokens.bit_length() + 1),
            (ROWS, BLOCK),
        )  # fmt: skip
    return out


def _scatter(packed: Tensor, indices: Tensor, out: Tensor) -> None:
    tokens, hidden = packed.shape
    if tokens and hidden:
        launch(
            "scatter_rows_kernel", (checks.cdiv(tokens, ROWS), checks.cdiv(hidden, BLOCK), 1),
            (packed, indices, out, tokens, out.shape[0], hidden, packed.stride(0)), (ROWS, BLOCK),
        )  # fmt: skip


def unpack(packed: Tensor, indices: Tensor, positions: int, dtype: torch.dtype) -> Tensor:
    """Any indices; waits for the device, to raise where one is outside."""
    _check_unpack(packed, indices, positions, dtype)
    used = indices[: packed.shape[0]]
    outside = ((used < 0) | (used >= positions)).nonzero()
    if outside.numel():
        bad = int(outside[0])
        raise IndexError(f"unpack: indices[{bad}] is {int(used[bad])}; it must lie within the {positions} positions")
    out = torch.zeros((positions, packed.shape[1]), dtype=dtype, device=packed.device)
    _scatter(packed, indices, out)
    return out


def position_ids(input_ids: Tensor, padding_idx: int) -> Tensor:
    checks.ids("position_ids", "input_ids", input_ids)
    batch, seqlen = input_ids.shape
    if not 0 <= padding_idx <= INT32_MAX - seqlen:
        raise ValueError(f"position_ids: padding_idx is {padding_idx}; it must not be negative, nor overflow int32")
    out = torch.empty((batch, seqlen), dtype=torch.int32, device=input_ids.device)
    if out.numel():
        launch(
            "position_ids_kernel", (batch, 1, 1), (input_ids, out, seqlen, padding_idx, *input_ids.stride()),
            (POSITION_BLOCK,),
        )  # fmt: skip
    return out


IMPLEMENTATIONS = {"pack": pack, "position_ids": position_ids, "unpack": unpack, "unpack.prechecked": prechecked}
