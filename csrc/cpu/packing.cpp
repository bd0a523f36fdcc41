// From a padded batch to packed tokens and back. pack is serial: a batch's ids and mask are a few hundred kilobytes,
// and its loops run at a cycle or so a position.
#include "vec.h"

namespace clinfast {
namespace CLINFAST_ISA {

// The positions with mask != 0 (or == 0) of one note, appended to out. Writes at most `seqlen` entries.
template <typename M>
static int64_t append_real(const M *mask, int64_t stride, int64_t seqlen, int32_t first, int32_t *out) {
  int64_t n = 0;
  for (int64_t s = 0; s < seqlen; s++) {
    out[n] = first + int32_t(s);
    n += mask[s * stride] != 0;
  }
  return n;
}

template <typename M>
static void append_padded(const M *mask, int64_t stride, int64_t seqlen, int32_t first, int32_t *out) {
  for (int64_t s = 0; s < seqlen; s++)
    if (mask[s * stride] == 0) *out++ = first + int32_t(s);
}

template <typename M> static void pack_notes(const PackArgs &a, PackResult &result) {
  const M *mask = static_cast<const M *>(a.mask);
  int64_t packed = 0;
  a.cu_seqlens[0] = 0;
  for (int64_t note = 0; note < a.batch; note++) {
    int32_t first = int32_t(note * a.seqlen), *out = a.indices + packed;
    int64_t real = a.seqlen;
    if (!mask) {
      for (int64_t s = 0; s < a.seqlen; s++) out[s] = first + int32_t(s);
    } else {
      const M *row = mask + note * a.mask_row_stride;
      real = append_real(row, a.mask_column_stride, a.seqlen, first, out);
      if (a.keep_padding) append_padded(row, a.mask_column_stride, a.seqlen, first, out + real);
      if (a.seqlen > 0 && row[0] == 0 && result.first_masked_note < 0) result.first_masked_note = note;
    }
    int64_t length = a.keep_padding ? a.seqlen : real;
    packed += length;
    a.seqused_k[note] = int32_t(real);
    a.cu_seqlens[note + 1] = int32_t(packed);
    result.empty_notes += real == 0;
    if (length > result.max_seqlen) result.max_seqlen = length;
  }
  result.tokens = packed;
}

// Sign bit set where an id is negative or above the limit; one pass without a branch.
template <typename I> static bool any_outside(const I *ids, int64_t stride, int64_t size, uint64_t limit) {
  uint64_t marks = 0;
  if (stride == 1)
    for (int64_t i = 0; i < size; i++) marks |= uint64_t(int64_t(ids[i])) | (limit - uint64_t(int64_t(ids[i])));
  else
    for (int64_t i = 0; i < size; i++) {
      uint64_t id = uint64_t(int64_t(ids[i * stride]));
      marks |= id | (limit - id);
    }
  return marks >> 63;
}

template <typename I>
static int64_t first_outside(const I *ids, int64_t row_stride, int64_t column_stride, int64_t batch, int64_t seqlen,
                             int64_t size) {
  for (int64_t row = 0; row < batch; row++) {
    const I *at = ids + row * row_stride;
    if (!any_outside(at, column_stride, seqlen, uint64_t(size - 1))) continue;
    for (int64_t s = 0; s < seqlen; s++)
      if (uint64_t(int64_t(at[s * column_stride])) >= uint64_t(size)) return row * seqlen + s;
  }
  return -1;
}

static int64_t first_outside(const void *ids, int32_t itemsize, int64_t row_stride, int64_t column_stride,
                             const PackArgs &a, int64_t size) {
  if (!ids) return -1;
  if (itemsize == 8)
    return first_outside(static_cast<const int64_t *>(ids), row_stride, column_stride, a.batch, a.seqlen, size);
  return first_outside(static_cast<const int32_t *>(ids), row_stride, column_stride, a.batch, a.seqlen, size);
}

void pack(const PackArgs &a, PackResult &result) {
  result = PackResult{};
  result.first_masked_note = -1;
  result.bad_id_at = first_outside(a.input_ids, a.ids_itemsize, a.ids_row_stride, a.ids_column_stride, a, a.vocab_size);
  result.bad_type_at = first_outside(a.token_type_ids, a.types_itemsize, a.types_row_stride, a.types_column_stride, a,
                                     a.type_vocab_size);
  if (a.mask_type == MaskType::int64) pack_notes<int64_t>(a, result);
  else if (a.mask_type == MaskType::int32) pack_notes<int32_t>(a, result);
  else pack_notes<int8_t>(a, result);
}

template <typename I> static void count_ids(const PositionArgs &a) {
  const I *ids = static_cast<const I *>(a.input_ids);
  int32_t *out = a.position_ids;
  const int32_t padding = int32_t(a.padding_idx);
  for (int64_t row = 0; row < a.batch; row++) {
    const I *at = ids + row * a.row_stride;
    int32_t last = padding;
    for (int64_t s = 0; s < a.seqlen; s++) {
      const bool counts = int64_t(at[s * a.column_stride]) != a.padding_idx;
      last += counts;
      *out++ = counts ? last : padding;
    }
  }
}

void position_ids(const PositionArgs &a) {
  if (a.itemsize == 8) count_ids<int64_t>(a);
  else count_ids<int32_t>(a);
}

template <typename P, typename O> static inline void copy_row(const P *from, O *to, int64_t hidden) {
  for_lanes(hidden, [&](int64_t i, int n) { store(load(from + i, n), to + i, n); });
}
static inline void copy_row(const float *from, float *to, int64_t hidden) { memcpy(to, from, size_t(hidden) * 4); }
static inline void copy_row(const bf16_t *from, bf16_t *to, int64_t hidden) { memcpy(to, from, size_t(hidden) * 2); }

// token_cursor(begin) makes a function that is asked for the token at positions begin, begin + 1, ...; -1 is none.
template <typename P, typename O, typename F> static void fill_positions(const UnpackArgs &a, F &&token_cursor) {
  const P *packed = static_cast<const P *>(a.packed);
  O *padded = static_cast<O *>(a.padded);
  int threads = thread_count(a.num_threads, a.positions, a.positions * a.hidden * int64_t(sizeof(O)));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int share = 0; share < threads; share++) {
    int64_t begin = a.positions * share / threads, end = a.positions * (share + 1) / threads;
    auto token_at = token_cursor(begin);
    for (int64_t position = begin; position < end; position++) {
      int64_t t = token_at(position);
      O *to = padded + position * a.padded_stride;
      if (t < 0) memset(to, 0, size_t(a.hidden) * sizeof(O));
      else copy_row(packed + t * a.packed_stride, to, a.hidden);
    }
  }
}

static int64_t first_at_or_above(const int32_t *indices, int64_t tokens, int64_t position) {
  int64_t low = 0, high = tokens;
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (indices[middle] < position) low = middle + 1;
    else high = middle;
  }
  return low;
}

