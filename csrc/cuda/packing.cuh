// What packing.cu and packing_buffers.cu share: reading ids and masks of any layout, and sums over a block.
#pragma once

#include "cuda/launch.cuh"

namespace clinfast {
namespace cuda {

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

__device__ __forceinline__ int64_t input_id(const PackArgs &args, int64_t note, int64_t column) {
  return id_at(args.input_ids, note * args.ids_row_stride + column * args.ids_column_stride, args.ids_itemsize);
}

__device__ __forceinline__ int64_t token_type(const PackArgs &args, int64_t note, int64_t column) {
  return id_at(args.token_type_ids, note * args.types_row_stride + column * args.types_column_stride,
               args.types_itemsize);
}

__device__ __forceinline__ int packed_length(const PackArgs &args, int64_t note) {
  return args.keep_padding ? int(args.seqlen) : args.seqused_k[note];
}

// Of the notes that one thread has seen; `write` adds up those of a block.
struct Facts {
  int tokens = 0, longest = 0, empty = 0, bad_id = kNone, bad_type = kNone, masked = kNone;

  __device__ __forceinline__ void add_note(const PackArgs &args, int64_t note, int length, int used) {
    tokens += length;
    longest = max(longest, length);
    empty += used == 0;
    if (args.seqlen > 0 && !is_real(args, note, 0)) masked = min(masked, int(note));
  }

  __device__ __forceinline__ void write(const PackArgs &args, int *scratch) {
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
};

// What count_notes found.
__device__ __forceinline__ Facts counted_facts(const PackArgs &args) {
  Facts facts;
  for (int64_t note = threadIdx.x; note < args.batch; note += kThreads) {
    facts.add_note(args, note, packed_length(args, note), args.seqused_k[note]);
    facts.bad_id = min(facts.bad_id, args.notes[note]);
    facts.bad_type = min(facts.bad_type, args.notes[args.batch + note]);
  }
  return facts;
}

// Launches what counts each note's real tokens into seqused_k and looks for values out of range, into `notes`.
int count_notes(const PackArgs &args, Stream stream);

}  // namespace cuda
}  // namespace clinfast
