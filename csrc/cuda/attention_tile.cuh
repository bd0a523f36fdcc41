// One warp's part of an attention tile in mma.sync fragments: 16 queries at a time against keys in shared memory, the
// softmax kept up as keys come, as in FlashAttention-2 (Dao, arXiv:2307.08691).
#pragma once

#include "cuda/attention.cuh"

namespace clinfast {
namespace cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// Element offset of 16-byte chunk `chunk` of a row of D in shared memory: eight rows of one chunk touch all banks once.
template <int D> __device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * D + (chunk ^ (D >= 64 ? row % 8 : row / 2 % 4)) * 8;
}

// Rows [0, valid) of `from`, the others zero: a key that is not there must not bring a NaN through its share of 0.
template <int D, int Rows, int Threads, typename T>
__device__ __forceinline__ void load_tile(T *to, const T *from, int64_t stride, int valid, const AttentionArgs &args) {
  constexpr int kChunks = D / 8, kStep = Threads / kChunks;
  static_assert(Threads % kChunks == 0 && Rows % kStep == 0, "whole rows a step");
  const int chunk = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
  if (args.vectors) {
    const int rows = chunk * 8 < args.head_dim ? valid : 0;
#pragma unroll 2  // more copies' addresses at once would spill
    for (int row = first; row < first + Rows; row += kStep) {
      const bool present = row < rows;
      cp_async_16(to + swizzled<D>(row, chunk), present ? from + row * stride + chunk * 8 : from, present);
    }
  } else {
#pragma unroll 1
    for (int row = first; row < Rows; row += kStep) {
      Vector<T> vector;
#pragma unroll
      for (int j = 0; j < 8; j++)
        vector.at[j] = row < valid && chunk * 8 + j < args.head_dim ? from[row * stride + chunk * 8 + j]
                                                                    : from_float<T>(0.0f);
      *reinterpret_cast<Vector<T> *>(to + swizzled<D>(row, chunk)) = vector;
    }
  }
}

// a[16, 16] of rows from `row` on, columns 16 * step.
template <int D, typename T>
__device__ __forceinline__ void load_queries(uint32_t (&a)[4], const T *tile, int row, int step) {
  const int lane = threadIdx.x % 32;
  load_matrices<false>(a, tile + swizzled<D>(row + lane % 16, 2 * step + lane / 16));
}

// Scores of 16 * Tiles queries and 8 * N keys. Bounded: only the keys before `keys` are wanted.
template <typename T, int D, int Tiles, int N, bool Held, bool Bounded>
__device__ __forceinline__ void score(float (&s)[Tiles][N][4], const uint32_t (&held)[Tiles][Held ? D / 16 : 1][4],
                                      const T *queries, const T *keys, int count) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < Tiles; t++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) s[t][n][i] = 0;
  // Queries that are not held need no constant index, and with fewer steps unrolled nothing spills.
#pragma unroll(Held ? D / 16 : 4)
  for (int step = 0; step < D / 16; step++) {
    uint32_t a[Tiles][4];
#pragma unroll
    for (int t = 0; t < Tiles; t++) {
      if constexpr (Held) {
#pragma unroll
        for (int i = 0; i < 4; i++) a[t][i] = held[t][step][i];
      } else {
        load_queries<D>(a[t], queries, 16 * t, step);
      }
    }
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      if (Bounded && 8 * n >= count) continue;
      uint32_t both[4];
      load_matrices<false>(both, keys + swizzled<D>(8 * n + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
      const uint32_t left[2] = {both[0], both[1]}, right[2] = {both[2], both[3]};
#pragma unroll
      for (int t = 0; t < Tiles; t++) {
        mma<T>(s[t][n], a[t], left);
        mma<T>(s[t][n + 1], a[t], right);
      }
    }
  }
}

