// From a padded batch to packed tokens and back. `pack` is two launches: a block a note counts and looks for values out
// of range; then each block adds up the lengths before its note and writes its part of the order.
#include "cuda/launch.cuh"

namespace clinfast {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int32_t kNone = 0x7FFFFFFF;

__device__ __forceinline__ int64_t id_at(const void *ids, int64_t at, int itemsize) {
  return itemsize == 8 ? static_cast<const int64_t *>(ids)[at] : static_cast<const int32_t *>(ids)[at];
}

__device__ __forceinline__ bool is_real(const PackArgs &args, int64_t note, int64_t column) {
  if (!args.mask) return true;
  const int64_t at = note * args.mask_row_stride + column * args.mask_column_stride;
  if (args.mask_itemsize == 1) return static_cast<const uint8_t *>(args.mask)[at] != 0;
  return id_at(args.mask, at, args.mask_itemsize) != 0;
}

template <typename T, typename Combine> __device__ __forceinline__ T warp_all(T x, Combine combine) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = combine(x, __shfl_xor_sync(0xFFFFFFFFu, x, mask));
  return x;
}

template <typename T, typename Combine> __device__ __forceinline__ T block_all(T x, T *scratch, Combine combine) {
  x = warp_all(x, combine);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = scratch[0];
  for (int i = 1; i < kWarps; i++) x = combine(x, scratch[i]);
  __syncthreads();
  return x;
}

struct Plus {
  template <typename T> __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};
struct Least {
  template <typename T> __device__ __forceinline__ T operator()(T a, T b) const { return a < b ? a : b; }
};
struct Most {
  template <typename T> __device__ __forceinline__ T operator()(T a, T b) const { return a > b ? a : b; }
};

// How many of the threads before this one hold `flag`, and in `total` how many of the block do.
__device__ __forceinline__ int rank_in_block(bool flag, int *scratch, int &total) {
  const unsigned votes = __ballot_sync(0xFFFFFFFFu, flag);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane == 0) scratch[warp] = __popc(votes);
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; i++) {
    before += i < warp ? scratch[i] : 0;
    total += scratch[i];
  }
  __syncthreads();
  return before + __popc(votes & ((1u << lane) - 1));
}

__global__ void __launch_bounds__(kThreads, 4) count_kernel(const PackArgs args) {
  after_earlier_grids();
  CLINFAST_SHARED(int, scratch, kWarps);
  const int64_t note = blockIdx.x;
  int length = 0, bad_id = kNone, bad_type = kNone;
  for (int64_t column = threadIdx.x; column < args.seqlen; column += kThreads) {
    const int at = int(note * args.seqlen + column);
    length += is_real(args, note, column);
    const int64_t id =
        id_at(args.input_ids, note * args.ids_row_stride + column * args.ids_column_stride, args.ids_itemsize);
    if (id < 0 || id >= args.vocab_size) bad_id = min(bad_id, at);
    if (args.token_type_ids) {
      const int64_t type = id_at(args.token_type_ids, note * args.types_row_stride + column * args.types_column_stride,
                                 args.types_itemsize);
      if (type < 0 || type >= args.type_vocab_size) bad_type = min(bad_type, at);
    }
  }
  length = block_all(length, scratch, Plus());
  bad_id = block_all(bad_id, scratch, Least());
  bad_type = block_all(bad_type, scratch, Least());
  if (threadIdx.x == 0) {
    args.seqused_k[note] = length;
    args.notes[note] = bad_id;
    args.notes[args.batch + note] = bad_type;
  }
}

__device__ __forceinline__ int packed_length(const PackArgs &args, int64_t note) {
  return args.keep_padding ? int(args.seqlen) : args.seqused_k[note];
}

__device__ __forceinline__ void write_facts(const PackArgs &args, int *scratch) {
  int tokens = 0, longest = 0, empty = 0, bad_id = kNone, bad_type = kNone, masked = kNone;
  for (int64_t note = threadIdx.x; note < args.batch; note += kThreads) {
    const int length = packed_length(args, note);
    tokens += length;
    longest = max(longest, length);
    empty += args.seqused_k[note] == 0;
    bad_id = min(bad_id, args.notes[note]);
    bad_type = min(bad_type, args.notes[args.batch + note]);
    if (args.seqlen > 0 && !is_real(args, note, 0)) masked = min(masked, int(note));
  }
  tokens = block_all(tokens, scratch, Plus());
  longest = block_all(longest, scratch, Most());
  empty = block_all(empty, scratch, Plus());
  bad_id = block_all(bad_id, scratch, Least());
  bad_type = block_all(bad_type, scratch, Least());
  masked = block_all(masked, scratch, Least());
  if (threadIdx.x != 0) return;
  args.facts[0] = tokens;
  args.facts[1] = longest;
  args.facts[2] = empty;
  args.facts[3] = bad_id == kNone ? -1 : bad_id;
  args.facts[4] = bad_type == kNone ? -1 : bad_type;
  args.facts[5] = masked == kNone ? -1 : masked;
  args.cu_seqlens[args.batch] = tokens;
}

