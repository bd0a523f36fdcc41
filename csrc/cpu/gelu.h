// GELU of fp32 lanes, shared by the kernels that end in one. With t = |x|, both forms are relu(x) - t * g(t), where
// g is the Gaussian tail (or its tanh approximation), computed to a small relative error and never as 1 - something:
// nothing cancels on the negative tail, and a NaN comes through.
#pragma once

#include "vec.h"

namespace clinfast {
namespace CLINFAST_ISA {

// factor * exp(n ln 2 + r). The power of two comes last: the exponential alone may be subnormal.
static inline Vec scaled_exp(Vec n, Vec r, Vec factor) { return scale_by_power_of_two(exp_polynomial(r) * factor, n); }

// t * t - square, which rounding took from square.
static inline Vec square_residue(Vec t, Vec square) {
#if defined(CLINFAST_AVX512) || defined(CLINFAST_AVX2)
  return fma(t, t, Vec::zero() - square);
#else
  // Without a fused multiply-add: Veltkamp's split of t into halves of 12 bits.
  Vec c = t * Vec::set(4097.0f), high = c - (c - t), low = t - high;
  return ((high * high - square) + (high + high) * low) + low * low;
#endif
}

// x Phi(x). Phi(-t) = exp(-t^2 / 2) * erfcx(t / sqrt 2) / 2; (t + 4) times the second factor is a polynomial in
// (t - 4) / (t + 4), a Lawson fit on [0, 14.6] to 9e-9; beyond, the result is below the least fp32. Relative error of
// the whole, swept: 4.4e-7 for positive x, 5.4e-7 for negative x.
static inline Vec gelu_erf(Vec x) {
  Vec t = min(Vec::set(14.6f), abs(x));
  Vec square = t * t;
  Vec n = round(square * Vec::set(-0.5f * 1.44269504088896341f));
  Vec r = fma(n, Vec::set(-0.693145751953125f), square * Vec::set(-0.5f));
  r = fma(n, Vec::set(-1.42860682030941723e-6f), r);
  r = fma(square_residue(t, square), Vec::set(-0.5f), r);
  Vec inverse = Vec::set(1.0f) / (t + Vec::set(4.0f));
  Vec u = fma(inverse, Vec::set(-8.0f), Vec::set(1.0f));
  Vec p = Vec::set(-1.32433415e-4f);
  p = fma(p, u, Vec::set(1.78371367e-4f));
  p = fma(p, u, Vec::set(1.5695896e-3f));
  p = fma(p, u, Vec::set(-3.51207796e-3f));
  p = fma(p, u, Vec::set(-7.52500352e-3f));
  p = fma(p, u, Vec::set(6.04037642e-2f));
  p = fma(p, u, Vec::set(-1.86523482e-1f));
  p = fma(p, u, Vec::set(3.87136906e-1f));
  p = fma(p, u, Vec::set(-6.07896566e-1f));
  p = fma(p, u, Vec::set(7.55285144e-1f));
  return max(x, Vec::zero()) - scaled_exp(n, r, (t * inverse) * p);
}

// x Phi(x) to a relative error of 2.5e-4 (bf16 rounds to 2e-3): log2 Phi(-t) as a polynomial, a Lawson fit on
// [0, 13.6], and 2^f as a cubic. No division and half the instructions of the exact one.
static inline Vec gelu_erf_for_bf16(Vec x) {
  Vec t = min(Vec::set(13.6f), abs(x));
  Vec q = Vec::set(2.44908822e-8f);
  q = fma(q, t, Vec::set(-1.59885394e-6f));
  q = fma(q, t, Vec::set(4.49013933e-5f));
  q = fma(q, t, Vec::set(-7.16100563e-4f));
  q = fma(q, t, Vec::set(7.26072211e-3f));
  q = fma(q, t, Vec::set(-5.03196716e-2f));
  q = fma(q, t, Vec::set(-4.63495344e-1f));
  q = fma(q, t, Vec::set(-1.14864159f));
  q = fma(q, t, Vec::set(-1.0002197f));
  Vec n = round(q), f = q - n;
  Vec p = Vec::set(5.51716127e-2f);
  p = fma(p, f, Vec::set(2.42611125e-1f));
  p = fma(p, f, Vec::set(6.93260968e-1f));
  p = fma(p, f, Vec::set(9.99928057e-1f));
  return max(x, Vec::zero()) - scale_by_power_of_two(p * t, n);
}

// x (1 + tanh y) / 2 with y = sqrt(2 / pi) (x + 0.044715 x^3), as relu(x) - t e / (1 + e) with e = exp(-2 |y|).
static inline Vec gelu_tanh(Vec x) {
  Vec t = min(Vec::set(11.0f), abs(x));
  Vec y2 = t * fma(t * t, Vec::set(-2.0f * 0.7978845608f * 0.044715f), Vec::set(-2.0f * 0.7978845608f));
  Vec n = round(y2 * Vec::set(1.44269504088896341f));
  Vec r = fma(n, Vec::set(-0.693145751953125f), y2);
  r = fma(n, Vec::set(-1.42860682030941723e-6f), r);
  Vec e = scaled_exp(n, r, Vec::set(1.0f));
  return max(x, Vec::zero()) - t * e / (Vec::set(1.0f) + e);
}

// GELU to within the rounding of T.
template <typename T, GeluKind kind> static inline Vec gelu_of(Vec x) {
  if (kind == GeluKind::tanh) return gelu_tanh(x);
  return sizeof(T) == 2 ? gelu_erf_for_bf16(x) : gelu_erf(x);
}

}  // namespace CLINFAST_ISA
}  // namespace clinfast
