// GELU of a float, to within the rounding of the type that the result is stored in. With t = |x|, every form is
// relu(x) - t * g(t), where g is the Gaussian tail (or its tanh approximation) to a small relative error: nothing
// cancels on the negative side, and a NaN comes through. Coefficients: Lawson fits. The figures are of total relative
// error with an exact 2^x; the hardware's adds 2^-22.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace clinfast {
namespace cuda {

// 2^(high + low), where low is small
__device__ __forceinline__ float exp2_of_sum(float high, float low) {
  return exp2_approximate(high) * fmaf(low, 0.6931471805599453f, 1.0f);
}

// The tail as exp(-t^2 / 2) * erfcx(t / sqrt 2) / 2; (t + 4) times the second factor is a polynomial in
// (t - 4) / (t + 4) on [0, 14.6]; beyond, the result is below the least fp32.
__device__ __forceinline__ float gelu_erf_fp32(float x) {
  float t = fminf(fabsf(x), 14.6f);
  float square = t * t, residue = fmaf(t, t, -square);
  constexpr float factor = -0.72134752f, rest = -9.629815e-9f;  // -log2(e) / 2
  float high = square * factor;
  float low = fmaf(square, factor, -high) + fmaf(square, rest, residue * factor);
  float inverse = 1.0f / (t + 4.0f);
  float u = fmaf(inverse, -8.0f, 1.0f);
  float p = -1.32433415e-4f;
  p = fmaf(p, u, 1.78371367e-4f);
  p = fmaf(p, u, 1.5695896e-3f);
  p = fmaf(p, u, -3.51207796e-3f);
  p = fmaf(p, u, -7.52500352e-3f);
  p = fmaf(p, u, 6.04037642e-2f);
  p = fmaf(p, u, -1.86523482e-1f);
  p = fmaf(p, u, 3.87136906e-1f);
  p = fmaf(p, u, -6.07896566e-1f);
  p = fmaf(p, u, 7.55285144e-1f);
  float result = fmaxf(x, 0.0f) - exp2_of_sum(high, low) * ((t * inverse) * p);
  return x != x ? x : result;
}

// log2 of the tail as a polynomial on [0, 6]: 5.5e-6, and fp16 rounds to 4.9e-4. Beyond, fp16 has 0.
__device__ __forceinline__ float gelu_erf_fp16(float x) {
  float t = fminf(fabsf(x), 6.0f);
  float q = -1.8348118828726001e-06f;
  q = fmaf(q, t, 6.159830081742257e-05f);
  q = fmaf(q, t, -0.0009305249550379813f);
  q = fmaf(q, t, 0.008507891558110714f);
  q = fmaf(q, t, -0.05396007001399994f);
  q = fmaf(q, t, -0.4584643840789795f);
  q = fmaf(q, t, -1.1512510776519775f);
  q = fmaf(q, t, -0.9999952912330627f);
  float result = fmaf(-t, exp2_approximate(q), fmaxf(x, 0.0f));
  return x != x ? x : result;
}

// The same on [0, 13.6]: 1.7e-4, and bf16 rounds to 3.9e-3.
__device__ __forceinline__ float gelu_erf_bf16(float x) {
  float t = fminf(fabsf(x), 13.6f);
  float q = 2.449087688205509e-08f;
  q = fmaf(q, t, -1.5988537143130088e-06f);
  q = fmaf(q, t, 4.490138962864876e-05f);
  q = fmaf(q, t, -0.0007161005050875247f);
  q = fmaf(q, t, 0.007260721642524004f);
  q = fmaf(q, t, -0.05031966790556908f);
  q = fmaf(q, t, -0.4634953439235687f);
  q = fmaf(q, t, -1.148641586303711f);
  q = fmaf(q, t, -1.000219702720642f);
  float result = fmaf(-t, exp2_approximate(q), fmaxf(x, 0.0f));
  return x != x ? x : result;
}

// x (1 + tanh y) / 2 with y = sqrt(2 / pi) (x + 0.044715 x^3), as relu(x) - t e / (1 + e) with e = exp(-2 |y|).
__device__ __forceinline__ float gelu_tanh(float x) {
  float t = fminf(fabsf(x), 11.0f);
  constexpr float linear = -2.0f * 0.7978845608028654f, cubic = linear * 0.044715f;
  constexpr float factor = 1.44269502f, rest = 1.92596e-8f;  // log2(e)
  float y = t * fmaf(t * t, cubic, linear);
  float high = y * factor;
  float e = exp2_of_sum(high, fmaf(y, factor, -high) + y * rest);
  float result = fmaxf(x, 0.0f) - t * e / (1.0f + e);
  return x != x ? x : result;
}

template <typename T> __device__ __forceinline__ float gelu_erf(float x);
template <> __device__ __forceinline__ float gelu_erf<float>(float x) { return gelu_erf_fp32(x); }
template <> __device__ __forceinline__ float gelu_erf<float16>(float x) { return gelu_erf_fp16(x); }
template <> __device__ __forceinline__ float gelu_erf<bfloat16>(float x) { return gelu_erf_bf16(x); }

template <typename T, GeluKind kind> __device__ __forceinline__ float gelu_of(float x) {
  if constexpr (kind == GeluKind::tanh) return gelu_tanh(x);
  return gelu_erf<T>(x);
}

}  // namespace cuda
}  // namespace clinfast
