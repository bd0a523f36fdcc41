"""`pack` and `pack.into` for a batch of any size, in one launch: each program takes a few notes, and learns how many
tokens stand before them by decoupled look-back (Merrill and Garland, NVIDIA technical report NVR-2016-002).

A program's turn is when it started, so that it waits only for programs that run already. The last one to finish writes
the facts and leaves the state as it was found, all zeros: no launch resets it, nor does a graph that is replayed.
"""

import triton
import triton.language as tl

from clinfast.triton_kernels.packing import NONE, outside, store_facts

# State, in int64: turns given, programs done, longest note, empty notes; NONE minus the first bad id, bad type and
# masked note; then a word a turn: four times its tokens + 1, or four times all tokens up to it + 2.
HEAD = tl.constexpr(8)
# Words looked at together: one a thread of four warps, since copies in other threads could see other values.
WINDOW = tl.constexpr(128)


@triton.jit
def _tokens_before(words_ptr, turn, own):
    """How many tokens the earlier turns have; publishes `own` for the later ones."""
    lanes = tl.arange(0, WINDOW)
    tl.atomic_xchg(words_ptr + turn, own * 4 + tl.where(turn == 0, 2, 1), sem="relaxed")
    before = own * 0
    end = turn
    searching = turn
    while searching > 0:
        other = end - 1 - lanes
        word = tl.load(words_ptr + other, mask=other >= 0, other=2, volatile=True)
        nearest = tl.min(tl.where((word & 3) == 2, lanes, WINDOW), 0)
        counts = lanes <= nearest
        if tl.max((counts & ((word & 3) == 0)).to(tl.int32), 0) == 0:
            before += tl.sum(tl.where(counts, word >> 2, 0), 0)
            end -= WINDOW
            searching = tl.where(nearest < WINDOW, 0, 1)
    if turn > 0:
        tl.atomic_xchg(words_ptr + turn, (before + own) * 4 + 2, sem="relaxed")
    return before.to(tl.int32)


