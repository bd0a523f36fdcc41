// Attention for a query or two a note, as under a head that reads the first token: one query fills no tile of a product,
// and what counts is how soon its keys are read. A block has one query of one head and a segment of the note's keys, which
// its warps take in turn; what they found is combined in the order of the warps, and of the segments, so that the bits
// of a query depend on its own note alone (the split of Flash-Decoding: Dao et al., 2023).
#include "cuda/attention.cuh"

namespace clinfast {
namespace cuda {
namespace {

constexpr int kWarps = 8, kUnroll = 4, kEach = 8;  // columns of a lane

// Columns [column, column + 8) of a row, as they lie in memory: so loads go out before any is waited for.
template <typename T> struct Columns {
  static constexpr int N = Vector<T>::N;
  Vector<T> parts[kEach / N];

  __device__ __forceinline__ void load(const T *row, int column, const AttentionArgs &args) {
    if (args.vectors) {
#pragma unroll
      for (int i = 0; i < kEach / N; i++) parts[i] = *reinterpret_cast<const Vector<T> *>(row + column + i * N);
    } else {
#pragma unroll
      for (int j = 0; j < kEach; j++)
        parts[j / N].at[j % N] = column + j < args.head_dim ? row[column + j] : from_float<T>(0.0f);
    }
  }

  __device__ __forceinline__ float operator[](int j) const { return to_float(parts[j / N].at[j % N]); }
};

// What some keys add to a query's result; `most` in units of log2, and -infinity where there were none.
struct Sums {
  float most, sum, o[kEach];

