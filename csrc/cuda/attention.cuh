// What the attention kernels share: which rows and keys a block has, and what it writes where nothing is to compute.
#pragma once

#include "cuda/launch.cuh"

namespace clinfast {
namespace cuda {

// Queries are cut into tiles that start at their note's first row. Tile i of note b has slot
// cu_seqlens_q[b] / Rows + b + i: no two tiles share one, there are q_tokens / Rows + batch of them, and the host need
// not know a length.
template <int Rows> inline unsigned slots(const AttentionArgs &args) { return args.q_tokens / Rows + args.batch; }

struct Work {
  int64_t q_begin, k_begin;
  int rows, keys;      // of this tile, and of its note
  int64_t unowned;     // rows from here on to the end of q belong to no note, where boundaries end too early
};

__device__ __forceinline__ int64_t within(int64_t x, int64_t most) { return x < 0 ? 0 : x > most ? most : x; }

// The last note that has started, as `started(note)` says: a search in steps of 32, by the lanes of every warp.
template <typename Started> __device__ __forceinline__ int last_note(int notes, Started started) {
  const int lane = threadIdx.x % 32;
  int first = 0, count = notes;
  while (count > 1) {
    const int step = (count + 31) / 32, note = first + lane * step;
    const bool starts = lane * step < count && started(note);
    const int found = max(__popc(__ballot_sync(0xFFFFFFFFu, starts)) - 1, 0);
    first += found * step;
    count = min(step, count - found * step);
  }
  return first;
}

__device__ __forceinline__ void find_keys(const AttentionArgs &args, int note, Work &work) {
  work.k_begin = within(args.cu_seqlens_k[note], args.k_tokens);
  int64_t keys = within(args.cu_seqlens_k[note + 1], args.k_tokens) - work.k_begin;
  if (args.seqused_k) keys = min(keys, int64_t(args.seqused_k[note]));
  work.keys = int(max(keys, int64_t(0)));
}

template <int Rows> __device__ __forceinline__ Work find_work(const AttentionArgs &args) {
  const int slot = int(blockIdx.x);
  const int note = last_note(args.batch, [&](int n) { return args.cu_seqlens_q[n] / Rows + n <= slot; });
  const int64_t begin = within(args.cu_seqlens_q[note], args.q_tokens);
  const int64_t end = within(args.cu_seqlens_q[note + 1], args.q_tokens);
  Work work;
  work.q_begin = begin + int64_t(slot - (int(begin / Rows) + note)) * Rows;
  work.rows = int(within(end - work.q_begin, Rows));
  find_keys(args, note, work);
  work.unowned = note + 1 == args.batch ? max(end, work.q_begin) : int64_t(args.q_tokens);
  return work;
}

// Of one row of q, whose rows are 0 where no note owns it.
__device__ __forceinline__ Work find_row(const AttentionArgs &args, int64_t row) {
  const int note = last_note(args.batch, [&](int n) { return args.cu_seqlens_q[n] <= row; });
  Work work;
  work.q_begin = row;
  work.rows = args.cu_seqlens_q[note] <= row && row < args.cu_seqlens_q[note + 1];
  find_keys(args, note, work);
  work.unowned = args.q_tokens;
  return work;
}

template <typename T>
__device__ __forceinline__ void fill_rows(const AttentionArgs &args, int64_t first, int64_t end, float value) {
  T *out = static_cast<T *>(args.out) + int64_t(blockIdx.y) * args.out_head_stride;
  for (int64_t row = first; row < end; row++)
    for (int column = threadIdx.x; column < args.head_dim; column += blockDim.x)
      out[row * args.out_token_stride + column] = from_float<T>(value);
}

// True where nothing is left to do: no rows, or no keys, whose result is zero.
template <typename T, int Rows>
__device__ __forceinline__ bool is_trivial(const AttentionArgs &args, const Work &work) {
  if (work.rows < Rows && work.unowned < args.q_tokens)
    fill_rows<T>(args, work.unowned, min(work.unowned + Rows - work.rows, int64_t(args.q_tokens)),
                 __uint_as_float(0x7FFFFFFFu));
  if (work.rows > 0 && work.keys == 0) fill_rows<T>(args, work.q_begin, work.q_begin + work.rows, 0.0f);
  return work.rows == 0 || work.keys == 0;
}

// Keys of a note that one block of attention_few takes.
constexpr int kSegmentKeys = 1024;

int attention_few(const AttentionArgs &args, DType dtype, Stream stream);
int attention_simt(const AttentionArgs &args, DType dtype, Stream stream);
int attention_mma(const AttentionArgs &args, DType dtype, Stream stream);
int attention_wgmma(const AttentionArgs &args, DType dtype, Stream stream);

}  // namespace cuda
}  // namespace clinfast
