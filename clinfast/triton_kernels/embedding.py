"""`embedding`: word + position + token type rows, then LayerNorm or not, straight from the packed tokens' ids."""

import triton
import triton.language as tl

from clinfast.triton_kernels.layer_norm import normalise


@triton.jit
def embedding_kernel(
    ids_ptr,  # [batch, seqlen] int32 or int64, strides ids_row and ids_column
    types_ptr,  # like ids with strides of its own; not read unless has_types
    indices_ptr,  # [tokens] int32, row * seqlen + column of each packed token
    positions_ptr,  # [batch * seqlen] int32; not read unless has_positions
    word_ptr,  # [vocab_size, hidden], row stride word_row
    position_ptr,  # [max_positions, hidden], row stride position_row
    type_ptr,  # [type_vocab_size, hidden], row stride type_row; not read if type_vocab_size is 0
    weight_ptr,  # [hidden] fp32; or None, as shift_ptr, where no LayerNorm follows
    shift_ptr,  # [hidden] fp32
    out_ptr,  # [tokens, hidden], contiguous
    bad_ptr,  # [1] int32: least packed token that reads outside a table; or None
    tokens,
    batch,
    seqlen,
    hidden,
    vocab_size,
    max_positions,
    type_vocab_size,
    position_offset,
    has_types,
    has_positions,
    ids_row,
    ids_column,
    types_row,
    types_column,
    word_row,
    position_row,
    type_row,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = token < tokens
    index = tl.load(indices_ptr + token, mask=real, other=0)
    good = real & (index >= 0) & (index < batch * seqlen)
    index = tl.where(good, index, 0)
    note, column = (index // seqlen).to(tl.int64), (index % seqlen).to(tl.int64)
    word = tl.load(ids_ptr + note * ids_row + column * ids_column, mask=good, other=0).to(tl.int64)
    at_type = note * types_row + column * types_column
    type = tl.load(types_ptr + at_type, mask=good & (has_types != 0), other=0).to(tl.int64)
    position = tl.load(positions_ptr + index, mask=good & (has_positions != 0), other=0).to(tl.int64)
    position = tl.where(has_positions != 0, position, column + position_offset)
    good &= (word >= 0) & (word < vocab_size) & (position >= 0) & (position < max_positions)
    good &= (type_vocab_size == 0) | ((type >= 0) & (type < type_vocab_size))

    h = tl.arange(0, BLOCK)[None, :]
    inside = h < hidden
    mask = good[:, None] & inside
    x = tl.load(word_ptr + word[:, None] * word_row + h, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(type_ptr + type[:, None] * type_row + h, mask=mask & (type_vocab_size != 0), other=0.0).to(tl.float32)
    x += tl.load(position_ptr + position[:, None] * position_row + h, mask=mask, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + h, mask=inside, other=0.0)
        shift = tl.load(shift_ptr + h, mask=inside, other=0.0)
        x = normalise(x, inside, hidden, eps) * weight + shift
    # Nothing was read for a bad token, and what comes out must not look like a result.
    y = tl.where(good[:, None], x, float("nan"))
    at = token.to(tl.int64)[:, None] * hidden + h
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=real[:, None] & inside)
    if bad_ptr is not None:
        tl.atomic_min(bad_ptr, tl.min(tl.where(real & ~good, token, 2147483647), 0))
