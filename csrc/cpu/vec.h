// A vector of fp32 lanes, one implementation per instruction set. Everything lives in the ISA's own namespace: an
// inline function shared between translation units that were built for different processors would be merged by the
// linker into whichever copy it met first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(CLINFAST_AVX512) || defined(CLINFAST_AVX2)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace clinfast {
namespace CLINFAST_ISA {

using bf16_t = uint16_t;

static inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static inline float to_float(float value) { return value; }
static inline float to_float(bf16_t value) { return bits_to_float(uint32_t(value) << 16); }

// Round to nearest, ties to even; a NaN stays a NaN.
static inline bf16_t to_bf16(float value) {
  uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16_t((bits >> 16) | 0x40u);
  return bf16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if defined(CLINFAST_AVX512)

struct Vec {
  static constexpr int N = 16;
  __m512 v;
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static __mmask16 lanes(int n) { return __mmask16((1u << n) - 1u); }
  static Vec load(const float *p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const float *p, int n) { return {_mm512_maskz_loadu_ps(lanes(n), p)}; }
  static Vec gather(const float *p, const int32_t *at) {
    return {_mm512_i32gather_ps(_mm512_loadu_si512(at), p, 4)};
  }
  static Vec load(const bf16_t *p) { return widen(_mm256_loadu_si256((const __m256i *)p)); }
  static Vec load(const bf16_t *p, int n) { return widen(_mm256_maskz_loadu_epi16(lanes(n), p)); }
  void store(float *p) const { _mm512_storeu_ps(p, v); }
  void store(float *p, int n) const { _mm512_mask_storeu_ps(p, lanes(n), v); }
  void store(bf16_t *p) const { _mm256_storeu_si256((__m256i *)p, narrow()); }
  void store(bf16_t *p, int n) const { _mm256_mask_storeu_epi16(p, lanes(n), narrow()); }
  static Vec widen(__m256i x) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
  }
#if defined(CLINFAST_AVX512_BF16)
  // Rounds alike, except that an fp32 subnormal becomes zero.
  __m256i narrow() const { return (__m256i)_mm512_cvtneps_pbh(v); }
#else
  __m256i narrow() const {
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
#endif
  float sum() const { return _mm512_reduce_add_ps(v); }
  float max() const { return _mm512_reduce_max_ps(v); }
};
static inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Vec max_or_nan(Vec a, Vec b) {
  return {_mm512_mask_mov_ps(_mm512_max_ps(a.v, b.v), _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), a.v)};
}
static inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
static inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for integral n, with gradual underflow.
static inline Vec scale_by_power_of_two(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
static inline Vec copy_sign(Vec magnitude, Vec sign) {
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(magnitude.v), _mm512_castps_si512(sign.v),
                                                        _mm512_set1_epi32(int(0x80000000u)), 0xd8))};
}
// a < b ? x : y, lane by lane.
static inline Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
// One step of a transpose: a and b cut in blocks of S lanes; a's odd blocks change places with b's even ones.
template <int S> static inline void swap_blocks(Vec &a, Vec &b) {
  __m512 x = a.v, y = b.v;
  if (S == 1) {
    a.v = _mm512_mask_moveldup_ps(x, 0xaaaa, y);
    b.v = _mm512_mask_movehdup_ps(y, 0x5555, x);
  } else if (S == 2) {
    a.v = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    b.v = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  } else if (S == 4) {
    a.v = _mm512_permutex2var_ps(x, _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27), y);
    b.v = _mm512_permutex2var_ps(x, _mm512_setr_epi32(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31), y);
  } else {
    a.v = _mm512_shuffle_f32x4(x, y, 0x44);
    b.v = _mm512_shuffle_f32x4(x, y, 0xee);
  }
}
#if defined(CLINFAST_AVX512_BF16)
// Lanes are pairs of bf16: c + a.first * b.first + a.second * b.second.
static inline Vec dot_pairs(Vec a, Vec b, Vec c) {
  return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
}
// Sixteen floats as eight such words.
static inline void store_pairs(Vec x, float *words) { _mm256_storeu_ps(words, (__m256)_mm512_cvtneps_pbh(x.v)); }
// Two neighbouring vectors as 32 elements, in one whole store.
static inline void store_both(Vec first, Vec second, bf16_t *p) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v));
}
static inline void store_both(Vec first, Vec second, float *p) {
  first.store(p);
  second.store(p + Vec::N);
}
// Row elements 2i and 2i + 1 in lane i; n elements are read, the others are 0.
static inline Vec load_pairs(const bf16_t *p, int n) {
  return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(n < 32 ? (1u << n) - 1u : 0xffffffffu, p))};
}
// Lane i holds (low[i], high[i]), given both widened.
static inline Vec zip_pairs(Vec low, Vec high) {
  __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(low.v), 16);
  return {_mm512_castsi512_ps(_mm512_or_si512(bits, _mm512_castps_si512(high.v)))};
}
#endif

