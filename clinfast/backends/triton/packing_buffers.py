"""`pack.into` on the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends import torch as fallbacks
from clinfast.backends.triton import device
from clinfast.backends.triton.launch import KernelUnavailable, Runner, runner
from clinfast.backends.triton.packing import _tile, pack
from clinfast.ops.packing import PackedBuffers, PackInto
from clinfast.triton_kernels.variants import PACK_INTO_NOTES, pack_warps

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
    """One launch for a batch that fits a tile; `pack` and what PyTorch has for a larger one, whose layers take longer.
    The engine's own inputs: their shapes and dtypes were looked at, and their device is current."""
    batch, seqlen = input_ids.shape
    tile = _tile(batch, seqlen)
    if tile is not None and notes < PACK_INTO_NOTES:
        # What is absent is passed as something that is there, and not read.
        mask = input_ids if attention_mask is None else attention_mask
        types = input_ids if token_type_ids is None else token_type_ids
        vocab_size, type_vocab_size, position_offset, padding_idx, keep_padding = constants
        args = (
            input_ids, mask, types, *buffers, batch, seqlen, rows, notes, vocab_size, type_vocab_size, position_offset,
            padding_idx or 0, int(attention_mask is not None), int(token_type_ids is not None), int(keep_padding),
            int(padding_idx is not None), *input_ids.stride(), *mask.stride(), *types.stride(),
        )  # fmt: skip
        # What `launch` would look up by the types of all arguments: these are the only ones that vary.
        key = (tile, input_ids.dtype, mask.dtype, types.dtype, input_ids.device)
        run = _runners.get(key)
        if run is None:
            index = device.index_of(input_ids)
            run = runner("pack_into_kernel", index, args, (*tile, PACK_INTO_NOTES), pack_warps(*tile))
            _runners[key] = run
        try:
            run((1, 1, 1), args)
            return
        except KernelUnavailable:
            pass  # `pack` below says so, once
    packed = pack(input_ids, attention_mask, token_type_ids, constants[0], constants[1], constants[4])
    fallbacks.place(input_ids, token_type_ids, packed, constants, rows, notes, buffers)


IMPLEMENTATIONS = {"pack.into": pack_into}
