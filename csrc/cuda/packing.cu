// From a padded batch to packed tokens and back. `pack` is two launches: a block a note counts and looks for values out
// of range; then each block adds up the lengths before its note and writes its part of the order.
#include "cuda/packing.cuh"

namespace clinfast {
namespace cuda {
namespace {

__global__ void __launch_bounds__(kThreads, 4) count_kernel(const PackArgs args) {
  after_earlier_grids();
  CLINFAST_SHARED(int, scratch, kWarps);
  const int64_t note = blockIdx.x;
  int length = 0, bad_id = kNone, bad_type = kNone;
  for (int64_t column = threadIdx.x; column < args.seqlen; column += kThreads) {
    const int at = int(note * args.seqlen + column);
    length += is_real(args, note, column);
    const int64_t id = input_id(args, note, column);
    if (id < 0 || id >= args.vocab_size) bad_id = min(bad_id, at);
    if (args.token_type_ids) {
      const int64_t type = token_type(args, note, column);
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

__global__ void __launch_bounds__(kThreads, 4) order_kernel(const PackArgs args) {
  after_earlier_grids();
  CLINFAST_SHARED(int, scratch, kWarps);
  const int64_t note = blockIdx.x;
  if (note == args.batch) {
    Facts facts = counted_facts(args);
    facts.write(args, scratch);
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

int count_notes(const PackArgs &args, Stream stream) {
  return launch<&count_kernel>(unsigned(args.batch), kThreads, stream, args);
}

int pack(const PackArgs &args, Stream stream) {
  const int error = count_notes(args, stream);
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
