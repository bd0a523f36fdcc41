"""`pooling`: each note's first row, mean or maximum, for all notes in one launch."""

import triton
import triton.language as tl


@triton.jit
def pooling_kernel(
    x_ptr,  # [tokens, hidden], row stride x_row
    cu_seqlens_ptr,  # [batch + 1] int32
    out_ptr,  # [batch, hidden], contiguous
    tokens,
    hidden,
    x_row,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,  # taken at a time; a note's rows are added in this grouping wherever the note lies
    BLOCK: tl.constexpr,
):
    note = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    begin = tl.maximum(tl.load(cu_seqlens_ptr + note), 0)
    end = tl.minimum(tl.load(cu_seqlens_ptr + note + 1), tokens)
    x_ptr += begin.to(tl.int64) * x_row
    count = tl.maximum(end - begin, 0)
    if KIND == "first_token":
        y = tl.load(x_ptr + column, mask=inside & (count > 0), other=0.0).to(tl.float32)
    else:
        y = tl.full([BLOCK], float("-inf") if KIND == "max" else 0.0, tl.float32)
        rows = tl.arange(0, ROWS)
        for start in range(0, count, ROWS):
            at = (start + rows).to(tl.int64)[:, None]
            mask = (at < count) & inside[None, :]
            part = tl.load(x_ptr + at * x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
            if KIND == "max":
                part = tl.where(at < count, part, float("-inf"))
                # tl.max passes over NaN; stock does not.
                top = tl.where(tl.max((part != part).to(tl.int32), 0) > 0, float("nan"), tl.max(part, 0))
                y = tl.where((y != y) | (top != top), float("nan"), tl.maximum(y, top))
            else:
                y += tl.sum(part, 0)
        y = y if KIND == "max" else y / tl.maximum(count, 1)
        y = tl.where(count > 0, y, 0.0)
    tl.store(out_ptr + note * hidden + column, y.to(out_ptr.dtype.element_ty), mask=inside)
