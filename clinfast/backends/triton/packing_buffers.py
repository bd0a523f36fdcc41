"""`pack.into` on the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.triton import device
from clinfast.backends.triton.launch import Runner, runner
from clinfast.backends.triton.packing import scan, tile_of
from clinfast.ops.packing import PackedBuffers, PackInto
from clinfast.triton_kernels.variants import PACK_INTO_NOTES, PACK_REGISTERS

_runners: dict[tuple[tuple[int, int], torch.dtype, torch.dtype, torch.dtype, torch.device], Runner] = {}


def pack_into(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    constants: PackInto,
    rows: int,
    notes: int,
    buffers: PackedBuffers,
) -> None:
    """One launch. The engine's own inputs: their shapes and dtypes were looked at, and their device is current."""
    batch, seqlen = input_ids.shape
    # What is absent is passed as something that is there, and not read.
    mask = input_ids if attention_mask is None else attention_mask
    types = input_ids if token_type_ids is None else token_type_ids
    vocab_size, type_vocab_size, position_offset, padding_idx, keep_padding = constants
    tensors = (input_ids, mask, types, *buffers)
    numbers = (
        batch, seqlen, rows, notes, vocab_size, type_vocab_size, position_offset, padding_idx or 0,
        int(attention_mask is not None), int(token_type_ids is not None), int(keep_padding),
        int(padding_idx is not None), *input_ids.stride(), *mask.stride(), *types.stride(),
    )  # fmt: skip
    tile = tile_of(batch, seqlen)
    if tile is None or notes >= PACK_INTO_NOTES:
        scan(tensors, numbers)
        return
    args = (*tensors, *numbers)
    # What `launch` would look up by the types of all arguments: these are the only ones that vary.
    key = (tile, input_ids.dtype, mask.dtype, types.dtype, input_ids.device)
    run = _runners.get(key)
    if run is None:
        index = device.index_of(input_ids)
        run = runner("pack_into_kernel", index, args, (*tile, PACK_INTO_NOTES), registers=PACK_REGISTERS)
        _runners[key] = run
    run((1, 1, 1), args)


IMPLEMENTATIONS = {"pack.into": pack_into}