template <int Tiles> struct Softmax {
  float most[Tiles][2], sum[Tiles][2];  // of rows lane / 4 and lane / 4 + 8; `most` in units of log2

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int t = 0; t < Tiles; t++)
#pragma unroll
      for (int r = 0; r < 2; r++) most[t][r] = -INFINITY, sum[t][r] = 0;
  }

  // Scores become shares of the softmax; what was summed before is to be multiplied by `fades`.
  template <bool Bounded, int N>
  __device__ __forceinline__ void shares(float (&s)[Tiles][N][4], float (&fades)[Tiles][2], float factor, int count) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int t = 0; t < Tiles; t++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int i = 2 * r; i < 2 * r + 2; i++) {
            if (Bounded && 8 * n + column + i % 2 >= count) s[t][n][i] = -INFINITY;
            top = fmaxf(top, s[t][n][i]);
          }
        top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
        top = fmaxf(most[t][r], top * factor);
        const float fade = exp2_approximate(most[t][r] - top);
        most[t][r] = top;
        float added = 0;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int i = 2 * r; i < 2 * r + 2; i++) {
            s[t][n][i] = exp2_approximate(fmaf(s[t][n][i], factor, -top));
            added += s[t][n][i];
          }
        sum[t][r] = fmaf(sum[t][r], fade, added);
        fades[t][r] = fade;
      }
  }

  template <bool Bounded, int N, int Columns>
  __device__ __forceinline__ void update(float (&s)[Tiles][N][4], float (&o)[Tiles][Columns][4], float factor,
                                         int count) {
    float fades[Tiles][2];
    shares<Bounded>(s, fades, factor, count);
    fade(o, fades);
  }

  template <int Columns>
  static __device__ __forceinline__ void fade(float (&o)[Tiles][Columns][4], const float (&fades)[Tiles][2]) {
#pragma unroll
    for (int t = 0; t < Tiles; t++)
#pragma unroll
      for (int n = 0; n < Columns; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) o[t][n][i] *= fades[t][i / 2];
  }
};

// o += shares * values
template <typename T, int D, int Tiles, int N, bool Bounded>
__device__ __forceinline__ void add_values(float (&o)[Tiles][D / 8][4], const float (&s)[Tiles][N][4], const T *values,
                                           int count) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    if (Bounded && 8 * n >= count) continue;
    uint32_t a[Tiles][4];
#pragma unroll
    for (int t = 0; t < Tiles; t++) {
      a[t][0] = pack_pair<T>(s[t][n][0], s[t][n][1]);
      a[t][1] = pack_pair<T>(s[t][n][2], s[t][n][3]);
      a[t][2] = pack_pair<T>(s[t][n + 1][0], s[t][n + 1][1]);
      a[t][3] = pack_pair<T>(s[t][n + 1][2], s[t][n + 1][3]);
    }
#pragma unroll
    for (int column = 0; column < D / 8; column += 2) {
      uint32_t both[4];
      load_matrices<true>(both, values + swizzled<D>(8 * n + lane % 16, column + lane / 16));
      const uint32_t left[2] = {both[0], both[1]}, right[2] = {both[2], both[3]};
#pragma unroll
      for (int t = 0; t < Tiles; t++) {
        mma<T>(o[t][column], a[t], left);
        mma<T>(o[t][column + 1], a[t], right);
      }
    }
  }
}

// Rows [0, rows) of 16 finished queries, through the warp's own rows of shared memory, to `out`.
template <typename T, int D>
__device__ __forceinline__ void write_queries(const float (&o)[D / 8][4], const float (&sum)[2], T *staging, T *out,
                                              int rows, const AttentionArgs &args) {
  const int lane = threadIdx.x % 32;
  float scale[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float total = sum[r];
    total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
    total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
    scale[r] = 1.0f / total;
  }
  __syncwarp();
#pragma unroll
  for (int n = 0; n < D / 8; n++)
#pragma unroll
    for (int r = 0; r < 2; r++)
      *reinterpret_cast<uint32_t *>(staging + swizzled<D>(lane / 4 + 8 * r, n) + lane % 4 * 2) =
          pack_pair<T>(o[n][2 * r] * scale[r], o[n][2 * r + 1] * scale[r]);
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 2 * D; i += 32) {
    const int row = i / (D / 8), chunk = i % (D / 8);
    if (row >= rows || chunk * 8 >= args.head_dim) continue;
    const Vector<T> vector = *reinterpret_cast<const Vector<T> *>(staging + swizzled<D>(row, chunk));
    T *to = out + row * args.out_token_stride + chunk * 8;
    if (args.vectors) {
      *reinterpret_cast<Vector<T> *>(to) = vector;
    } else {
#pragma unroll
      for (int j = 0; j < 8; j++)
        if (chunk * 8 + j < args.head_dim) to[j] = vector.at[j];
    }
  }
}

#endif

}  // namespace cuda
}  // namespace clinfast