  __device__ __forceinline__ void clear() {
    most = -INFINITY, sum = 0;
#pragma unroll
    for (int j = 0; j < kEach; j++) o[j] = 0;
  }
};

__device__ __forceinline__ float finite_or_zero(float most) { return most == -INFINITY ? 0.0f : most; }

template <typename T, int D>
__device__ __forceinline__ void add_keys(const AttentionArgs &args, const Work &work, const float (&q)[kEach], int first,
                                         int end, int column, int64_t head, Sums &sums) {
  constexpr int kLanes = D / kEach, kGroups = 32 / kLanes, kAtOnce = kWarps * kGroups;
  const int group = threadIdx.x / kLanes;
  const T *k = static_cast<const T *>(args.k) + work.k_begin * args.k_token_stride + head * args.k_head_stride;
  const T *v = static_cast<const T *>(args.v) + work.k_begin * args.v_token_stride + head * args.v_head_stride;
#pragma unroll 1
  for (int start = first; start < end; start += kAtOnce * kUnroll) {
    float s[kUnroll];
    Columns<T> x[kUnroll], y[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      // Past the last key, the last one again: it is left out below.
      const int key = min(start + u * kAtOnce + group, end - 1);
      x[u].load(k + key * args.k_token_stride, column, args);
      y[u].load(v + key * args.v_token_stride, column, args);
    }
    float top = sums.most;
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      s[u] = 0;
#pragma unroll
      for (int j = 0; j < kEach; j++) s[u] = fmaf(q[j], x[u][j], s[u]);
#pragma unroll
      for (int mask = kLanes / 2; mask > 0; mask /= 2) s[u] += __shfl_xor_sync(0xFFFFFFFFu, s[u], mask);
      if (start + u * kAtOnce + group >= end) s[u] = -INFINITY;
      top = fmaxf(top, s[u]);
    }
    const float shift = finite_or_zero(top), fade = exp2_approximate(sums.most - shift);
    sums.most = top;
    sums.sum *= fade;
#pragma unroll
    for (int j = 0; j < kEach; j++) sums.o[j] *= fade;
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      if (start + u * kAtOnce + group >= end) continue;
      const float share = exp2_approximate(s[u] - shift);
      sums.sum += share;
#pragma unroll
      for (int j = 0; j < kEach; j++) sums.o[j] = fmaf(share, y[u][j], sums.o[j]);
    }
  }
  // The groups of a warp.
#pragma unroll
  for (int mask = kLanes; mask < 32; mask *= 2) {
    const float other = __shfl_xor_sync(0xFFFFFFFFu, sums.most, mask), top = fmaxf(sums.most, other);
    const float mine = exp2_approximate(sums.most - finite_or_zero(top));
    const float theirs = exp2_approximate(other - finite_or_zero(top));
    sums.most = top;
    sums.sum = sums.sum * mine + __shfl_xor_sync(0xFFFFFFFFu, sums.sum, mask) * theirs;
#pragma unroll
    for (int j = 0; j < kEach; j++) sums.o[j] = sums.o[j] * mine + __shfl_xor_sync(0xFFFFFFFFu, sums.o[j], mask) * theirs;
  }
}

// `parts` results of D columns each, `most` and `sum` behind the columns: their sum at `column`, scaled to the largest.
template <int D> __device__ __forceinline__ Sums combine(const float *parts, int count, int column) {
  Sums all;
  all.clear();
  for (int i = 0; i < count; i++) all.most = fmaxf(all.most, parts[i * (D + 2) + D]);
  for (int i = 0; i < count; i++) {
    const float *part = parts + i * (D + 2);
    const float weight = exp2_approximate(part[D] - finite_or_zero(all.most));
    all.sum = fmaf(part[D + 1], weight, all.sum);
    all.o[0] = fmaf(part[column], weight, all.o[0]);
  }
  return all;
}

template <typename T>
__device__ __forceinline__ T *result_row(const AttentionArgs &args, int64_t row, int64_t head) {
  return static_cast<T *>(args.out) + row * args.out_token_stride + head * args.out_head_stride;
}

template <int D> __device__ __forceinline__ float *parts_of(const AttentionArgs &args, int64_t row, int64_t head) {
  return args.partial + (row * args.num_heads + head) * args.segments * (D + 2);
}

template <typename T, int D>
__global__ void __launch_bounds__(32 * kWarps) attention_few_kernel(const AttentionArgs args) {
  after_earlier_grids();
  CLINFAST_SHARED(float, scratch, kWarps * (D + 2));
  const int64_t row = blockIdx.x, head = blockIdx.y;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, first = int(blockIdx.z) * kSegmentKeys;
  const Work work = find_row(args, row);
  if (work.rows == 0 || work.keys == 0) {
    const float value = work.rows == 0 ? __uint_as_float(0x7FFFFFFFu) : 0.0f;
    if (first == 0 && thread < args.head_dim) result_row<T>(args, row, head)[thread] = from_float<T>(value);
    return;
  }
  if (first >= work.keys) return;
  // A lane whose columns are beyond head_dim works on the first ones, and what it finds is not looked at.
  const int own = lane % (D / kEach) * kEach, column = own < args.head_dim ? own : 0;
  const T *of_query = static_cast<const T *>(args.q) + row * args.q_token_stride + head * args.q_head_stride;
  Columns<T> given;
  given.load(of_query, column, args);
  float q[kEach];
#pragma unroll
  for (int j = 0; j < kEach; j++) q[j] = own < args.head_dim ? given[j] * (args.scale * 1.4426950408889634f) : 0.0f;
  Sums sums;
  sums.clear();
  add_keys<T, D>(args, work, q, first, min(work.keys, first + kSegmentKeys), column, head, sums);
  if (lane < D / kEach) {
#pragma unroll
    for (int j = 0; j < kEach; j++) scratch[warp * (D + 2) + own + j] = sums.o[j];
    if (lane == 0) scratch[warp * (D + 2) + D] = sums.most, scratch[warp * (D + 2) + D + 1] = sums.sum;
  }
  __syncthreads();
  if (thread >= args.head_dim) return;
  const Sums all = combine<D>(scratch, kWarps, thread);
  if (args.partial == nullptr) {
    result_row<T>(args, row, head)[thread] = from_float<T>(all.o[0] / all.sum);
    return;
  }
  float *part = parts_of<D>(args, row, head) + blockIdx.z * (D + 2);
  part[thread] = all.o[0];
  if (thread == 0) part[D] = all.most, part[D + 1] = all.sum;
}

template <typename T, int D>
__global__ void __launch_bounds__(D < 32 ? 32 : D) attention_segments_kernel(const AttentionArgs args) {
  after_earlier_grids();
  const int64_t row = blockIdx.x, head = blockIdx.y;
  const int thread = threadIdx.x;
  const Work work = find_row(args, row);
  if (work.rows == 0 || work.keys == 0 || thread >= args.head_dim) return;
  const int count = (work.keys + kSegmentKeys - 1) / kSegmentKeys;
  const Sums all = combine<D>(parts_of<D>(args, row, head), count, thread);
  result_row<T>(args, row, head)[thread] = from_float<T>(all.o[0] / all.sum);
}

template <typename T, int D> int run(const AttentionArgs &args, Stream stream) {
  const dim3 grid(args.q_tokens, args.num_heads, args.partial ? args.segments : 1);
  const int error = launch<&attention_few_kernel<T, D>>(grid, 32 * kWarps, stream, args);
  if (error || !args.partial) return error;
  return launch<&attention_segments_kernel<T, D>>(dim3(args.q_tokens, args.num_heads), D, stream, args);
}

template <typename T> int run(const AttentionArgs &args, Stream stream) {
  if (args.head_dim <= 32) return run<T, 32>(args, stream);
  if (args.head_dim <= 64) return run<T, 64>(args, stream);
  if (args.head_dim <= 128) return run<T, 128>(args, stream);
  return run<T, 256>(args, stream);
}

}  // namespace

int attention_few(const AttentionArgs &args, DType dtype, Stream stream) {
  if (dtype == DType::f32) return run<float>(args, stream);
  return dtype == DType::bf16 ? run<bfloat16>(args, stream) : run<float16>(args, stream);
}

}  // namespace cuda
}  // namespace clinfast