__global__ void __launch_bounds__(kThreads, 4) order_kernel(const PackArgs args) {
  after_earlier_grids();
  CLINFAST_SHARED(int, scratch, kWarps);
  const int64_t note = blockIdx.x;
  if (note == args.batch) {
    write_facts(args, scratch);
    return;
  }
  int before = 0;
  for (int64_t other = threadIdx.x; other < note; other += kThreads) before += packed_length(args, other);
  before = block_all(before, scratch, Plus());
  if (threadIdx.x == 0) args.cu_seqlens[note] = before;
  int real = before, padded = before + args.seqused_k[note];
  for (int64_t start = 0; start < args.seqlen; start += kThreads) {
    const int64_t column = start + threadIdx.x;
    const bool inside = column < args.seqlen, kept = inside && is_real(args, note, column);
    int count;
    const int rank = rank_in_block(kept, scratch, count);
    if (kept) args.indices[real + rank] = int(note * args.seqlen + column);
    // Threads before this one that hold no real token hold a padded one: only the last threads are outside.
    if (inside && !kept && args.keep_padding)
      args.indices[padded + int(threadIdx.x) - rank] = int(note * args.seqlen + column);
    real += count;
    padded += int(min(int64_t(kThreads), args.seqlen - start)) - count;
  }
}

__global__ void __launch_bounds__(kThreads) position_kernel(const PositionArgs args) {
  after_earlier_grids();
  CLINFAST_SHARED(int, scratch, kWarps);
  const int64_t row = blockIdx.x;
  int before = int(args.padding_idx);
  for (int64_t start = 0; start < args.seqlen; start += kThreads) {
    const int64_t column = start + threadIdx.x;
    const bool inside = column < args.seqlen;
    const bool counts =
        inside && id_at(args.input_ids, row * args.row_stride + column * args.column_stride, args.itemsize) !=
                      args.padding_idx;
    int count;
    const int rank = rank_in_block(counts, scratch, count);
    if (inside) args.position_ids[row * args.seqlen + column] = counts ? before + rank + 1 : int(args.padding_idx);
    before += count;
  }
}

template <typename From, typename To, bool Aligned>
__global__ void __launch_bounds__(kThreads) unpack_kernel(const UnpackArgs args) {
  after_earlier_grids();
  constexpr int N = Vector<From>::N;
  const uint32_t a_row = uint32_t(args.hidden + N - 1) / N, at = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t token = at / a_row;
  const int column = int(at - token * a_row) * N;
  if (token >= args.tokens) return;
  const int64_t position = args.indices[token];
  if (position < 0 || position >= args.positions) return;
  float values[N];
  load_row<Aligned>(static_cast<const From *>(args.packed) + int64_t(token) * args.packed_stride, column,
                    int(args.hidden), values);
  store_row<Aligned>(static_cast<To *>(args.padded) + position * args.hidden, column, int(args.hidden), values);
}

template <typename From, typename To> int run(const UnpackArgs &args, Stream stream) {
  constexpr int N = Vector<From>::N;
  const bool aligned = args.hidden % 8 == 0 && args.packed_stride % N == 0 && on_16_bytes(args.packed) &&
                       on_16_bytes(args.padded);
  const int64_t work = args.tokens * ((args.hidden + N - 1) / N);
  if (work > kMostVectors) return kTooLarge;
  const unsigned grid = blocks(work, kThreads);
  return aligned ? launch<&unpack_kernel<From, To, true>, 0, false>(grid, kThreads, stream, args)
                 : launch<&unpack_kernel<From, To, false>, 0, false>(grid, kThreads, stream, args);
}

template <typename From> int run(const UnpackArgs &args, DType padded_dtype, Stream stream) {
  if (padded_dtype == DType::f32) return run<From, float>(args, stream);
  return padded_dtype == DType::bf16 ? run<From, bfloat16>(args, stream) : run<From, float16>(args, stream);
}

int fill_zero(void *memory, size_t bytes, Stream stream) {
#if defined(__CUDACC__)
  return bytes ? int(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream))) : 0;
#else
  (void)stream;
  memset(memory, 0, bytes);
  return 0;
#endif
}

}  // namespace

int pack(const PackArgs &args, Stream stream) {
  const int error = launch<&count_kernel>(unsigned(args.batch), kThreads, stream, args);
  return error ? error : launch<&order_kernel>(unsigned(args.batch + 1), kThreads, stream, args);
}

int position_ids(const PositionArgs &args, Stream stream) {
  return launch<&position_kernel>(unsigned(args.batch), kThreads, stream, args);
}

int unpack(const UnpackArgs &args, DType packed_dtype, DType padded_dtype, Stream stream) {
  const size_t bytes = size_t(args.positions * args.hidden) * (padded_dtype == DType::f32 ? 4 : 2);
  const int error = fill_zero(args.padded, bytes, stream);
  if (error) return error;
  if (packed_dtype == DType::f32) return run<float>(args, padded_dtype, stream);
  return packed_dtype == DType::bf16 ? run<bfloat16>(args, padded_dtype, stream)
                                     : run<float16>(args, padded_dtype, stream);
}

}  // namespace cuda
}  // namespace clinfast