@triton.jit
def _load(ptr, row, column, row_stride, column_stride, mask):
    return tl.load(ptr + row[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride, mask=mask, other=0)


@triton.jit
def pack_scan_kernel(
    ids_ptr,  # [batch, seqlen] int32 or int64, strides ids_row and ids_column
    mask_ptr,  # [batch, seqlen] bool or integer with strides of its own; not read unless has_mask
    types_ptr,  # like ids with strides of its own; not read unless has_types
    out_ids_ptr,  # [rows] int32, as are the next two; or None, all three, for `pack`
    out_types_ptr,
    positions_ptr,
    indices_ptr,  # [batch * seqlen] int32; [rows] for `pack.into`
    cu_seqlens_ptr,  # [batch + 1] int32; [notes + 2] for `pack.into`
    seqused_ptr,  # [batch] int32; [notes + 1] for `pack.into`
    facts_ptr,  # [6] int64
    state_ptr,  # [HEAD + programs] int64, zeros before and after
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
    BLOCK_B: tl.constexpr,  # notes a program
    BLOCK_S: tl.constexpr,  # columns at a time
):
    turn = tl.atomic_add(state_ptr, 1, sem="relaxed").to(tl.int32)
    note = turn * BLOCK_B + tl.arange(0, BLOCK_B)
    exists = note < batch
    row = tl.where(exists, note, 0)
    row64 = row.to(tl.int64)

    used = tl.zeros([BLOCK_B], tl.int32)
    bad_id, bad_type, masked = NONE, NONE, NONE
    for start in range(0, seqlen, BLOCK_S):
        column = start + tl.arange(0, BLOCK_S)
        inside = exists[:, None] & (column < seqlen)[None, :]
        flags = _load(mask_ptr, row64, column, mask_row, mask_column, inside & (has_mask != 0))
        ids = _load(ids_ptr, row64, column, ids_row, ids_column, inside)
        types = _load(types_ptr, row64, column, types_row, types_column, inside & (has_types != 0))
        real = inside & ((has_mask == 0) | (flags != 0))
        index = row[:, None] * seqlen + column[None, :]
        used += tl.sum(real.to(tl.int32), 1)
        wrong = inside & outside(ids, vocab_size)
        bad_id = tl.minimum(bad_id, tl.min(tl.min(tl.where(wrong, index, NONE), 1), 0))
        wrong = inside & (has_types != 0) & outside(types, type_vocab_size)
        bad_type = tl.minimum(bad_type, tl.min(tl.min(tl.where(wrong, index, NONE), 1), 0))
        first = inside & (column == 0)[None, :] & ~real
        masked = tl.minimum(masked, tl.min(tl.min(tl.where(first, row[:, None], NONE), 1), 0))
    lengths = tl.where(keep_padding != 0, tl.where(exists, seqlen, 0), used)

    words_ptr = state_ptr + HEAD
    before = _tokens_before(words_ptr, turn, tl.sum(lengths, 0).to(tl.int64))
    ends = before + tl.cumsum(lengths, 0)
    begins = ends - lengths
    if turn == 0:
        tl.store(cu_seqlens_ptr, 0)
    tl.store(cu_seqlens_ptr + 1 + note, ends, mask=exists)
    tl.store(seqused_ptr + note, used, mask=exists)

    seen = tl.zeros([BLOCK_B], tl.int32)
    counted = tl.zeros([BLOCK_B], tl.int32)
    for start in range(0, seqlen, BLOCK_S):
        column = start + tl.arange(0, BLOCK_S)
        inside = exists[:, None] & (column < seqlen)[None, :]
        flags = _load(mask_ptr, row64, column, mask_row, mask_column, inside & (has_mask != 0))
        real = (inside & ((has_mask == 0) | (flags != 0))).to(tl.int32)
        rank = seen[:, None] + tl.cumsum(real, 1)
        padded_rank = used[:, None] + (column + 1)[None, :] - rank
        at = begins[:, None] + tl.where(real != 0, rank, padded_rank) - 1
        kept = inside & ((real != 0) | (keep_padding != 0))
        tl.store(indices_ptr + at, row[:, None] * seqlen + column[None, :], mask=kept)
        if out_ids_ptr is not None:
            ids = _load(ids_ptr, row64, column, ids_row, ids_column, inside)
            types = _load(types_ptr, row64, column, types_row, types_column, inside & (has_types != 0))
            tl.store(out_ids_ptr + at, tl.where(outside(ids, vocab_size), 0, ids).to(tl.int32), mask=kept)
            types = tl.where(outside(types, type_vocab_size), 0, types).to(tl.int32)
            tl.store(out_types_ptr + at, types, mask=kept)
            counts = (inside & (ids != padding_idx)).to(tl.int32)
            place = tl.where(counts != 0, padding_idx + counted[:, None] + tl.cumsum(counts, 1), padding_idx)
            place = tl.where(counts_positions != 0, place, column[None, :] + position_offset)
            tl.store(positions_ptr + at, place, mask=kept)
            counted += tl.sum(counts, 1)
        seen += tl.sum(real, 1)

    tl.atomic_max(state_ptr + 2, tl.max(lengths, 0).to(tl.int64), sem="relaxed")
    empty = tl.sum((exists & (used == 0)).to(tl.int64), 0)
    if empty > 0:
        tl.atomic_add(state_ptr + 3, empty, sem="relaxed")
    if bad_id != NONE:
        tl.atomic_max(state_ptr + 4, (-bad_id + NONE).to(tl.int64), sem="relaxed")
    if bad_type != NONE:
        tl.atomic_max(state_ptr + 5, (-bad_type + NONE).to(tl.int64), sem="relaxed")
    if masked != NONE:
        tl.atomic_max(state_ptr + 6, (-masked + NONE).to(tl.int64), sem="relaxed")
    programs = tl.num_programs(0)
    if tl.atomic_add(state_ptr + 1, 1, sem="acq_rel") == programs - 1:
        tokens = tl.load(words_ptr + programs - 1, volatile=True) >> 2
        longest, without = tl.load(state_ptr + 2, volatile=True), tl.load(state_ptr + 3, volatile=True)
        first_id, first_type = tl.load(state_ptr + 4, volatile=True), tl.load(state_ptr + 5, volatile=True)
        first_masked = tl.load(state_ptr + 6, volatile=True)
        store_facts(
            facts_ptr, tokens, longest, without, -first_id + NONE, -first_type + NONE, -first_masked + NONE
        )
        # All threads have read what the stores below wipe out.
        tl.debug_barrier()
        lanes = tl.arange(0, WINDOW)
        for start in range(0, programs, WINDOW):
            tl.store(words_ptr + start + lanes, tl.zeros([WINDOW], tl.int64), mask=start + lanes < programs)
        tl.store(state_ptr + tl.arange(0, HEAD), tl.zeros([HEAD], tl.int64))
        if out_ids_ptr is not None:
            for start in range(batch, notes + 1, WINDOW):
                other = start + lanes
                bound = tl.where(other == notes, rows, tokens.to(tl.int32))
                tl.store(cu_seqlens_ptr + 1 + other, bound, mask=other <= notes)
                tl.store(seqused_ptr + other, tl.zeros([WINDOW], tl.int32), mask=other <= notes)
