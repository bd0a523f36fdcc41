// pack_into: a batch into buffers of a fixed address, those that a CUDA graph reads. One launch while the batch is small:
// each block then counts the lengths before its note by itself. From kAlone positions on, a launch before counts them.
#include "cuda/packing.cuh"

namespace clinfast {
namespace cuda {
namespace {

constexpr int64_t kAlone = 8192;

__device__ __forceinline__ void write_token(const PackIntoArgs &args, int64_t note, int64_t column, int to, int place) {
  const PackArgs &from = args.from;
  if (to >= args.rows) return;
  const int64_t id = input_id(from, note, column);
  const int64_t type = from.token_type_ids ? token_type(from, note, column) : 0;
  args.input_ids[to] = id < 0 || id >= from.vocab_size ? 0 : int(id);
  args.token_type_ids[to] = type < 0 || type >= from.type_vocab_size ? 0 : int(type);
  args.position_ids[to] = place;
  from.indices[to] = int(note * from.seqlen + column);
}

template <bool Counted> __device__ __forceinline__ int rows_before(const PackArgs &from, int64_t note, int *scratch) {
  int before = 0;
  if (from.keep_padding) return int(note * from.seqlen);
  if (Counted) {
    for (int64_t other = threadIdx.x; other < note; other += kThreads) before += from.seqused_k[other];
  } else {
    // 32 bits are enough for so few positions.
    const uint32_t seqlen = uint32_t(from.seqlen), end = uint32_t(note) * seqlen;
    for (uint32_t at = threadIdx.x; at < end; at += kThreads) {
      const uint32_t other = at / seqlen;
      before += is_real(from, other, at - other * seqlen);
    }
  }
  return block_all(before, scratch, Plus());
}

template <bool Counted>
__device__ __forceinline__ void place_note(const PackIntoArgs &args, int64_t note, int *scratch) {
  const PackArgs &from = args.from;
  const int before = rows_before<Counted>(from, note, scratch);
  int used = 0;
  if (from.keep_padding && !Counted) {
    for (int64_t column = threadIdx.x; column < from.seqlen; column += kThreads) used += is_real(from, note, column);
    used = block_all(used, scratch, Plus());
  } else if (from.keep_padding) {
    used = from.seqused_k[note];
  }
  int real = before, padded = before + used, counted = int(args.padding_idx);
  for (int64_t start = 0; start < from.seqlen; start += kThreads) {
    const int64_t column = start + threadIdx.x;
    const bool inside = column < from.seqlen, kept = inside && is_real(from, note, column);
    int place = int(column + args.position_offset);
    if (args.counts_positions) {
      const bool counts = inside && input_id(from, note, column) != args.padding_idx;
      int of_block;
      const int rank = rank_in_block(counts, scratch, of_block);
      place = counts ? counted + rank + 1 : int(args.padding_idx);
      counted += of_block;
    }
    int count;
    const int rank = rank_in_block(kept, scratch, count);
    if (kept) write_token(args, note, column, real + rank, place);
    // As in order_kernel: only the last threads are outside.
    if (inside && !kept && from.keep_padding) write_token(args, note, column, padded + int(threadIdx.x) - rank, place);
    real += count;
    padded += int(min(int64_t(kThreads), from.seqlen - start)) - count;
  }
  if (threadIdx.x != 0) return;
  from.cu_seqlens[note] = before;
  if (!Counted) from.seqused_k[note] = from.keep_padding ? used : real - before;
}

// A warp a note.
__device__ __forceinline__ Facts own_facts(const PackArgs &from) {
  const int lane = threadIdx.x % 32;
  Facts facts;
  for (int64_t note = threadIdx.x / 32; note < from.batch; note += kWarps) {
    int used = 0;
    for (int64_t column = lane; column < from.seqlen; column += 32) {
      const int at = int(note * from.seqlen + column);
      used += is_real(from, note, column);
      const int64_t id = input_id(from, note, column);
      if (id < 0 || id >= from.vocab_size) facts.bad_id = min(facts.bad_id, at);
      if (!from.token_type_ids) continue;
      const int64_t type = token_type(from, note, column);
      if (type < 0 || type >= from.type_vocab_size) facts.bad_type = min(facts.bad_type, at);
    }
    used = warp_all(used, Plus());
    if (lane == 0) facts.add_note(from, note, from.keep_padding ? int(from.seqlen) : used, used);
  }
  return facts;
}

template <bool Counted> __global__ void __launch_bounds__(kThreads, 1) pack_into_kernel(const PackIntoArgs args) {
  after_earlier_grids();
  CLINFAST_SHARED(int, scratch, kWarps);
  const PackArgs &from = args.from;
  const int64_t note = blockIdx.x;
  if (note < from.batch) {
    place_note<Counted>(args, note, scratch);
    return;
  }
  Facts facts = Counted ? counted_facts(from) : own_facts(from);
  facts.write(from, scratch);
  // Empty notes up to number `notes`, which has the rows that nobody asked for, and no keys.
  const int tokens = block_all(threadIdx.x == 0 ? facts.tokens : 0, scratch, Plus());
  for (int64_t other = from.batch + threadIdx.x; other <= args.notes; other += kThreads) {
    from.seqused_k[other] = 0;
    from.cu_seqlens[other + 1] = int(other == args.notes ? args.rows : tokens);
  }
}

}  // namespace

bool pack_into_counts_first(int64_t positions) { return positions > kAlone; }

int pack_into(const PackIntoArgs &args, Stream stream) {
  const unsigned blocks = unsigned(args.from.batch + 1);
  if (!pack_into_counts_first(args.from.batch * args.from.seqlen))
    return launch<&pack_into_kernel<false>>(blocks, kThreads, stream, args);
  const int error = count_notes(args.from, stream);
  return error ? error : launch<&pack_into_kernel<true>>(blocks, kThreads, stream, args);
}

}  // namespace cuda
}  // namespace clinfast
