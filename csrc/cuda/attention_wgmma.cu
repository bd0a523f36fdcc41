// Attention for fp16 and bf16 on Hopper: a producer warpgroup copies keys and values two tiles ahead, two consumer
// warpgroups of 64 queries each multiply by wgmma, the scores of one tile while the values of the one before are added,
// as in FlashAttention-3 (Shah et al., arXiv:2407.08608). The copies are cp.async and not TMA: rows past a note's end
// must come as zeros, and a box of a tensor map would bring the next note's.
#include "cuda/attention_tile.cuh"
#include "cuda/wgmma.cuh"

namespace clinfast {
namespace cuda {

#if defined(__CUDACC__)
namespace {

constexpr int kRows = 128, kKeys = 128, kGroup = 128, kThreads = 3 * kGroup, kStages = 2, kHalf = 64;

struct Barriers {
  uint64_t keys_full[kStages], keys_empty[kStages], values_full[kStages], values_empty[kStages];
};

template <int D> constexpr size_t kShared = 1024 + size_t(kRows + 2 * kStages * kKeys) * D * 2 + sizeof(Barriers);

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Rows [0, valid) of D columns, in blocks of 64 columns: each block holds all Rows, in the 128-byte swizzle.
template <int D, int Rows, typename T>
__device__ __forceinline__ void copy_rows(T *to, const T *from, int64_t stride, int valid, int thread) {
  const int chunk = thread % 8;
#pragma unroll
  for (int block = 0; block < D / kHalf; block++)
#pragma unroll 4
    for (int row = thread / 8; row < Rows; row += kGroup / 8) {
      const bool present = row < valid;
      cp_async_16(to + block * Rows * kHalf + swizzled<kHalf>(row, chunk),
                  present ? from + row * stride + block * kHalf + chunk * 8 : from, present);
    }
}

template <typename T, int D> struct Kernel {
  T *queries, *keys, *values;
  Barriers *barriers;
  const AttentionArgs &args;
  const Work &work;

  __device__ __forceinline__ int tiles() const { return (work.keys + kKeys - 1) / kKeys; }

  static __device__ __forceinline__ void announce(uint64_t *full) {
    fence_for_wgmma();
    barrier_arrive(full);
  }

  // The next copies go out before the last are waited for and announced, unless they have no room yet.
  __device__ __forceinline__ void produce() const {
    const int thread = threadIdx.x % kGroup;
    const int64_t head = blockIdx.y;
    const T *k = static_cast<const T *>(args.k) + work.k_begin * args.k_token_stride + head * args.k_head_stride;
    const T *v = static_cast<const T *>(args.v) + work.k_begin * args.v_token_stride + head * args.v_head_stride;
    uint64_t *announced = nullptr;
#pragma unroll 1
    for (int i = 0; i < 2 * tiles(); i++) {
      const int tile = i / 2, stage = tile % kStages, first = tile * kKeys, left = work.keys - first;
      const bool is_key = i % 2 == 0;
      uint64_t *empty = is_key ? &barriers->keys_empty[stage] : &barriers->values_empty[stage];
      const int parity = (tile / kStages - 1) % 2;
      if (tile >= kStages && !barrier_passed(empty, parity)) {
        cp_async_wait<0>();
        if (announced) announce(announced);
        announced = nullptr;
        barrier_wait(empty, parity);
      }
      if (is_key)
        copy_rows<D, kKeys>(keys + stage * kKeys * D, k + first * args.k_token_stride, args.k_token_stride, left,
                            thread);
      else
        copy_rows<D, kKeys>(values + stage * kKeys * D, v + first * args.v_token_stride, args.v_token_stride, left,
                            thread);
      cp_async_commit();
      if (announced) {
        cp_async_wait<1>();
        announce(announced);
      }
      announced = is_key ? &barriers->keys_full[stage] : &barriers->values_full[stage];
    }
    cp_async_wait<0>();
    announce(announced);
  }

  __device__ __forceinline__ void release(uint64_t *barrier) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
  }

