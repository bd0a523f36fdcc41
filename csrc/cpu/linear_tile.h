// The register tile of the linear layer and the layout of its weights.
#pragma once

#include "vec.h"

namespace clinfast {
namespace CLINFAST_ISA {

// kTileRows x kTileVecs accumulators, kTileVecs weights and one broadcast input fit the registers: 32 or 16.
#if defined(CLINFAST_AVX512)
static constexpr int kTileRows = 8, kTileVecs = 3;
#elif defined(__aarch64__)
static constexpr int kTileRows = 6, kTileVecs = 4;
#else
static constexpr int kTileRows = 4, kTileVecs = 3;
#endif
// The inputs' block and what lies around it share the second-level cache.
static constexpr int64_t kMaxBlockRows = 256, kMaxBlockSteps = 384;
static constexpr int64_t kFetchSteps = 32;
// Longest chain of multiply-adds, for the sake of its rounding: longer sums are made of such pieces.
static constexpr int64_t kChainSteps = 192;

template <typename T> struct Layout {
  using Word = T;
  static constexpr int64_t kPanel = kTileVecs * Vec::N, kWordInputs = 1;
  static int64_t steps(int64_t in_features) { return in_features; }
  static Vec left(const T *x, int64_t step, int64_t) { return Vec::set(to_float(x[step])); }
  static Vec right(const Word *b) { return Vec::load(b); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

#if defined(CLINFAST_AMX)
// Whole tiles: in each step of 32 inputs, inputs i and i + 16 of 16 outputs lie side by side (linear_split.h).
template <> struct Layout<float> {
  static constexpr int64_t kPanel = 2 * Vec::N, kWordInputs = 1;
  static int64_t steps(int64_t in_features) { return (in_features + 31) / 32 * 32; }
};
#endif

#if defined(CLINFAST_AVX512_BF16)
template <> struct Layout<bf16_t> {
  using Word = float;
#if defined(CLINFAST_AMX)
  static constexpr int64_t kPanel = 2 * Vec::N, kWordInputs = 2;
  static int64_t steps(int64_t in_features) { return (in_features + 31) / 32 * 16; }
#else
  static constexpr int64_t kPanel = kTileVecs * Vec::N, kWordInputs = 2;
  static int64_t steps(int64_t in_features) { return (in_features + 1) / 2; }
#endif
  static Vec left(const bf16_t *x, int64_t step, int64_t in_features) {
    uint32_t word;
    if (2 * step + 1 < in_features) memcpy(&word, x + 2 * step, 4);
    else word = x[2 * step];
    return Vec::set(bits_to_float(word));
  }
  static Vec right(const Word *b) { return Vec::load(b); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return dot_pairs(a, b, c); }
};
#endif

// sums[i] (+)= x[i] @ block for M rows and `count` steps from `step` on; meanwhile asks for `lines` cache lines at `next`.
template <typename T, int M>
static inline void multiply_rows(const T *x, int64_t stride, int64_t in_features, int64_t step, int64_t count,
                                 const typename Layout<T>::Word *block, const char *next, int64_t lines,
                                 bool accumulate, float *sums) {
  using L = Layout<T>;
  constexpr int64_t kPanel = L::kPanel;
  const int64_t per_round = lines * kFetchSteps / count + 1;
  int64_t asked = 0;
  for (int64_t chain = 0; chain < count; chain += kChainSteps) {
    const int64_t chain_end = chain + kChainSteps < count ? chain + kChainSteps : count;
    Vec c[M][kTileVecs];
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 8
      for (int j = 0; j < kTileVecs; j++) c[i][j] = Vec::zero();
    for (int64_t begin = chain; begin < chain_end; begin += kFetchSteps) {
      const int64_t end = begin + kFetchSteps < chain_end ? begin + kFetchSteps : chain_end;
      // Three rows a pointer: with one for all, the compiler spills the offsets of the others and reads them back.
      const T *row[(M + 2) / 3];
      for (int i = 0; i < (M + 2) / 3; i++) {
        row[i] = x + 3 * i * stride;
        __asm__("" : "+r"(row[i]));
      }
#pragma GCC unroll 2
      for (int64_t s = begin; s < end; s++) {
        Vec right[kTileVecs];
#pragma GCC unroll 8
        for (int j = 0; j < kTileVecs; j++) right[j] = L::right(block + s * kPanel + j * Vec::N);
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
          Vec left = L::left(row[i / 3] + i % 3 * stride, step + s, in_features);
#pragma GCC unroll 8
          for (int j = 0; j < kTileVecs; j++) c[i][j] = L::multiply_add(left, right[j], c[i][j]);
        }
      }
      const int64_t until = asked + per_round < lines ? asked + per_round : lines;
      for (; asked < until; asked++) __builtin_prefetch(next + asked * 64, 0, 2);
    }
    const bool add = accumulate || chain > 0;
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 8
      for (int j = 0; j < kTileVecs; j++) {
        float *to = sums + i * kPanel + j * Vec::N;
        if (add) c[i][j] = c[i][j] + Vec::load(to);
        c[i][j].store(to);
      }
  }
}

template <int N> struct RowCount {
  static constexpr int value = N;
};

// Calls f with n, which lies in 1..Max, as a constant.
template <int Max, typename F> static inline void with_constant(int64_t n, F &&f) {
  if constexpr (Max == 1) f(RowCount<1>{});
  else if (n == Max) f(RowCount<Max>{});
  else with_constant<Max - 1>(n, f);
}

}  // namespace CLINFAST_ISA
}  // namespace clinfast
