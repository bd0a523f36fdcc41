"""`pack`, `unpack`, `position_ids`.

`pack` here is for a batch that fits the registers of one program (`variants.PACK_TILES`); `packing_scan` is for larger
ones.
"""

import triton
import triton.language as tl

NONE = tl.constexpr(2147483647)


@triton.jit
def outside(ids, size):
    return (ids < 0) | (ids >= size)


@triton.jit
def store_facts(facts_ptr, tokens, longest, empty, bad_id, bad_type, masked):
    """In the order of `ops.packing.FACTS`; NONE becomes -1."""
    tl.store(facts_ptr, tokens.to(tl.int64))
    tl.store(facts_ptr + 1, longest.to(tl.int64))
    tl.store(facts_ptr + 2, empty.to(tl.int64))
    tl.store(facts_ptr + 3, tl.where(bad_id == NONE, -1, bad_id).to(tl.int64))
    tl.store(facts_ptr + 4, tl.where(bad_type == NONE, -1, bad_type).to(tl.int64))
    tl.store(facts_ptr + 5, tl.where(masked == NONE, -1, masked).to(tl.int64))


@triton.jit
def lay_out(
    ids_ptr, mask_ptr, types_ptr, batch, seqlen, has_mask, has_types, keep_padding, ids_row, ids_column, mask_row,
    mask_column, types_row, types_column, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A batch in one program: its values, and where each position goes. [BLOCK_B] or [BLOCK_B, BLOCK_S]."""
    note = tl.arange(0, BLOCK_B)
    row, column = note[:, None], tl.arange(0, BLOCK_S)[None, :]
    inside = (row < batch) & (column < seqlen)
    row64, column64 = row.to(tl.int64), column.to(tl.int64)
    flags = tl.load(mask_ptr + row64 * mask_row + column64 * mask_column, mask=inside & (has_mask != 0), other=0)
    ids = tl.load(ids_ptr + row64 * ids_row + column64 * ids_column, mask=inside, other=0)
    types = tl.load(types_ptr + row64 * types_row + column64 * types_column, mask=inside & (has_types != 0), other=0)
    real = (inside & ((has_mask == 0) | (flags != 0))).to(tl.int32)
    used = tl.sum(real, 1)
    lengths = tl.where(keep_padding != 0, tl.where(note < batch, seqlen, 0), used)
    ends = tl.cumsum(lengths, 0)
    rank = tl.cumsum(real, 1)
    padded_rank = used[:, None] + (column + 1 - rank)
    at = (ends - lengths)[:, None] + tl.where(real != 0, rank, padded_rank) - 1
    return note, row, column, inside, ids, types, real, used, lengths, ends, at, row * seqlen + column


@triton.jit
def store_facts_of(
    facts_ptr, batch, note, row, column, inside, real, used, lengths, index, bad_ids, bad_types
):  # fmt: skip
    """The facts of a batch that `lay_out` read."""
    bad_id = tl.min(tl.min(tl.where(inside & bad_ids, index, NONE), 1), 0)
    bad_type = tl.min(tl.min(tl.where(inside & bad_types, index, NONE), 1), 0)
    masked = tl.min(tl.min(tl.where(inside & (column == 0) & (real == 0), row, NONE), 1), 0)
    empty = tl.sum(((used == 0) & (note < batch)).to(tl.int32), 0)
    store_facts(facts_ptr, tl.sum(lengths, 0), tl.max(lengths, 0), empty, bad_id, bad_type, masked)


@triton.jit
def pack_kernel(
    ids_ptr,  # [batch, seqlen] int32 or int64, strides ids_row and ids_column
    mask_ptr,  # [batch, seqlen] bool or integer with strides of its own; not read unless has_mask
    types_ptr,  # like ids with strides of its own; not read unless has_types
    cu_seqlens_ptr,  # [batch + 1] int32
    indices_ptr,  # [batch * seqlen] int32
    seqused_ptr,  # [batch] int32
    facts_ptr,  # [6] int64
    batch,
    seqlen,
    vocab_size,
    type_vocab_size,
    has_mask,
    has_types,
    keep_padding,
    ids_row,
    ids_column,
    mask_row,
    mask_column,
    types_row,
    types_column,
    BLOCK_B: tl.constexpr,  # at least batch
    BLOCK_S: tl.constexpr,  # at least seqlen
):
    """The whole batch in one program."""
    note, row, column, inside, ids, types, real, used, lengths, ends, at, index = lay_out(
        ids_ptr, mask_ptr, types_ptr, batch, seqlen, has_mask, has_types, keep_padding, ids_row, ids_column,
        mask_row, mask_column, types_row, types_column, BLOCK_B, BLOCK_S,
    )  # fmt: skip
    tl.store(indices_ptr + at, index, mask=inside & ((real != 0) | (keep_padding != 0)))
    tl.store(cu_seqlens_ptr, 0)
    tl.store(cu_seqlens_ptr + 1 + note, ends, mask=note < batch)
    tl.store(seqused_ptr + note, used, mask=note < batch)
    bad_types = (has_types != 0) & outside(types, type_vocab_size)
    store_facts_of(
        facts_ptr, batch, note, row, column, inside, real, used, lengths, index, outside(ids, vocab_size), bad_types
    )


@triton.jit
def position_ids_kernel(
    ids_ptr,  # [batch, seqlen] int32 or int64, strides ids_row and ids_column
    out_ptr,  # [batch, seqlen] int32, contiguous
    seqlen,
    padding_idx,
    ids_row,
    ids_column,
    BLOCK: tl.constexpr,
):
    note = tl.program_id(0).to(tl.int64)
    ids_ptr += note * ids_row
    out_ptr += note * seqlen
    seen = padding_idx
    for start in range(0, seqlen, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < seqlen
        ids = tl.load(ids_ptr + column.to(tl.int64) * ids_column, mask=inside, other=0)
        counts = (inside & (ids != padding_idx)).to(tl.int32)
        position = tl.where(counts != 0, seen + tl.cumsum(counts, 0), padding_idx)
        tl.store(out_ptr + column, position, mask=inside)
        seen += tl.sum(counts, 0)


@triton.jit
def unpack_kernel(
    packed_ptr,  # [tokens, hidden], row stride packed_row
    indices_ptr,  # [tokens] int32, ascending
    out_ptr,  # [positions, hidden], contiguous
    tokens,
    positions,
    hidden,
    packed_row,
    steps,  # such that 2 ** steps > tokens
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every padded row: finds its packed row by bisection, or is zero. Writes no row twice and none outside."""
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    low = tl.zeros([ROWS], tl.int32)
    high = tl.zeros([ROWS], tl.int32) + tokens
    for _ in range(steps):
        middle = (low + high) // 2
        open = low < high
        value = tl.load(indices_ptr + middle, mask=open, other=0)
        low = tl.where(open & (value < position), middle + 1, low)
        high = tl.where(open & (value >= position), middle, high)
    found = tl.load(indices_ptr + low, mask=low < tokens, other=-1) == position
    mask = found[:, None] & (column < hidden)
    x = tl.load(packed_ptr + low.to(tl.int64)[:, None] * packed_row + column, mask=mask, other=0.0)
    at = position.to(tl.int64)[:, None] * hidden + column
    tl.store(
        out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=(position < positions)[:, None] & (column < hidden)
    )


@triton.jit
def scatter_rows_kernel(
    packed_ptr,  # [tokens, hidden], row stride packed_row
    indices_ptr,  # [tokens] int32, distinct, in any order
    out_ptr,  # [positions, hidden], contiguous; other rows are not touched
    tokens,
    positions,
    hidden,
    packed_row,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    index = tl.load(indices_ptr + token, mask=token < tokens, other=-1)
    mask = ((index >= 0) & (index < positions))[:, None] & (column < hidden)
    x = tl.load(packed_ptr + token.to(tl.int64)[:, None] * packed_row + column, mask=mask, other=0.0)
    tl.store(out_ptr + index.to(tl.int64)[:, None] * hidden + column, x.to(out_ptr.dtype.element_ty), mask=mask)
