// One row a note: 8 warps take the note's rows in turn, 32 vectors of columns a block, and warp 0 adds their results in
// order. A note's bits depend on its own rows only.
#include "cuda/launch.cuh"

namespace clinfast {
namespace cuda {
namespace {

constexpr int kWarps = 8;

__device__ __forceinline__ float larger(float a, float b) { return a != a || a > b ? a : b; }

template <typename T, PoolingKind kind, bool Aligned>
__global__ void __launch_bounds__(32 * kWarps) pooling_kernel(const PoolingArgs args) {
  after_earlier_grids();
  constexpr int N = Vector<T>::N;
  CLINFAST_SHARED(float, scratch, kWarps * 32 * N);
  const int64_t note = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, hidden = int(args.hidden);
  const int column = (int(blockIdx.y) * 32 + lane) * N;
  const int64_t begin = args.cu_seqlens[note], end = args.cu_seqlens[note + 1];
  const bool outside = begin < 0 || end < begin || end > args.rows;
  const T *x = static_cast<const T *>(args.x);
  float total[N], lost[N];
#pragma unroll
  for (int j = 0; j < N; j++) total[j] = kind == PoolingKind::max ? -INFINITY : 0.0f, lost[j] = 0;
  if (column < hidden && !outside) {
    const int64_t last = kind == PoolingKind::first_token ? min(begin + 1, end) : end;
#pragma unroll 4
    for (int64_t row = begin + warp; row < last; row += kWarps) {
      float values[N];
      load_row<Aligned>(x + row * args.x_stride, column, hidden, values);
#pragma unroll
      for (int j = 0; j < N; j++) {
        if (kind == PoolingKind::max) {
          total[j] = larger(values[j], total[j]);
        } else {
          // Kahan's sum: a mean over thousands of rows keeps its precision. An infinity must not become NaN.
          float term = values[j] - lost[j], sum = total[j] + term;
          lost[j] = fabsf(sum) < INFINITY ? (sum - total[j]) - term : 0.0f;
          total[j] = sum;
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < N; j++) scratch[(warp * N + j) * 32 + lane] = total[j];
  __syncthreads();
  if (warp != 0 || column >= hidden) return;
  const float count = kind == PoolingKind::mean ? float(end - begin) : 1.0f;
#pragma unroll
  for (int j = 0; j < N; j++) {
    for (int other = 1; other < kWarps; other++) {
      float value = scratch[(other * N + j) * 32 + lane];
      total[j] = kind == PoolingKind::max ? larger(value, total[j]) : total[j] + value;
    }
    total[j] = outside ? __uint_as_float(0x7FFFFFFFu) : begin == end ? 0.0f : total[j] / count;
  }
  store_row<Aligned>(static_cast<T *>(args.out) + note * args.out_stride, column, hidden, total);
}

template <typename T, PoolingKind kind> int run(const PoolingArgs &args, Stream stream) {
  constexpr int N = Vector<T>::N;
  const bool aligned = args.hidden % N == 0 && args.x_stride % N == 0 && args.out_stride % N == 0 &&
                       on_16_bytes(args.x) && on_16_bytes(args.out);
  const dim3 grid(unsigned(args.batch), blocks(args.hidden, 32 * N));
  return aligned ? launch<&pooling_kernel<T, kind, true>>(grid, 32 * kWarps, stream, args)
                 : launch<&pooling_kernel<T, kind, false>>(grid, 32 * kWarps, stream, args);
}

template <typename T> int run(const PoolingArgs &args, PoolingKind kind, Stream stream) {
  if (kind == PoolingKind::first_token) return run<T, PoolingKind::first_token>(args, stream);
  return kind == PoolingKind::mean ? run<T, PoolingKind::mean>(args, stream) : run<T, PoolingKind::max>(args, stream);
}

}  // namespace

int pooling(const PoolingArgs &args, PoolingKind kind, DType dtype, Stream stream) {
  if (dtype == DType::f32) return run<float>(args, kind, stream);
  return dtype == DType::bf16 ? run<bfloat16>(args, kind, stream) : run<float16>(args, kind, stream);
}

}  // namespace cuda
}  // namespace clinfast
