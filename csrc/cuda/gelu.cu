// bias + GELU: vectors of 16 bytes, four of a thread under way.
#include "cuda/gelu.cuh"
#include "cuda/launch.cuh"
#include "cuda/row_norm.cuh"

namespace clinfast {
namespace cuda {
namespace {

constexpr int kThreads = 256;
template <bool Aligned> constexpr int kVectors = Aligned ? 4 : 2;  // of a thread

template <typename T, GeluKind kind, bool Aligned>
__global__ void __launch_bounds__(kThreads) gelu_kernel(const GeluArgs args) {
  after_earlier_grids();
  constexpr int N = Vector<T>::N, kUnroll = kVectors<Aligned>;
  const int hidden = int(args.hidden);
  const uint32_t a_row = (hidden + N - 1) / N;
  const uint32_t work = uint32_t(args.rows) * a_row, first = blockIdx.x * (kThreads * kUnroll) + threadIdx.x;
  float values[kUnroll][N];
  uint32_t row[kUnroll];
  int column[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; i++) {
    const uint32_t at = first + i * kThreads;
    row[i] = at / a_row;
    column[i] = int(at - row[i] * a_row) * N;
    if (at < work)
      load_row<Aligned>(static_cast<const T *>(args.x) + int64_t(row[i]) * args.x_stride, column[i], hidden,
                        values[i]);
  }
#pragma unroll
  for (int i = 0; i < kUnroll; i++) {
    if (first + i * kThreads >= work) continue;
    if (args.bias) {
      float bias[N];
      load_floats<Aligned>(args.bias, column[i], hidden, bias);
#pragma unroll
      for (int j = 0; j < N; j++) values[i][j] += bias[j];
    }
#pragma unroll
    for (int j = 0; j < N; j++) values[i][j] = gelu_of<T, kind>(values[i][j]);
    store_row<Aligned>(static_cast<T *>(args.out) + int64_t(row[i]) * args.out_stride, column[i], hidden, values[i]);
  }
}

template <typename T, GeluKind kind> int run(const GeluArgs &args, Stream stream) {
  constexpr int N = Vector<T>::N;
  const bool aligned = args.hidden % N == 0 && args.x_stride % N == 0 && args.out_stride % N == 0 &&
                       on_16_bytes(args.x) && on_16_bytes(args.bias) && on_16_bytes(args.out);
  const int64_t work = args.rows * ((args.hidden + N - 1) / N);
  if (work > kMostVectors) return kTooLarge;
  const unsigned grid = blocks(work, kThreads * (aligned ? kVectors<true> : kVectors<false>));
  return aligned ? launch<&gelu_kernel<T, kind, true>>(grid, kThreads, stream, args)
                 : launch<&gelu_kernel<T, kind, false>>(grid, kThreads, stream, args);
}

template <typename T> int run(const GeluArgs &args, GeluKind kind, Stream stream) {
  return kind == GeluKind::erf ? run<T, GeluKind::erf>(args, stream) : run<T, GeluKind::tanh>(args, stream);
}

}  // namespace

int gelu(const GeluArgs &args, GeluKind kind, DType dtype, Stream stream) {
  if (dtype == DType::f32) return run<float>(args, kind, stream);
  return dtype == DType::bf16 ? run<bfloat16>(args, kind, stream) : run<float16>(args, kind, stream);
}

}  // namespace cuda
}  // namespace clinfast
