"""`pack.into`: a batch into buffers of a fixed address, in one launch while it fits the registers of one program."""

import triton
import triton.language as tl

from clinfast.triton_kernels.packing import lay_out, outside, store_facts_of


@triton.jit
def pack_into_kernel(
    ids_ptr,  # [batch, seqlen] int32 or int64, strides ids_row and ids_column
    mask_ptr,  # [batch, seqlen] bool or integer with strides of its own; not read unless has_mask
    types_ptr,  # like ids with strides of its own; not read unless has_types
    out_ids_ptr,  # [rows] int32, as are the next three
    out_types_ptr,
    positions_ptr,
    indices_ptr,
    cu_seqlens_ptr,  # [notes + 2] int32
    seqused_ptr,  # [notes + 1] int32
    facts_ptr,  # [6] int64
    batch,
    seqlen,
    rows,
    notes,
    vocab_size,
    type_vocab_size,
    position_offset,
    padding_idx,  # not looked at unless counts_positions
    has_mask,
    has_types,
    keep_padding,
    counts_positions,
    ids_row,
    ids_column,
    mask_row,
    mask_column,
    types_row,
    types_column,
    BLOCK_B: tl.constexpr,  # at least batch
    BLOCK_S: tl.constexpr,  # at least seqlen
    BLOCK_N: tl.constexpr,  # at least notes + 1
):
    """The whole batch in one program."""
    note, row, column, inside, ids, types, real, used, lengths, ends, at, index = lay_out(
        ids_ptr, mask_ptr, types_ptr, batch, seqlen, has_mask, has_types, keep_padding, ids_row, ids_column,
        mask_row, mask_column, types_row, types_column, BLOCK_B, BLOCK_S,
    )  # fmt: skip
    kept = inside & ((real != 0) | (keep_padding != 0))
    bad = outside(ids, vocab_size)
    bad_types = (has_types != 0) & outside(types, type_vocab_size)
    counts = (inside & (ids != padding_idx)).to(tl.int32)
    counted = tl.where(counts != 0, padding_idx + tl.cumsum(counts, 1), padding_idx)
    tl.store(indices_ptr + at, index, mask=kept)
    tl.store(out_ids_ptr + at, tl.where(bad, 0, ids).to(tl.int32), mask=kept)
    tl.store(out_types_ptr + at, tl.where(bad_types, 0, types).to(tl.int32), mask=kept)
    tl.store(positions_ptr + at, tl.where(counts_positions != 0, counted, column + position_offset), mask=kept)

    tokens = tl.sum(lengths, 0)
    tl.store(cu_seqlens_ptr, 0)
    tl.store(cu_seqlens_ptr + 1 + note, ends, mask=note < batch)
    tl.store(seqused_ptr + note, used, mask=note < batch)
    other = tl.arange(0, BLOCK_N)
    beyond = (other >= batch) & (other <= notes)
    tl.store(cu_seqlens_ptr + 1 + other, tl.where(other == notes, rows, tokens), mask=beyond)
    tl.store(seqused_ptr + other, 0, mask=beyond)
    store_facts_of(facts_ptr, batch, note, row, column, inside, real, used, lengths, index, bad, bad_types)
