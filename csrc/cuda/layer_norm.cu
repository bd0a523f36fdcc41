// Residual + bias + LayerNorm: a warp a row up to 1,024 columns, a block a row above; the row stays in registers.
#include "cuda/launch.cuh"
#include "cuda/row_norm.cuh"

namespace clinfast {
namespace cuda {
namespace {

template <typename T, int Vectors, int Threads, bool Aligned>
__global__ void __launch_bounds__(Threads == 32 ? 32 * kRowsPerBlock : Threads)
    layer_norm_kernel(const LayerNormArgs args) {
  after_earlier_grids();
  constexpr int N = Vector<T>::N;
  CLINFAST_SHARED(float, scratch, Threads / 32);
  int64_t row = blockIdx.x;
  if (Threads == 32) row = row * kRowsPerBlock + threadIdx.x / 32;
  if (row >= args.rows) return;
  using Row = RowNorm<Vectors, N, Threads, Aligned>;
  Row norm;
  const T *x = static_cast<const T *>(args.x) + row * args.x_stride;
  const T *residual = static_cast<const T *>(args.residual) + row * args.residual_stride;
  const int hidden = args.hidden;
#pragma unroll
  for (int i = 0; i < Vectors; i++)
    if (Row::column(i) < hidden) load_row<Aligned>(x, Row::column(i), hidden, norm.values[i]);
  if (args.bias)
#pragma unroll
    for (int i = 0; i < Vectors; i++)
      if (Row::column(i) < hidden) {
        float bias[N];
        load_floats<Aligned>(args.bias, Row::column(i), hidden, bias);
#pragma unroll
        for (int j = 0; j < N; j++) norm.values[i][j] += bias[j];
      }
  if (args.residual)
#pragma unroll
    for (int i = 0; i < Vectors; i++)
      if (Row::column(i) < hidden) {
        float other[N];
        load_row<Aligned>(residual, Row::column(i), hidden, other);
#pragma unroll
        for (int j = 0; j < N; j++) norm.values[i][j] += other[j];
      }
  norm.normalise(hidden, args.eps, scratch);
  norm.store(static_cast<T *>(args.out) + row * args.out_stride, hidden, args.weight, args.shift);
}

template <typename T, int Vectors, bool Aligned> int by_warp(const LayerNormArgs &args, Stream stream) {
  return launch<&layer_norm_kernel<T, Vectors, 32, Aligned>>(blocks(args.rows, kRowsPerBlock), 32 * kRowsPerBlock,
                                                            stream, args);
}

template <typename T, int Vectors, bool Aligned> int by_block(const LayerNormArgs &args, Stream stream) {
  return launch<&layer_norm_kernel<T, Vectors, kThreadsPerRow, Aligned>>(unsigned(args.rows), kThreadsPerRow, stream,
                                                                        args);
}

template <typename T> int run(const LayerNormArgs &args, Stream stream) {
  constexpr int N = Vector<T>::N, most = kWarpHidden / (32 * N), widest = kMaxHidden / (kThreadsPerRow * N);
  const bool aligned = args.hidden % 8 == 0 && args.x_stride % N == 0 && args.out_stride % N == 0 &&
                       (!args.residual || args.residual_stride % N == 0) && on_16_bytes(args.x) &&
                       on_16_bytes(args.residual) && on_16_bytes(args.bias) && on_16_bytes(args.weight) &&
                       on_16_bytes(args.shift) && on_16_bytes(args.out);
  if (args.hidden <= kWarpHidden) {
    if (!aligned) return by_warp<T, most, false>(args, stream);
    if (args.hidden <= kWarpHidden / 2) return by_warp<T, most / 2, true>(args, stream);
    if (args.hidden <= kWarpHidden * 3 / 4) return by_warp<T, most * 3 / 4, true>(args, stream);
    return by_warp<T, most, true>(args, stream);
  }
  if (!aligned) return by_block<T, widest, false>(args, stream);
  if (args.hidden <= kMaxHidden / 4) return by_block<T, widest / 4, true>(args, stream);
  return by_block<T, widest, true>(args, stream);
}

}  // namespace

int layer_norm(const LayerNormArgs &args, DType dtype, Stream stream) {
  if (dtype == DType::f32) return run<float>(args, stream);
  return dtype == DType::bf16 ? run<bfloat16>(args, stream) : run<float16>(args, stream);
}

}  // namespace cuda
}  // namespace clinfast
