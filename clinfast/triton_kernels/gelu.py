"""`gelu`: bias + GELU; the activations that `linear` ends in."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tail_log2_bf16(t):
    """log2 Phi(-t) on [0, 13.6], a Lawson fit: relative error of 2**this 6.3e-4, where bf16 rounds to 2e-3."""
    q = -2.88257016e-07 * t + 1.64853915e-05
    q = q * t - 3.96365201e-04
    q = q * t + 5.27622773e-03
    q = q * t - 4.36678265e-02
    q = q * t - 4.74367393e-01
    q = q * t - 1.14193022
    return q * t - 1.00089448


@triton.jit
def _tail_log2_fp16(t):
    """log2 Phi(-t) on [0, 5.8], below which fp16 has nothing: relative error of 2**this 3.8e-5, rounding 2.4e-4."""
    q = 2.42290637e-05 * t - 6.31129981e-04
    q = q * t + 7.31600382e-03
    q = q * t - 5.15159674e-02
    q = q * t - 4.60866033e-01
    q = q * t - 1.15035448
    return q * t - 1.00005190


@triton.jit
def _scaled_tail_fp32(t):
    """t Phi(-t) = t exp(-t^2 / 2) erfcx(t / sqrt 2) / 2; (t + 4) times the last factor is a polynomial in
    (t - 4) / (t + 4), a Lawson fit on [0, 14.6] to 9e-9."""
    inverse = 1.0 / (t + 4.0)
    u = 1.0 - 8.0 * inverse
    p = -1.32433415e-4 * u + 1.78371367e-4
    p = p * u + 1.5695896e-3
    p = p * u - 3.51207796e-3
    p = p * u - 7.52500352e-3
    p = p * u + 6.04037642e-2
    p = p * u - 1.86523482e-1
    p = p * u + 3.87136906e-1
    p = p * u - 6.07896566e-1
    p = p * u + 7.55285144e-1
    return tl.exp2(t * t * (-0.5 * LOG2E)) * (t * inverse) * p


@triton.jit
def gelu_erf(x, DTYPE: tl.constexpr):
    """x Phi(x) of fp32 lanes, to within the rounding of DTYPE: relu(x) - t Phi(-t) with t = |x|, so that nothing
    cancels on the negative side. NaN comes through, gelu(-inf) is 0."""
    if tl.float32 == DTYPE:
        t = tl.minimum(tl.abs(x), 14.6)
        tail = _scaled_tail_fp32(t)
    elif tl.float16 == DTYPE:
        t = tl.minimum(tl.abs(x), 5.8)
        tail = t * tl.exp2(_tail_log2_fp16(t))
    else:
        t = tl.minimum(tl.abs(x), 13.6)
        tail = t * tl.exp2(_tail_log2_bf16(t))
    return tl.where(x != x, x, tl.maximum(x, 0.0) - tail)


@triton.jit
def gelu_tanh(x):
    """x (1 + tanh y) / 2 with y = sqrt(2 / pi) (x + 0.044715 x^3), as relu(x) - t e / (1 + e) with e = exp(-2 |y|)."""
    t = tl.minimum(tl.abs(x), 11.0)
    e = tl.exp2(t * (t * t * (-2.0 * LOG2E * 0.7978845608 * 0.044715) - 2.0 * LOG2E * 0.7978845608))
    return tl.where(x != x, x, tl.maximum(x, 0.0) - t * e / (1.0 + e))


@triton.jit
def tanh(x):
    """(1 - e) / (1 + e) with e = exp(-2 |x|); an odd series where that cancels."""
    t = tl.abs(x)
    e = tl.exp2(t * (-2.0 * LOG2E))
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(t < 0.2, series, tl.where(x < 0.0, -far, far))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """One of `ops.linear.ACTIVATIONS`, of fp32 lanes that are to be rounded to DTYPE."""
    if ACTIVATION == "gelu":
        x = gelu_erf(x, DTYPE)
    elif ACTIVATION == "gelu_tanh":
        x = gelu_tanh(x)
    elif ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "tanh":
        x = tanh(x)
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp2(x * -LOG2E))
    return x


@triton.jit
def gelu_kernel(
    x_ptr,  # [rows, hidden], row stride x_row
    bias_ptr,  # [hidden] fp32, or None
    out_ptr,  # [rows, hidden], row stride out_row
    rows,
    hidden,
    x_row,
    out_row,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row < rows) & (column < hidden)
    x = tl.load(x_ptr + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, mask=column < hidden, other=0.0)
    y = activate(x, ACTIVATION, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_row + column, y.to(out_ptr.dtype.element_ty), mask=mask)
