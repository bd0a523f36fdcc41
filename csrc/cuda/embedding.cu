// Word + token type + position rows and their LayerNorm or not, for packed tokens; the sum stays in registers.
#include "cuda/launch.cuh"
#include "cuda/row_norm.cuh"

namespace clinfast {
namespace cuda {
namespace {

__device__ __forceinline__ int64_t id_at(const void *ids, int64_t at, int itemsize) {
  return itemsize == 8 ? static_cast<const int64_t *>(ids)[at] : static_cast<const int32_t *>(ids)[at];
}

struct Rows {
  int64_t word, position, type;  // type -1: there is no such table
  bool inside;
};

__device__ __forceinline__ Rows look_up(const EmbeddingArgs &args, int64_t token) {
  const int64_t index = args.indices[token];
  if (index < 0 || index >= args.batch * args.seqlen) return {0, 0, -1, false};
  const int64_t note = index / args.seqlen, column = index - note * args.seqlen;
  Rows rows;
  rows.word = id_at(args.input_ids, note * args.ids_row_stride + column * args.ids_column_stride, args.ids_itemsize);
  rows.position = args.position_ids ? args.position_ids[index] : column + args.position_offset;
  rows.type = args.token_type ? 0 : -1;
  if (args.token_type && args.token_type_ids)
    rows.type = id_at(args.token_type_ids, note * args.types_row_stride + column * args.types_column_stride,
                      args.types_itemsize);
  rows.inside = rows.word >= 0 && rows.word < args.vocab_size && rows.position >= 0 &&
                rows.position < args.max_positions &&
                (!args.token_type || (rows.type >= 0 && rows.type < args.type_vocab_size));
  return rows;
}

template <typename Row, bool Aligned, typename Out>
__device__ __forceinline__ void put(const Row &row, const EmbeddingArgs &args, Out *out) {
  if (args.weight) {
    row.store(out, args.hidden, args.weight, args.shift);
    return;
  }
#pragma unroll
  for (int i = 0; i < Row::kVectors; i++)
    if (Row::column(i) < args.hidden) store_row<Aligned>(out, Row::column(i), args.hidden, row.values[i]);
}

template <typename T, int Vectors, int Threads, bool Aligned>
__global__ void __launch_bounds__(Threads == 32 ? 32 * kRowsPerBlock : Threads)
    embedding_kernel(const EmbeddingArgs args) {
  after_earlier_grids();
  constexpr int N = Vector<T>::N;
  CLINFAST_SHARED(float, scratch, Threads / 32);
  int64_t token = blockIdx.x;
  if (Threads == 32) token = token * kRowsPerBlock + threadIdx.x / 32;
  if (token >= args.tokens) return;
  const Rows rows = look_up(args, token);
  using Row = RowNorm<Vectors, N, Threads, Aligned>;
  Row norm;
  const T *word = static_cast<const T *>(args.word) + rows.word * args.word_stride;
  const T *position = static_cast<const T *>(args.position) + rows.position * args.position_stride;
  const T *type = static_cast<const T *>(args.token_type) + rows.type * args.token_type_stride;
  const int hidden = args.hidden;
#pragma unroll
  for (int i = 0; i < Vectors; i++) {
    const int start = Row::column(i);
    if (start >= hidden) continue;
    if (!rows.inside) {
#pragma unroll
      for (int j = 0; j < N; j++) norm.values[i][j] = __uint_as_float(0x7FFFFFFFu);
      continue;
    }
    float other[N];
    load_row<Aligned>(word, start, hidden, norm.values[i]);
    if (rows.type >= 0) {
      load_row<Aligned>(type, start, hidden, other);
#pragma unroll
      for (int j = 0; j < N; j++) norm.values[i][j] += other[j];
    }
    load_row<Aligned>(position, start, hidden, other);
#pragma unroll
    for (int j = 0; j < N; j++) norm.values[i][j] += other[j];
  }
  if (args.weight) norm.normalise(hidden, args.eps, scratch);
  const int64_t out = token * args.out_stride;
  if (args.out_dtype == DType::f32)
    put<Row, Aligned>(norm, args, static_cast<float *>(args.out) + out);
  else if (args.out_dtype == DType::bf16)
    put<Row, Aligned>(norm, args, static_cast<bfloat16 *>(args.out) + out);
  else
    put<Row, Aligned>(norm, args, static_cast<float16 *>(args.out) + out);
}

template <typename T, int Vectors, int Threads, bool Aligned> int run(const EmbeddingArgs &args, Stream stream) {
  constexpr bool warp = Threads == 32;
  return launch<&embedding_kernel<T, Vectors, Threads, Aligned>>(
      warp ? blocks(args.tokens, kRowsPerBlock) : unsigned(args.tokens), warp ? 32 * kRowsPerBlock : Threads, stream,
      args);
}

template <typename T> int run(const EmbeddingArgs &args, Stream stream) {
  constexpr int N = Vector<T>::N, most = kWarpHidden / (32 * N), widest = kMaxHidden / (kThreadsPerRow * N);
  const bool aligned = args.hidden % 8 == 0 && args.word_stride % N == 0 && args.position_stride % N == 0 &&
                       args.token_type_stride % N == 0 && args.out_stride % 8 == 0 && on_16_bytes(args.word) &&
                       on_16_bytes(args.position) && on_16_bytes(args.token_type) && on_16_bytes(args.weight) &&
                       on_16_bytes(args.shift) && on_16_bytes(args.out);
  if (args.hidden <= kWarpHidden) {
    if (!aligned) return run<T, most, 32, false>(args, stream);
    if (args.hidden <= kWarpHidden * 3 / 4) return run<T, most * 3 / 4, 32, true>(args, stream);
    return run<T, most, 32, true>(args, stream);
  }
  if (!aligned) return run<T, widest, kThreadsPerRow, false>(args, stream);
  return run<T, widest, kThreadsPerRow, true>(args, stream);
}

}  // namespace

int embedding(const EmbeddingArgs &args, DType table_dtype, Stream stream) {
  if (table_dtype == DType::f32) return run<float>(args, stream);
  return table_dtype == DType::bf16 ? run<bfloat16>(args, stream) : run<float16>(args, stream);
}

}  // namespace cuda
}  // namespace clinfast
