// The register tiles of attention. Packed operands are arrays of 32-bit words held as floats: a word is one fp32 value
// or, with Pairs, two bf16 neighbours along the depth of the product. A row's arithmetic never depends on the number
// of rows that share its tile.
#pragma once

#include "attention_terms.h"
#include "scratch.h"

namespace clinfast {
namespace CLINFAST_ISA {

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static constexpr int kRows = 6;
#if defined(CLINFAST_AVX512) || defined(__aarch64__)
static constexpr int kTileVecs = 4;  // 32 registers
#else
static constexpr int kTileVecs = 2;
#endif
static constexpr int kTileKeys = kTileVecs * Vec::N;
static constexpr int kBlockKeys = 512;
static constexpr int kMaxHeadDim = 256;
// Longest chains of fused multiply-adds, for the sake of their rounding: longer sums are made of such pieces.
static constexpr int64_t kScoreChain = 128, kValueChain = 256;
// Row stride of the left operands and the scores. The odd cache line keeps rows out of each other's L1 sets.
static constexpr int kPanelStride = kBlockKeys + 16;

template <bool Pairs> static inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(CLINFAST_AVX512_BF16)
  if (Pairs) return dot_pairs(a, b, c);
#endif
  return fma(a, b, c);
}

// finish(row, column, value) for each vector of a @ b: a is [M, depth] of stride kPanelStride, b [depth, NV vectors].
template <bool Pairs, int M, int NV, typename F>
static inline __attribute__((always_inline)) void multiply_tile(const float *a, int64_t a_stride, const float *b, int64_t b_stride,
                                                                int64_t depth, F &&finish) {
  Vec c[M][NV];
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) c[i][j] = Vec::zero();
  for (int64_t d = 0; d < depth; d++, a++, b += b_stride) {
    Vec right[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) right[j] = Vec::load(b + j * Vec::N);
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      Vec left = Vec::set(a[i * a_stride]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) c[i][j] = multiply_add<Pairs>(left, right[j], c[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) finish(i, j, c[i][j]);
}

template <int N> struct Constant {
  static constexpr int value = N;
};

// Calls f with n, which lies in 1..Max, as a constant.
template <int Max, typename F> static inline void with_constant(int64_t n, F &&f) {
  if constexpr (Max == 1) f(Constant<1>{});
  else if (n == Max) f(Constant<Max>{});
  else with_constant<Max - 1>(n, f);
}

static inline Vec keep_lanes(Vec x, int64_t n, float others) {
  static const float iota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return select_less(Vec::load(iota), Vec::set(float(n)), x, Vec::set(others));
}

// scores[i, j] = q[i] . k[j], or its negative, for `keys` keys and zeros in the lanes beyond, after terms(i, first + j,
// score); row_max follows.
template <bool Pairs, int M, typename Terms>
static inline void score_tile(const float *q, int64_t q_stride, const float *k, int64_t depth, bool negate, int64_t keys, float *scores,
                              Vec *row_max, const Terms &terms, int64_t first) {
  with_constant<kTileVecs>((keys + Vec::N - 1) / Vec::N, [&](auto vecs) {
    constexpr int NV = decltype(vecs)::value;
    const int64_t filled = keys - (NV - 1) * Vec::N;
    for (int64_t d = 0; d < depth; d += kScoreChain) {
      const int64_t steps = depth - d < kScoreChain ? depth - d : kScoreChain;
      multiply_tile<Pairs, M, NV>(q + d, q_stride, k + d * NV * Vec::N, NV * Vec::N, steps, [&](int i, int j, Vec s) {
        float *to = scores + i * kPanelStride + j * Vec::N;
        if (d > 0) s = s + Vec::load(to);
        if (d + steps < depth) return s.store(to);
        if (negate) s = Vec::zero() - s;
        s = terms(i, first + j * Vec::N, s);
        s = max(Vec::set(-1e30f), s);
        s.store(to);
        if (j == NV - 1 && filled < Vec::N) s = keep_lanes(s, filled, -__builtin_inff());
        row_max[i] = max(row_max[i], s);
      });
    }
  });
}

// 2^x for finite x <= 0, 0 below -150; a NaN stays a NaN. The polynomial of degree 5 is within 9.2e-8, that of degree 3 within
// 1.1e-4, far below the rounding to bf16 that follows.
template <bool Pairs> static inline Vec exp2_nonpositive(Vec x) {
#if !defined(CLINFAST_AVX512)
  x = max(Vec::set(-151.0f), x);
#endif
  Vec n = round(x);
  Vec r = x - n;
  Vec p;
  if (Pairs) {
    p = fma(Vec::set(5.5008932e-2f), r, Vec::set(2.4221096e-1f));
    p = fma(p, r, Vec::set(6.9328293e-1f));
  } else {
    p = fma(Vec::set(1.3264652e-3f), r, Vec::set(9.6715113e-3f));
    p = fma(p, r, Vec::set(5.5507340e-2f));
    p = fma(p, r, Vec::set(2.4022242e-1f));
    p = fma(p, r, Vec::set(6.9314698e-1f));
  }
  p = fma(p, r, Vec::set(1.0f));
  return scale_by_power_of_two(p, n);
}

// Scores to weights 2^(score - maximum), in place or, with Pairs, rounded into `weights`; sum[i] is row i's.
template <bool Pairs, int M>
static inline void weigh_rows(const float *scores, float *weights, int64_t keys, float factor, const float *maximum, float *sum) {
  Vec shift[M], total[M];
  const Vec slope = Vec::set(factor);
#pragma GCC unroll 8
  for (int i = 0; i < M; i++) {
    shift[i] = Vec::set(-maximum[i] * factor);
    total[i] = Vec::zero();
  }
  for (int64_t key = 0; key < keys; key += Vec::N) {
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      Vec weight = exp2_nonpositive<Pairs>(fma(Vec::load(scores + i * kPanelStride + key), slope, shift[i]));
      if (key + Vec::N > keys) weight = keep_lanes(weight, keys - key, 0.0f);
      total[i] = total[i] + weight;
#if defined(CLINFAST_AVX512_BF16)
      if (Pairs) {
        store_pairs(weight, weights + i * kPanelStride + key / 2);
        continue;
      }
#endif
      weight.store(weights + i * kPanelStride + key);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; i++) sum[i] = total[i].sum();
}

}  // namespace CLINFAST_ISA
}  // namespace clinfast