#elif defined(CLINFAST_AVX2)

struct Vec {
  static constexpr int N = 8;
  __m256 v;
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static __m256i lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Vec load(const float *p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const float *p, int n) { return {_mm256_maskload_ps(p, lanes(n))}; }
  static Vec gather(const float *p, const int32_t *at) {
    return {_mm256_i32gather_ps(p, _mm256_loadu_si256((const __m256i *)at), 4)};
  }
  static Vec load(const bf16_t *p) { return widen(_mm_loadu_si128((const __m128i *)p)); }
  static Vec load(const bf16_t *p, int n) {
    bf16_t buffer[8] = {0};
    memcpy(buffer, p, size_t(n) * 2);
    return load(buffer);
  }
  void store(float *p) const { _mm256_storeu_ps(p, v); }
  void store(float *p, int n) const { _mm256_maskstore_ps(p, lanes(n), v); }
  void store(bf16_t *p) const { _mm_storeu_si128((__m128i *)p, narrow()); }
  void store(bf16_t *p, int n) const {
    bf16_t buffer[8];
    store(buffer);
    memcpy(p, buffer, size_t(n) * 2);
  }
  static Vec widen(__m128i x) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))}; }
  __m128i narrow() const {
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    rounded = _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan));
    rounded = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
  float sum() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  float max() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
};
static inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline Vec max_or_nan(Vec a, Vec b) {
  return {_mm256_blendv_ps(_mm256_max_ps(a.v, b.v), a.v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
}
static inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
static inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static inline Vec scale_by_power_of_two(Vec a, Vec n) {
  // Two half steps, so that exponents down to the subnormals survive.
  __m256i whole = _mm256_cvtps_epi32(n.v);
  __m256i half = _mm256_srai_epi32(whole, 1);
  __m256i rest = _mm256_sub_epi32(whole, half);
  __m256i bias = _mm256_set1_epi32(127);
  __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, first), second)};
}
static inline Vec copy_sign(Vec magnitude, Vec sign) {
  __m256 mask = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(mask, magnitude.v), _mm256_and_ps(mask, sign.v))};
}
static inline Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
template <int S> static inline void swap_blocks(Vec &a, Vec &b) {
  __m256 x = a.v, y = b.v;
  if (S == 1) {
    a.v = _mm256_blend_ps(x, _mm256_moveldup_ps(y), 0xaa);
    b.v = _mm256_blend_ps(_mm256_movehdup_ps(x), y, 0xaa);
  } else if (S == 2) {
    a.v = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(x), _mm256_castps_pd(y)));
    b.v = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(x), _mm256_castps_pd(y)));
  } else {
    a.v = _mm256_permute2f128_ps(x, y, 0x20);
    b.v = _mm256_permute2f128_ps(x, y, 0x31);
  }
}

#else

typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));

