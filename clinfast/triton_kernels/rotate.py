"""`rotate`: rotary position embedding in place, by given places or by ranks in notes, which are found by bisection."""

import triton
import triton.language as tl


@triton.jit
def rotate_kernel(
    x_ptr,  # [tokens, heads, 2 * HALF], strides x_token and x_head
    cos_ptr,  # [positions, HALF] fp32
    sin_ptr,  # like cos
    cu_seqlens_ptr,  # [batch + 1] int32
    places_ptr,  # [tokens] int32, or None where they are ranks
    tokens,
    batch,
    positions,
    heads,
    x_token,
    x_head,
    steps,  # such that 2 ** steps > batch
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,  # heads a program
):
    """A token whose place is beyond the tables is left as it was."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < tokens
    if places_ptr is not None:
        place = tl.load(places_ptr + row, mask=there, other=0)
    else:
        # The first boundary beyond the token is its note's end.
        low = tl.zeros([ROWS], tl.int32)
        high = tl.zeros([ROWS], tl.int32) + batch
        for _ in range(steps):
            middle = (low + high) // 2
            open = low < high
            value = tl.load(cu_seqlens_ptr + middle + 1, mask=open, other=0)
            low = tl.where(open & (value <= row), middle + 1, low)
            high = tl.where(open & (value > row), middle, high)
        place = row - tl.load(cu_seqlens_ptr + low, mask=there, other=0)
    at = tl.abs(place)
    column = tl.arange(0, BLOCK)[None, :]
    mask = (there & (at < positions))[:, None] & (column < HALF)
    table = at.to(tl.int64)[:, None] * HALF + column
    c = tl.load(cos_ptr + table, mask=mask, other=1.0)
    s = tl.load(sin_ptr + table, mask=mask, other=0.0) * tl.where(place < 0, -1.0, 1.0)[:, None]
    x_ptr += row.to(tl.int64)[:, None] * x_token + column
    for i in range(0, HEADS):
        head = tl.program_id(1) * HEADS + i
        own = mask & (head < heads)
        first = x_ptr + head * x_head
        a = tl.load(first, mask=own, other=0.0).to(tl.float32)
        b = tl.load(first + HALF, mask=own, other=0.0).to(tl.float32)
        tl.store(first, (a * c - b * s).to(x_ptr.dtype.element_ty), mask=own)
        tl.store(first + HALF, (b * c + a * s).to(x_ptr.dtype.element_ty), mask=own)
