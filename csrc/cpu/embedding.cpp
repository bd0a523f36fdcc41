// Word + token type + position rows, then LayerNorm where there is one, in one pass: the sum never goes to memory.
#include "layer_norm.h"

namespace clinfast {
namespace CLINFAST_ISA {

static inline int64_t id_at(const void *ids, int32_t itemsize, int64_t offset) {
  return itemsize == 8 ? static_cast<const int64_t *>(ids)[offset] : static_cast<const int32_t *>(ids)[offset];
}

static inline bool inside(int64_t value, int64_t size) { return uint64_t(value) < uint64_t(size); }

template <typename T, typename O> static int64_t embed(const EmbeddingArgs &a) {
  const T *words = static_cast<const T *>(a.word);
  const T *positions = static_cast<const T *>(a.position);
  const T *types = static_cast<const T *>(a.token_type);
  O *out = static_cast<O *>(a.out);
  int64_t bad = a.tokens;
  int threads = thread_count(a.num_threads, a.tokens, a.tokens * a.hidden * int64_t(sizeof(T)));
#pragma omp parallel for schedule(static) num_threads(threads) reduction(min : bad)
  for (int64_t t = 0; t < a.tokens; t++) {
    int64_t index = a.indices[t];
    if (!inside(index, a.batch * a.seqlen)) {
      bad = t < bad ? t : bad;
      continue;
    }
    int64_t row = index / a.seqlen, column = index - row * a.seqlen;
    int64_t id = id_at(a.input_ids, a.ids_itemsize, row * a.ids_row_stride + column * a.ids_column_stride);
    int64_t position = a.position_ids ? int64_t(a.position_ids[index]) : column + a.position_offset, type = 0;
    if (types && a.token_type_ids)
      type = id_at(a.token_type_ids, a.types_itemsize, row * a.types_row_stride + column * a.types_column_stride);
    if (!inside(id, a.vocab_size) || !inside(position, a.max_positions) ||
        (types && !inside(type, a.type_vocab_size))) {
      bad = t < bad ? t : bad;
      continue;
    }
    const T *word = words + id * a.word_stride;
    const T *at = positions + position * a.position_stride;
    const T *kind = types ? types + type * a.token_type_stride : nullptr;
    auto sum_at = [&](int64_t i, int n) {
      Vec sum = load(word + i, n);
      if (kind) sum = sum + load(kind + i, n);
      return sum + load(at + i, n);
    };
    O *row_out = out + t * a.out_stride;
    if (a.weight) normalise_row(a.hidden, a.eps, a.weight, a.shift, row_out, sum_at);
    else for_lanes(a.hidden, [&](int64_t i, int n) { store(sum_at(i, n), row_out + i, n); });
  }
  return bad < a.tokens ? bad : -1;
}

int64_t embedding(const EmbeddingArgs &a) {
  bool from_f32 = a.table_dtype == DType::f32, to_f32 = a.out_dtype == DType::f32;
  if (from_f32) return to_f32 ? embed<float, float>(a) : embed<float, bf16_t>(a);
  return to_f32 ? embed<bf16_t, float>(a) : embed<bf16_t, bf16_t>(a);
}

}  // namespace CLINFAST_ISA
}  // namespace clinfast
