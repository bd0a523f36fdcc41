// The LayerNorm of one row, shared by the kernels that end in one.
#pragma once

#include "vec.h"

namespace clinfast {
namespace CLINFAST_ISA {

static constexpr int64_t kMaxHidden = 16384;

// Sum of f over the row: eight partial sums of at most 64 terms a lane, then their sums, so that neither the latency of
// one chain nor the rounding of a long one counts.
template <typename F> static inline float row_sum(const float *row, int64_t size, F &&f) {
  constexpr int64_t kStep = 8 * Vec::N, kBlock = 64 * kStep;
  float total = 0.0f;
  for (int64_t block = 0; block < size; block += kBlock) {
    int64_t end = block + kBlock < size ? block + kBlock : size, i = block;
    Vec part[8];
    for (int j = 0; j < 8; j++) part[j] = Vec::zero();
    for (; i + kStep <= end; i += kStep)
      for (int j = 0; j < 8; j++) part[j] = part[j] + f(Vec::load(row + i + j * Vec::N));
    for (int j = 0; i + Vec::N <= end; i += Vec::N, j++) part[j] = part[j] + f(Vec::load(row + i));
    total += ((part[0] + part[1]) + (part[2] + part[3]) + ((part[4] + part[5]) + (part[6] + part[7]))).sum();
    if (i < end) {
      // f of the lanes past the end need not be zero.
      float lanes[Vec::N];
      f(Vec::load(row + i, int(end - i))).store(lanes);
      for (int64_t j = 0; j < end - i; j++) total += lanes[j];
    }
  }
  return total;
}

// `sum_at(i, n)` gives lanes [i, i + n) of the row to normalise; it is called once per lane.
template <typename T, typename F>
static inline void normalise_row(int64_t hidden, float eps, const float *weight, const float *shift, T *out,
                                 F &&sum_at) {
  alignas(64) float row[kMaxHidden];
  for_lanes(hidden, [&](int64_t i, int n) { store(sum_at(i, n), row + i, n); });
  float mean = row_sum(row, hidden, [](Vec x) { return x; }) / float(hidden);
  Vec centre = Vec::set(mean);
  // Corrected two-pass variance (Chan, Golub, LeVeque 1983): `off` is what rounding left in the mean.
  float off = row_sum(row, hidden, [&](Vec x) { return x - centre; }) / float(hidden);
  Vec rest = Vec::set(off);
  float variance = row_sum(row, hidden, [&](Vec x) {
    Vec d = (x - centre) - rest;
    return d * d;
  }) / float(hidden);
  float inverse = 1.0f / __builtin_sqrtf(variance + eps);
  Vec factor = Vec::set(inverse);
  for_lanes(hidden, [&](int64_t i, int n) {
    Vec y = fma(((load(row + i, n) - centre) - rest) * factor, load(weight + i, n), load(shift + i, n));
    store(y, out + i, n);
  });
}

}  // namespace CLINFAST_ISA
}  // namespace clinfast
