// Keys, values and queries of one head as the words that the register tiles read (attention_tile.h).
#pragma once

#include "attention_tile.h"

namespace clinfast {
namespace CLINFAST_ISA {

// Words [word, word + Vec::N) of a row; those past its end are 0 and not read.
template <bool Pairs, typename T> static inline Vec load_words(const T *row, int64_t head_dim, int64_t word) {
#if defined(CLINFAST_AVX512_BF16)
  if constexpr (Pairs) {
    int64_t rest = head_dim - 2 * word;
    return load_pairs(row + 2 * word, rest < 2 * Vec::N ? int(rest) : 2 * Vec::N);
  }
#endif
  int64_t rest = head_dim - word;
  return rest < Vec::N ? Vec::load(row + word, int(rest)) : Vec::load(row + word);
}

template <int S = Vec::N / 2> static inline void transpose(Vec *rows) {
#pragma GCC unroll 16
  for (int i = 0; i < Vec::N; i++)
    if (!(i & S)) swap_blocks<S>(rows[i], rows[i + S]);
  if constexpr (S > 1) transpose<S / 2>(rows);
}

// packed[word, key] for up to kTileKeys keys, its rows filled with 0 to whole vectors.
template <bool Pairs, typename T>
static inline void pack_keys(const T *k, int64_t token_stride, int64_t keys, int64_t head_dim, float *packed) {
  const int64_t depth = Pairs ? (head_dim + 1) / 2 : head_dim;
  const int64_t width = (keys + Vec::N - 1) / Vec::N * Vec::N;
  for (int64_t key = 0; key < width; key += Vec::N) {
    const T *group = k + key * token_stride;
    const int64_t present = keys - key;
    for (int64_t word = 0; word < depth; word += Vec::N) {
      Vec rows[Vec::N];
      if (present >= Vec::N) {
#pragma GCC unroll 16
        for (int i = 0; i < Vec::N; i++) rows[i] = load_words<Pairs>(group + i * token_stride, head_dim, word);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < Vec::N; i++)
          rows[i] = i < present ? load_words<Pairs>(group + i * token_stride, head_dim, word) : Vec::zero();
      }
      transpose(rows);
      float *to = packed + word * width + key;
      if (depth - word >= Vec::N) {
#pragma GCC unroll 16
        for (int i = 0; i < Vec::N; i++) rows[i].store(to + i * width);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < Vec::N; i++)
          if (i < depth - word) rows[i].store(to + i * width);
      }
    }
  }
}

// packed[key, d], or with Pairs packed[key / 2, d] of two neighbouring keys; rows of `width` words, filled with 0.
template <bool Pairs, typename T>
static inline void pack_values(const T *v, int64_t token_stride, int64_t keys, int64_t head_dim, int64_t width,
                               float *packed) {
#if defined(CLINFAST_AVX512_BF16)
  if constexpr (Pairs) {
    for (int64_t key = 0; key < keys; key += 2, packed += width)
      for (int64_t d = 0; d < head_dim; d += Vec::N) {
        const T *low = v + key * token_stride;
        Vec second = key + 1 < keys ? load_words<false>(low + token_stride, head_dim, d) : Vec::zero();
        zip_pairs(load_words<false>(low, head_dim, d), second).store(packed + d);
      }
    return;
  }
#endif
  for (int64_t key = 0; key < keys; key++)
    for (int64_t d = 0; d < head_dim; d += Vec::N)
      load_words<false>(v + key * token_stride, head_dim, d).store(packed + key * width + d);
}

// panel[row, word] with row stride kPanelStride.
template <bool Pairs, typename T>
static inline void pack_queries(const T *q, int64_t token_stride, int64_t rows, int64_t head_dim, float *panel) {
  const int64_t depth = Pairs ? (head_dim + 1) / 2 : head_dim;
  for (int64_t row = 0; row < rows; row++)
    for (int64_t word = 0; word < depth; word += Vec::N)
      load_words<Pairs>(q + row * token_stride, head_dim, word).store(panel + row * kPanelStride + word);
}

}  // namespace CLINFAST_ISA
}  // namespace clinfast
