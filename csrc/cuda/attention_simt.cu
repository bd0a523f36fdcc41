// Attention in fp32 arithmetic: for fp32, and for 16-bit types on cards before sm_80. Tiles of queries and keys in
// shared memory, a few rows and keys a thread, the softmax kept up as keys come (Milakov and Gimelshein,
// arXiv:1805.02867).
#include "cuda/attention.cuh"

namespace clinfast {
namespace cuda {
namespace {

constexpr int kAcross = 16;  // threads that share a row

template <int D> struct Tile {
  static constexpr int kRows = D <= 64 ? 64 : D <= 128 ? 32 : 16;
  static constexpr int kKeys = D <= 64 ? 64 : 32;
  static constexpr int kDown = D <= 64 ? 16 : 8;
  static constexpr int kThreads = kAcross * kDown;
  static constexpr int kPitch = D + 4, kScorePitch = kKeys + 1;
  static constexpr size_t kShared = ((kRows + kKeys) * kPitch + kRows * kScorePitch) * sizeof(float);
};

template <typename T, int D, int Rows, int Threads>
__device__ __forceinline__ void load_tile(float *to, const T *from, int64_t stride, int rows, int head_dim) {
  for (int i = threadIdx.x; i < Rows * D; i += Threads) {
    const int row = i / D, column = i % D;
    to[row * (D + 4) + column] = row < rows && column < head_dim ? to_float(from[row * stride + column]) : 0.0f;
  }
}

__device__ __forceinline__ float row_max(float x) {
#pragma unroll
  for (int mask = kAcross / 2; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, mask));
  return x;
}

template <typename T, int D>
__global__ void __launch_bounds__(Tile<D>::kThreads) attention_simt_kernel(const AttentionArgs args) {
  after_earlier_grids();
  using S = Tile<D>;
  constexpr int R = S::kRows / S::kDown, C = S::kKeys / kAcross, V = D / kAcross;
  CLINFAST_DYNAMIC_SHARED(memory);
  float *queries = reinterpret_cast<float *>(memory), *keys = queries + S::kRows * S::kPitch;
  float *shares = keys + S::kKeys * S::kPitch;
  const Work work = find_work<S::kRows>(args);
  if (is_trivial<T, S::kRows>(args, work)) return;
  const int64_t head = blockIdx.y;
  const int across = threadIdx.x % kAcross, first = threadIdx.x / kAcross * R;
  const T *q = static_cast<const T *>(args.q) + work.q_begin * args.q_token_stride + head * args.q_head_stride;
  const T *k = static_cast<const T *>(args.k) + work.k_begin * args.k_token_stride + head * args.k_head_stride;
  const T *v = static_cast<const T *>(args.v) + work.k_begin * args.v_token_stride + head * args.v_head_stride;
  const float factor = args.scale * 1.4426950408889634f;
  load_tile<T, D, S::kRows, S::kThreads>(queries, q, args.q_token_stride, work.rows, args.head_dim);
  float o[R][V], most[R], sum[R];
#pragma unroll
  for (int r = 0; r < R; r++) {
    most[r] = -INFINITY, sum[r] = 0;
#pragma unroll
    for (int j = 0; j < V; j++) o[r][j] = 0;
  }
  for (int start = 0; start < work.keys; start += S::kKeys) {
    const int count = min(S::kKeys, work.keys - start);
    __syncthreads();
    load_tile<T, D, S::kKeys, S::kThreads>(keys, k + start * args.k_token_stride, args.k_token_stride, count,
                                           args.head_dim);
    __syncthreads();
    float s[R][C] = {};
#pragma unroll 4
    for (int d = 0; d < D; d += 4) {
      float4 a[R], b[C];
#pragma unroll
      for (int r = 0; r < R; r++) a[r] = *reinterpret_cast<float4 *>(queries + (first + r) * S::kPitch + d);
#pragma unroll
      for (int c = 0; c < C; c++) b[c] = *reinterpret_cast<float4 *>(keys + (across + c * kAcross) * S::kPitch + d);
#pragma unroll
      for (int r = 0; r < R; r++)
#pragma unroll
        for (int c = 0; c < C; c++) {
          s[r][c] = fmaf(a[r].x, b[c].x, s[r][c]);
          s[r][c] = fmaf(a[r].y, b[c].y, s[r][c]);
          s[r][c] = fmaf(a[r].z, b[c].z, s[r][c]);
          s[r][c] = fmaf(a[r].w, b[c].w, s[r][c]);
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
      float top = -INFINITY;
#pragma unroll
      for (int c = 0; c < C; c++) {
        if (across + c * kAcross >= count) s[r][c] = -INFINITY;
        top = fmaxf(top, s[r][c]);
      }
      top = fmaxf(most[r], row_max(top) * factor);
      const float fade = exp2_approximate(most[r] - top);
      most[r] = top;
      sum[r] *= fade;
#pragma unroll
      for (int c = 0; c < C; c++) {
        const float share = exp2_approximate(fmaf(s[r][c], factor, -top));
        sum[r] += share;
        shares[(first + r) * S::kScorePitch + across + c * kAcross] = share;
      }
#pragma unroll
      for (int j = 0; j < V; j++) o[r][j] *= fade;
    }
    __syncthreads();
    load_tile<T, D, S::kKeys, S::kThreads>(keys, v + start * args.v_token_stride, args.v_token_stride, count,
                                           args.head_dim);
    __syncthreads();
#pragma unroll 2
    for (int key = 0; key < S::kKeys; key++) {
      float values[V];
#pragma unroll
      for (int j = 0; j < V; j++) values[j] = keys[key * S::kPitch + across + j * kAcross];
#pragma unroll
      for (int r = 0; r < R; r++) {
        const float share = shares[(first + r) * S::kScorePitch + key];
#pragma unroll
        for (int j = 0; j < V; j++) o[r][j] = fmaf(share, values[j], o[r][j]);
      }
    }
  }
  T *out = static_cast<T *>(args.out) + work.q_begin * args.out_token_stride + head * args.out_head_stride;
#pragma unroll
  for (int r = 0; r < R; r++) {
    float total = sum[r];
#pragma unroll
    for (int mask = kAcross / 2; mask > 0; mask /= 2) total += __shfl_xor_sync(0xFFFFFFFFu, total, mask);
    if (first + r >= work.rows) continue;
#pragma unroll
    for (int j = 0; j < V; j++)
      if (across + j * kAcross < args.head_dim)
        out[(first + r) * args.out_token_stride + across + j * kAcross] = from_float<T>(o[r][j] / total);
  }
}

template <typename T, int D> int run(const AttentionArgs &args, Stream stream) {
  using S = Tile<D>;
  return launch<&attention_simt_kernel<T, D>, S::kShared>(dim3(slots<S::kRows>(args), args.num_heads), S::kThreads,
                                                         stream, args);
}

template <typename T> int run(const AttentionArgs &args, Stream stream) {
  if (args.head_dim <= 32) return run<T, 32>(args, stream);
  if (args.head_dim <= 64) return run<T, 64>(args, stream);
  if (args.head_dim <= 128) return run<T, 128>(args, stream);
  return run<T, 256>(args, stream);
}

}  // namespace

int attention_simt(const AttentionArgs &args, DType dtype, Stream stream) {
  if (dtype == DType::f32) return run<float>(args, stream);
  return dtype == DType::bf16 ? run<bfloat16>(args, stream) : run<float16>(args, stream);
}

}  // namespace cuda
}  // namespace clinfast