struct Vec {
  static constexpr int N = 4;
  f32x4 v;
  static Vec zero() { return set(0.0f); }
  static Vec set(float x) { return {f32x4{x, x, x, x}}; }
  static Vec gather(const float *p, const int32_t *at) { return {f32x4{p[at[0]], p[at[1]], p[at[2]], p[at[3]]}}; }
  template <typename T> static Vec load(const T *p) { return load(p, 4); }
  static Vec load(const float *p) {
    Vec r;
    memcpy(&r.v, p, 16);
    return r;
  }
  template <typename T> static Vec load(const T *p, int n) {
    Vec r = zero();
    for (int i = 0; i < n; i++) r.v[i] = to_float(p[i]);
    return r;
  }
  void store(float *p) const { memcpy(p, &v, 16); }
  void store(float *p, int n) const { memcpy(p, &v, size_t(n) * 4); }
  void store(bf16_t *p) const { store(p, 4); }
  void store(bf16_t *p, int n) const {
    for (int i = 0; i < n; i++) p[i] = to_bf16(v[i]);
  }
  float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
  float max() const {
    float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
    return a > b ? a : b;
  }
};
static inline Vec blend(i32x4 mask, Vec x, Vec y) {
  return {(f32x4)(((i32x4)x.v & mask) | ((i32x4)y.v & ~mask))};
}
static inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
static inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
static inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
static inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
static inline Vec max(Vec a, Vec b) { return blend((i32x4)(a.v > b.v), a, b); }
static inline Vec max_or_nan(Vec a, Vec b) { return blend((i32x4)(a.v != a.v), a, max(a, b)); }
static inline Vec min(Vec a, Vec b) { return blend((i32x4)(a.v < b.v), a, b); }
static inline Vec abs(Vec a) { return {(f32x4)((i32x4)a.v & 0x7fffffff)}; }
static inline Vec copy_sign(Vec magnitude, Vec sign) {
  i32x4 mask = i32x4{} + int32_t(0x80000000u);
  return {(f32x4)(((i32x4)magnitude.v & ~mask) | ((i32x4)sign.v & mask))};
}
// Adding and taking away 1.5 * 2^23 rounds to nearest; valid for |a| < 2^22, which is all that exp asks.
static inline Vec round(Vec a) {
  Vec shift = Vec::set(12582912.0f);
  Vec sum = a + shift;
  __asm__("" : "+m"(sum.v));
  return sum - shift;
}
static inline Vec scale_by_power_of_two(Vec a, Vec n) {
  i32x4 whole = __builtin_convertvector(n.v, i32x4);
  i32x4 half = whole >> 1;
  f32x4 first = (f32x4)((half + 127) << 23);
  f32x4 second = (f32x4)((whole - half + 127) << 23);
  return {a.v * first * second};
}
static inline Vec select_less(Vec a, Vec b, Vec x, Vec y) { return blend((i32x4)(a.v < b.v), x, y); }
template <int S> static inline void swap_blocks(Vec &a, Vec &b) {
  f32x4 x = a.v, y = b.v;
  if (S == 1) {
    a.v = f32x4{x[0], y[0], x[2], y[2]};
    b.v = f32x4{x[1], y[1], x[3], y[3]};
  } else {
    a.v = f32x4{x[0], x[1], y[0], y[1]};
    b.v = f32x4{x[2], x[3], y[2], y[3]};
  }
}

#endif

// exp(r) on [-ln2/2, ln2/2]: a minimax polynomial of degree 6.
static inline Vec exp_polynomial(Vec r) {
  Vec p = Vec::set(1.3981999e-3f);
  p = fma(p, r, Vec::set(8.3334519e-3f));
  p = fma(p, r, Vec::set(4.1665795e-2f));
  p = fma(p, r, Vec::set(1.6666665e-1f));
  p = fma(p, r, Vec::set(0.5f));
  p = fma(p, r, Vec::set(1.0f));
  return fma(p, r, Vec::set(1.0f));
}

// exp(x), at most 1 ulp or so: range reduction by ln 2 in two parts, then a polynomial. Inputs are clamped
// to [-104, 88.7]; below, the result is 0.
static inline Vec exp(Vec x) {
  x = min(max(x, Vec::set(-104.0f)), Vec::set(88.72f));
  Vec n = round(x * Vec::set(1.44269504088896341f));
  Vec r = fma(n, Vec::set(-0.693145751953125f), x);
  r = fma(n, Vec::set(-1.42860682030941723e-6f), r);
  return scale_by_power_of_two(exp_polynomial(r), n);
}

// Rows of `T` as vectors: full ones, then one shorter tail.
template <typename F> static inline void for_lanes(int64_t size, F &&f) {
  int64_t i = 0;
  for (; i + Vec::N <= size; i += Vec::N) f(i, Vec::N);
  if (i < size) f(i, int(size - i));
}
template <typename T> static inline Vec load(const T *p, int n) {
  return n == Vec::N ? Vec::load(p) : Vec::load(p, n);
}
template <typename T> static inline void store(Vec x, T *p, int n) {
  if (n == Vec::N) x.store(p);
  else x.store(p, n);
}

// A team of threads costs about 2 us to wake; work below this many bytes moved stays on the caller's thread.
static constexpr int64_t kSerialBytes = 32 << 10;

static inline int thread_count(int num_threads, int64_t tasks, int64_t bytes) {
  if (bytes < kSerialBytes) return 1;
  return int(tasks < num_threads ? (tasks < 1 ? 1 : tasks) : num_threads);
}

}  // namespace CLINFAST_ISA
}  // namespace clinfast