  __device__ __forceinline__ void begin_scores(float (&s)[16][4], uint64_t q, int tile) const {
    const int stage = tile % kStages;
    barrier_wait(&barriers->keys_full[stage], tile / kStages % 2);
    hold(s);
    wgmma_begin();
    const T *of_stage = keys + stage * kKeys * D;
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
      const int block = step / 4, within = step % 4 * 2;  // 32 bytes a step
      wgmma_scores<T>(s, q + block * (kRows * kHalf * 2 >> 4) + within,
                      descriptor(of_stage + block * kKeys * kHalf, 16) + within, step > 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void begin_values(float (&o)[D / 8][4], const uint32_t (&shares)[8][4], int tile) const {
    const int stage = tile % kStages;
    barrier_wait(&barriers->values_full[stage], tile / kStages % 2);
    hold(o);
    wgmma_begin();
    const uint64_t v = descriptor(values + stage * kKeys * D, kKeys * kHalf * 2);
#pragma unroll
    for (int step = 0; step < kKeys / 16; step++) wgmma_values<T, D>(o, shares[step], v + step * (16 * 128 >> 4));
    wgmma_commit();
  }

  static __device__ __forceinline__ void pack_shares(uint32_t (&shares)[8][4], const float (&s)[16][4]) {
#pragma unroll
    for (int step = 0; step < 8; step++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        shares[step][i] = pack_pair<T>(s[2 * step + i / 2][i % 2 * 2], s[2 * step + i / 2][i % 2 * 2 + 1]);
  }

  __device__ __forceinline__ void consume(int group, int groups) const {
    const int thread = threadIdx.x % kGroup, first = group * 64;
    const int64_t head = blockIdx.y;
    const T *q = static_cast<const T *>(args.q) + work.q_begin * args.q_token_stride + head * args.q_head_stride;
#pragma unroll
    for (int block = 0; block < D / kHalf; block++)
      copy_rows<kHalf, 64>(queries + (block * kRows + first) * kHalf, q + first * args.q_token_stride + block * kHalf,
                           args.q_token_stride, work.rows - first, thread);
    cp_async_commit();
    cp_async_wait<0>();
    fence_for_wgmma();
    named_barrier(1 + group, kGroup);
    const uint64_t of_queries = descriptor(queries + first * kHalf, 16);
    const float factor = args.scale * 1.4426950408889634f;
    float s[1][16][4], o[1][D / 8][4] = {}, fades[1][2];
    uint32_t shares[8][4];
    Softmax<1> softmax;
    softmax.clear();
    const int last = tiles() - 1;
    begin_scores(s[0], of_queries, 0);
    wgmma_wait<0>();
    hold(s[0]);
    release(&barriers->keys_empty[0]);
    softmax.template shares<true>(s, fades, factor, work.keys);
    pack_shares(shares, s[0]);
#pragma unroll 1
    for (int tile = 1; tile <= last; tile++) {
      begin_scores(s[0], of_queries, tile);
      begin_values(o[0], shares, tile - 1);
      wgmma_wait<1>();
      hold(s[0]);
      release(&barriers->keys_empty[tile % kStages]);
      softmax.template shares<true>(s, fades, factor, work.keys - tile * kKeys);
      wgmma_wait<0>();
      hold(o[0]);
      release(&barriers->values_empty[(tile - 1) % kStages]);
      Softmax<1>::fade(o, fades);
      pack_shares(shares, s[0]);
    }
    begin_values(o[0], shares, last);
    wgmma_wait<0>();
    hold(o[0]);
    // The results go out through the memory of the queries, which the other group may still read.
    named_barrier(3, groups * kGroup);
    const int row = first + thread / 32 * 16;
    T *out = static_cast<T *>(args.out) + work.q_begin * args.out_token_stride + head * args.out_head_stride;
    if (row < work.rows)
      write_queries<T, D>(o[0], softmax.sum[0], queries + row * D, out + row * args.out_token_stride, work.rows - row,
                          args);
  }
};

#endif

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 1) attention_wgmma_kernel(const AttentionArgs args) {
  after_earlier_grids();
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  CLINFAST_DYNAMIC_SHARED(memory);
  const Work work = find_work<kRows>(args);
  if (is_trivial<T, kRows>(args, work)) return;
  T *queries = reinterpret_cast<T *>(memory + (1024 - shared_address(memory) % 1024) % 1024);
  T *keys = queries + kRows * D, *values = keys + kStages * kKeys * D;
  Barriers *barriers = reinterpret_cast<Barriers *>(values + kStages * kKeys * D);
  const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / kGroup, 0), groups = work.rows > 64 ? 2 : 1;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; stage++) {
      barrier_create(&barriers->keys_full[stage], kGroup);
      barrier_create(&barriers->values_full[stage], kGroup);
      barrier_create(&barriers->keys_empty[stage], 4 * groups);
      barrier_create(&barriers->values_empty[stage], 4 * groups);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const Kernel<T, D> kernel{queries, keys, values, barriers, args, work};
  if (group == 0) {
    give_registers<40>();
    kernel.produce();
  } else {
    take_registers<232>();
    if (group <= groups) kernel.consume(group - 1, groups);
  }
#endif
}

template <typename T, int D> int run(const AttentionArgs &args, Stream stream) {
  return launch<&attention_wgmma_kernel<T, D>, kShared<D>>(dim3(slots<kRows>(args), args.num_heads), kThreads, stream,
                                                          args);
}

template <typename T> int run(const AttentionArgs &args, Stream stream) {
  return args.head_dim == 64 ? run<T, 64>(args, stream) : run<T, 128>(args, stream);
}

}  // namespace

int attention_wgmma(const AttentionArgs &args, DType dtype, Stream stream) {
  return dtype == DType::bf16 ? run<bfloat16>(args, stream) : run<float16>(args, stream);
}

#else

int attention_wgmma(const AttentionArgs &, DType, Stream) { return kNotServed; }

#endif

}  // namespace cuda
}  // namespace clinfast
