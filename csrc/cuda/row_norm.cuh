// LayerNorm of a row that a warp or a block holds in registers, shared by layer_norm.cu and embedding.cu.
#pragma once

#include "cuda/device.cuh"

namespace clinfast {
namespace cuda {

// N floats from `start` on, those past `size` 0.
template <bool Aligned, int N>
__device__ __forceinline__ void load_floats(const float *row, int start, int size, float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    if constexpr (Aligned) {
      float4 four = *reinterpret_cast<const float4 *>(row + start + i);
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    } else {
#pragma unroll
      for (int j = i; j < i + 4; j++) values[j] = start + j < size ? row[start + j] : 0.0f;
    }
  }
}

// Vector i of thread t starts at column (t + i * Threads) * N, whatever the row's alignment, so that a row has the same
// bits from an aligned tensor and from a view. The variance is the mean of squared distances from the mean, and the
// distances' own mean takes out what rounding left in it: the corrected two-pass algorithm (Chan, Golub and LeVeque,
// The American Statistician 37, 1983).
template <int Vectors, int N, int Threads, bool Aligned> struct RowNorm {
  static constexpr int kVectors = Vectors;
  float values[Vectors][N];

  static __device__ __forceinline__ int column(int i) {
    return ((Threads == 32 ? int(threadIdx.x) % 32 : int(threadIdx.x)) + i * Threads) * N;
  }

  // Values become (value - mean) / sqrt(variance + eps).
  __device__ __forceinline__ void normalise(int hidden, float eps, float *scratch) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < Vectors; i++)
      if (column(i) < hidden)
#pragma unroll
        for (int j = 0; j < N; j++) sum += values[i][j];
    const float inverse = 1.0f / float(hidden), mean = block_sum<Threads>(sum, scratch) * inverse;
    float squares = 0, rest = 0;
#pragma unroll
    for (int i = 0; i < Vectors; i++)
      if (column(i) < hidden)
#pragma unroll
        for (int j = 0; j < N; j++) {
          const float distance = Aligned || column(i) + j < hidden ? values[i][j] - mean : 0.0f;
          values[i][j] = distance;
          squares = fmaf(distance, distance, squares);
          rest += distance;
        }
    squares = block_sum<Threads>(squares, scratch) * inverse;
    rest = block_sum<Threads>(rest, scratch) * inverse;
    const float scale = rsqrtf(fmaf(-rest, rest, squares) + eps);
#pragma unroll
    for (int i = 0; i < Vectors; i++)
#pragma unroll
      for (int j = 0; j < N; j++) values[i][j] = (values[i][j] - rest) * scale;
  }

  template <typename Out>
  __device__ __forceinline__ void store(Out *out, int hidden, const float *weight, const float *shift) const {
#pragma unroll
    for (int i = 0; i < Vectors; i++) {
      if (column(i) >= hidden) continue;
      float w[N], s[N], y[N];
      load_floats<Aligned>(weight, column(i), hidden, w);
      load_floats<Aligned>(shift, column(i), hidden, s);
#pragma unroll
      for (int j = 0; j < N; j++) y[j] = fmaf(values[i][j], w[j], s[j]);
      store_row<Aligned>(out, column(i), hidden, y);
    }
  }
};

constexpr int kRowsPerBlock = 4;      // of a warp each
constexpr int kThreadsPerRow = 256;   // where a block has a row
constexpr int kWarpHidden = 1024;     // widest row of a warp
constexpr int kMaxHidden = 16384;

}  // namespace cuda
}  // namespace clinfast
