// Attention for fp16 and bf16 on sm_80 and later: mma.sync, and cp.async one tile of keys ahead. A note of up to two
// tiles of keys is loaded whole, and its softmax needs one pass. Which way a note goes depends on its keys alone, and
// so do its bits.
#include "cuda/attention_tile.cuh"

namespace clinfast {
namespace cuda {
namespace {

template <int HeadDim> struct Shape {
  static constexpr int D = HeadDim;
  static constexpr int kWarps = D == 128 ? 8 : 4;
  static constexpr int kTiles = D <= 64 ? 2 : 1;  // of 16 queries a warp: each key fragment serves both
  static constexpr int kKeys = D <= 128 ? 64 : 32;
  static constexpr bool kHeld = D == 32 || D == 128;  // queries stay in registers; at 64 there is no room
  static constexpr bool kWhole = D <= 128;
  static constexpr int kRows = kWarps * kTiles * 16, kThreads = kWarps * 32;
  static constexpr size_t kShared = size_t(kRows + 4 * kKeys) * D * 2;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

template <typename T> struct Source {
  const T *q, *k, *v;
  T *out;
};

template <typename T> __device__ __forceinline__ Source<T> source_of(const AttentionArgs &args, const Work &work) {
  const int64_t head = blockIdx.y;
  return {static_cast<const T *>(args.q) + work.q_begin * args.q_token_stride + head * args.q_head_stride,
          static_cast<const T *>(args.k) + work.k_begin * args.k_token_stride + head * args.k_head_stride,
          static_cast<const T *>(args.v) + work.k_begin * args.v_token_stride + head * args.v_head_stride,
          static_cast<T *>(args.out) + work.q_begin * args.out_token_stride + head * args.out_head_stride};
}

template <typename T, typename S>
__device__ __forceinline__ void whole_note(const AttentionArgs &args, const Work &work, T *queries, T *keys,
                                           T *values) {
  constexpr int D = S::D, kAll = 2 * S::kKeys;
  const Source<T> source = source_of<T>(args, work);
  load_tile<D, S::kRows, S::kThreads>(queries, source.q, args.q_token_stride, work.rows, args);
  load_tile<D, kAll, S::kThreads>(keys, source.k, args.k_token_stride, work.keys, args);
  cp_async_commit();
  load_tile<D, kAll, S::kThreads>(values, source.v, args.v_token_stride, work.keys, args);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  const int first = threadIdx.x / 32 * S::kTiles * 16;
  const float factor = args.scale * 1.4426950408889634f;
  bool waited = false;
#pragma unroll 1
  for (int row = first; row < first + 16 * S::kTiles; row += 16) {
    float s[1][kAll / 8][4], o[1][D / 8][4] = {};
    Softmax<1> softmax;
    softmax.clear();
    if (row < work.rows) {
      uint32_t none[1][1][4] = {};
      score<T, D, 1, kAll / 8, false, true>(s, none, queries + row * D, keys, work.keys);
      softmax.update<true>(s, o, factor, work.keys);
    }
    if (!waited) {
      cp_async_wait<0>();
      __syncthreads();
      waited = true;
    }
    if (row >= work.rows) continue;
    add_values<T, D, 1, kAll / 8, true>(o, s, values, work.keys);
    write_queries<T, D>(o[0], softmax.sum[0], queries + row * D, source.out + row * args.out_token_stride,
                        work.rows - row, args);
  }
}

template <typename T, typename S>
__device__ __forceinline__ void long_note(const AttentionArgs &args, const Work &work, T *queries, T *keys, T *values) {
  constexpr int D = S::D, N = S::kKeys / 8, kTiles = S::kTiles, kStage = S::kKeys * D;
  const Source<T> source = source_of<T>(args, work);
  load_tile<D, S::kRows, S::kThreads>(queries, source.q, args.q_token_stride, work.rows, args);
  load_tile<D, S::kKeys, S::kThreads>(keys, source.k, args.k_token_stride, work.keys, args);
  cp_async_commit();
  load_tile<D, S::kKeys, S::kThreads>(values, source.v, args.v_token_stride, work.keys, args);
  cp_async_commit();
  const int first = threadIdx.x / 32 * kTiles * 16;
  const bool active = first < work.rows;
  const float factor = args.scale * 1.4426950408889634f;
  uint32_t held[kTiles][S::kHeld ? D / 16 : 1][4];
  if constexpr (S::kHeld) {
    cp_async_wait<1>();
    __syncthreads();
#pragma unroll
    for (int t = 0; t < kTiles; t++)
#pragma unroll
      for (int step = 0; step < D / 16; step++) load_queries<D>(held[t][step], queries, first + 16 * t, step);
  }
  float s[kTiles][N][4], o[kTiles][D / 8][4] = {};
  Softmax<kTiles> softmax;
  softmax.clear();
  for (int start = 0, stage = 0; start < work.keys; start += S::kKeys, stage ^= 1) {
    const int count = work.keys - start, after = count - S::kKeys;
    const bool last = after <= 0;
    const T *tile_keys = keys + stage * kStage, *tile_values = values + stage * kStage;
    cp_async_wait<1>();
    __syncthreads();
    if (!last)
      load_tile<D, S::kKeys, S::kThreads>(keys + (stage ^ 1) * kStage,
                                          source.k + (start + S::kKeys) * args.k_token_stride, args.k_token_stride,
                                          after, args);
    cp_async_commit();
    if (active && !last) {
      score<T, D, kTiles, N, S::kHeld, false>(s, held, queries + first * D, tile_keys, count);
      softmax.template update<false>(s, o, factor, count);
    } else if (active) {
      score<T, D, kTiles, N, S::kHeld, true>(s, held, queries + first * D, tile_keys, count);
      softmax.template update<true>(s, o, factor, count);
    }
    cp_async_wait<1>();
    __syncthreads();
    if (!last)
      load_tile<D, S::kKeys, S::kThreads>(values + (stage ^ 1) * kStage,
                                          source.v + (start + S::kKeys) * args.v_token_stride, args.v_token_stride,
                                          after, args);
    cp_async_commit();
    if (active && !last)
      add_values<T, D, kTiles, N, false>(o, s, tile_values, count);
    else if (active)
      add_values<T, D, kTiles, N, true>(o, s, tile_values, count);
  }
#pragma unroll
  for (int t = 0; t < kTiles; t++) {
    const int row = first + 16 * t;
    if (row < work.rows)
      write_queries<T, D>(o[t], softmax.sum[t], queries + row * D, source.out + row * args.out_token_stride,
                          work.rows - row, args);
  }
}

#endif

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads) attention_mma_kernel(const AttentionArgs args) {
  after_earlier_grids();
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  CLINFAST_DYNAMIC_SHARED(memory);
  T *queries = reinterpret_cast<T *>(memory), *keys = queries + S::kRows * S::D, *values = keys + 2 * S::kKeys * S::D;
  const Work work = find_work<S::kRows>(args);
  if (is_trivial<T, S::kRows>(args, work)) return;
  if constexpr (S::kWhole) {
    if (work.keys <= 2 * S::kKeys) {
      whole_note<T, S>(args, work, queries, keys, values);
      return;
    }
  }
  long_note<T, S>(args, work, queries, keys, values);
#endif
}

template <typename T, typename S> int run(const AttentionArgs &args, Stream stream) {
  return launch<&attention_mma_kernel<T, S>, S::kShared>(dim3(slots<S::kRows>(args), args.num_heads), S::kThreads,
                                                        stream, args);
}

template <typename T> int run(const AttentionArgs &args, Stream stream) {
  if (args.head_dim <= 32) return run<T, Shape<32>>(args, stream);
  if (args.head_dim <= 64) return run<T, Shape<64>>(args, stream);
  if (args.head_dim <= 128) return run<T, Shape<128>>(args, stream);
  return run<T, Shape<256>>(args, stream);
}

}  // namespace

int attention_mma(const AttentionArgs &args, DType dtype, Stream stream) {
  return dtype == DType::bf16 ? run<bfloat16>(args, stream) : run<float16>(args, stream);
}

}  // namespace cuda
}  // namespace clinfast