template <typename P, typename O> static void unpack_ascending(const UnpackArgs &a) {
  fill_positions<P, O>(a, [&](int64_t begin) {
    int64_t next = first_at_or_above(a.indices, a.tokens, begin);
    return [&a, next](int64_t position) mutable {
      return next < a.tokens && a.indices[next] == position ? next++ : int64_t(-1);
    };
  });
}

template <typename P, typename O> static void unpack_any_order(const UnpackArgs &a, const int32_t *token_of) {
  fill_positions<P, O>(a, [&](int64_t) { return [&](int64_t position) { return int64_t(token_of[position]); }; });
}

template <typename P, typename O> static int64_t unpack_rows(const UnpackArgs &a) {
  bool ascending = true;
  for (int64_t t = 0; t < a.tokens; t++) {
    if (a.indices[t] < 0 || a.indices[t] >= a.positions) return t;
    ascending &= t == 0 || a.indices[t] > a.indices[t - 1];
  }
  if (ascending) {
    unpack_ascending<P, O>(a);
    return -1;
  }
  int32_t *token_of = new int32_t[size_t(a.positions)];
  memset(token_of, 0xff, size_t(a.positions) * sizeof(int32_t));
  for (int64_t t = 0; t < a.tokens; t++) token_of[a.indices[t]] = int32_t(t);
  unpack_any_order<P, O>(a, token_of);
  delete[] token_of;
  return -1;
}

int64_t unpack(const UnpackArgs &a) {
  bool from_f32 = a.packed_dtype == DType::f32, to_f32 = a.padded_dtype == DType::f32;
  if (from_f32) return to_f32 ? unpack_rows<float, float>(a) : unpack_rows<float, bf16_t>(a);
  return to_f32 ? unpack_rows<bf16_t, float>(a) : unpack_rows<bf16_t, bf16_t>(a);
}

}  // namespace CLINFAST_ISA
}  // namespace clinfast
