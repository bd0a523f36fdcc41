// Attention in bf16 on AMX tiles: the same pass over blocks of keys as in attention.cpp, 32 queries at a time. Scores and
// products come from tiles, the softmax between them from the vector unit, which has most of the work.
#pragma once

#include "amx.h"
#include "attention_pack.h"

#if defined(CLINFAST_AMX)

namespace clinfast {
namespace CLINFAST_ISA {

// A block's scores and weights for 32 queries share the first-level cache.
static constexpr int64_t kAmxKeys = 256;
// Keys that one call of multiply_add_sums scores, and keys that it sums over.
static constexpr int64_t kAmxGroup = 32;
// Notes with fewer queries than this are left to the vector unit: a tile would be mostly empty.
static constexpr int64_t kAmxFewestQueries = 5;

struct AmxScratch {
  float *keys, *values, *queries, *scores, *weights, *products, *out, *maximum, *sum, *line, *terms;
};

// packed[word, key] for 32 keys, 0 past `keys` of them and past head_dim.
static inline void pack_key_group(const bf16_t *k, int64_t token_stride, int64_t keys, int64_t head_dim, int64_t depth,
                                  float *packed) {
  for (int64_t half = 0; half < kAmxGroup; half += Vec::N)
    for (int64_t word = 0; word < depth; word += Vec::N) {
      Vec rows[Vec::N];
#pragma GCC unroll 16
      for (int i = 0; i < Vec::N; i++)
        rows[i] = half + i < keys ? load_words<true>(k + (half + i) * token_stride, head_dim, word) : Vec::zero();
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < Vec::N; i++) rows[i].store(packed + (word + i) * kAmxGroup + half);
    }
}

template <typename Terms> struct AmxAttention {
  const AttentionArgs &a;
  const AmxScratch s;
  const int64_t head_dim, width, depth;  // width: head_dim in whole left tiles; depth: its words
  const float factor;
  Terms terms;
  AmxTiles tiles;

  AmxAttention(const AttentionArgs &args, const AmxScratch &scratch)
      : a(args), s(scratch), head_dim(args.head_dim), width((head_dim + 31) / 32 * 32), depth(width / 2),
        factor(Terms::kScaled ? 1.0f : float(double(args.scale < 0 ? -args.scale : args.scale) * kLog2e)),
        terms(args, s.line, s.terms, kPanelStride) {}

  void pack_queries(const bf16_t *q, int64_t rows) {
    uint16_t *to = reinterpret_cast<uint16_t *>(s.queries);
    const uint16_t sign = !Terms::kScaled && a.scale < 0 ? 0x8000 : 0;
    for (int64_t row = 0; row < rows; row++, q += a.q_token_stride, to += width)
      for (int64_t i = 0; i < width; i++) to[i] = i < head_dim ? uint16_t(q[i] ^ sign) : uint16_t(0);
    // A tile's unused rows are multiplied too, and looked at by nobody.
    memset(to, 0, size_t((-rows & (kAmxGroup - 1)) * width) * 2);
  }

  // The keys [begin, keys) of a block; whole groups start at its first.
  void pack_block(const bf16_t *k, const bf16_t *v, int64_t begin, int64_t keys) {
    for (int64_t key = begin; key < keys; key += kAmxGroup) {
      const int64_t left = keys - key, count = left < kAmxGroup ? left : kAmxGroup;
      const bf16_t *k_group = k + key * a.k_token_stride, *v_group = v + key * a.v_token_stride;
      const int64_t coming = left - count < kAmxGroup ? left - count : kAmxGroup;
      for (int64_t i = 0; i < coming; i++)
        for (int64_t at = 0; at < head_dim; at += 32) {
          __builtin_prefetch(k_group + (kAmxGroup + i) * a.k_token_stride + at, 0, 3);
          __builtin_prefetch(v_group + (kAmxGroup + i) * a.v_token_stride + at, 0, 3);
        }
      pack_key_group(k_group, a.k_token_stride, count, head_dim, depth, s.keys + key * depth);
      float *to = s.values + key / 2 * width;
      pack_values<true>(v_group, a.v_token_stride, count, head_dim, width, to);
      const int64_t pairs = (count + 1) / 2;
      memset(to + pairs * width, 0, size_t((kAmxGroup / 2 - pairs) * width) * 4);
    }
    amx_memory_written();
  }

  // Scores of M tiles of queries with the group of keys from `key` on.
  template <int M> void score_group(const uint16_t *q, int64_t key) {
    const float *packed = s.keys + key * depth;
    zero_sums<M>();
    for (int64_t d = 0; d < depth; d += kAmxRows)
      multiply_add_sums<M>(q + 2 * d, q + kAmxRows * width + 2 * d, width * 2, packed + d * kAmxGroup,
                           packed + d * kAmxGroup + 16, kAmxGroup * 4);
    store_sums<M>(s.scores + key, kPanelStride);
  }

  // Scores of M tiles of queries with the block's keys, then its weights; sums and maxima of `rows` real rows.
  template <int M, typename Added>
  void weigh(const uint16_t *q, int64_t rows, int64_t keys, float *maximum, float *sum, const float *before,
             const Added &added) {
    for (int64_t key = 0; key < keys; key += kAmxGroup) score_group<M>(q, key);
    for (int64_t row = 0; row < rows; row += 4)
      with_constant<4>(rows - row < 4 ? rows - row : 4, [&](auto m) {
        constexpr int R = decltype(m)::value;
        float *scores = s.scores + row * kPanelStride, *weights = s.weights + row * kPanelStride;
        Vec row_max[R];
        for (int i = 0; i < R; i++) row_max[i] = Vec::set(-__builtin_inff());
        for (int64_t key = 0; key < keys; key += Vec::N)
#pragma GCC unroll 4
          for (int i = 0; i < R; i++) {
            float *at = scores + i * kPanelStride + key;
            Vec x = max(Vec::set(-1e30f), added(int(row) + i, key, Vec::load(at)));
            if (key + Vec::N > keys) x = keep_lanes(x, keys - key, -__builtin_inff());
            x.store(at);
            row_max[i] = max(row_max[i], x);
          }
        for (int i = 0; i < R; i++) {
          maximum[row + i] = row_max[i].max();
          if (before && before[row + i] > maximum[row + i]) maximum[row + i] = before[row + i];
        }
        weigh_rows<true, R>(scores, weights, keys, factor, maximum + row, sum + row);
        if ((keys - 1) % kAmxGroup < Vec::N)
          for (int i = 0; i < R; i++) memset(weights + i * kPanelStride + (keys - 1) / 32 * 16 + 8, 0, 32);
      });
    amx_memory_written();
  }

  // s.products [M * 16, width] = weights @ values, over the keys [begin, end) of the block.
  template <int M> void multiply(int64_t begin, int64_t end) {
    for (int64_t d = 0; d < width; d += 2 * kAmxRows) {
      zero_sums<M>();
      for (int64_t key = begin; key < end; key += kAmxGroup) {
        const float *left = s.weights + key / 2, *right = s.values + key / 2 * width + d;
        multiply_add_sums<M>(left, left + kAmxRows * kPanelStride, kPanelStride * 4, right, right + 16, width * 4);
      }
      store_sums<M>(s.products + d, width);
    }
  }

  // `rows` queries from `row` on, at most 32, against the item's keys [key, key + keys), which are packed.
  void panel(bf16_t *out, int64_t row, int64_t rows, int64_t key, int64_t keys, bool first, bool last) {
    float maximum[kAmxGroup], sum[kAmxGroup], before[kAmxGroup];
    const auto added = terms.of_panel(row, rows, key, keys);
    const uint16_t *q = reinterpret_cast<const uint16_t *>(s.queries) + row * width;
    if (!first) memcpy(before, s.maximum + row, size_t(rows) * 4);
    if (rows > kAmxRows) {
      weigh<2>(q, rows, keys, maximum, sum, first ? nullptr : before, added);
      multiply<2>(0, keys);
    } else {
      weigh<1>(q, rows, keys, maximum, sum, first ? nullptr : before, added);
      multiply<1>(0, keys);
    }
    finish(out, row, rows, maximum, sum, before, first, last);
  }

  // The panel's products, with what earlier blocks left.
  void finish(bf16_t *out, int64_t row, int64_t rows, const float *maximum, float *sum, const float *before, bool first,
              bool last) {
    for (int64_t r = 0; r < rows; r++) {
      float *partial = s.out + (row + r) * width;
      float rescale = 0.0f;
      if (!first) {
        rescale = exp2_nonpositive<true>(Vec::set((before[r] - maximum[r]) * factor)).max();
        sum[r] += s.sum[row + r] * rescale;
      }
      const Vec scale = Vec::set(1.0f / sum[r]), old = Vec::set(rescale);
      for_lanes(head_dim, [&](int64_t i, int n) {
        Vec c = Vec::load(s.products + r * width + i);
        if (!first) c = fma(Vec::load(partial + i), old, c);
        if (last) store(c * scale, out + (row + r) * a.out_token_stride + i, n);
        else c.store(partial + i);
      });
      s.maximum[row + r] = maximum[r];
      s.sum[row + r] = sum[r];
    }
  }

  void run(const Item<bf16_t> &item) {
    pack_queries(item.q, item.rows);
    terms.begin_item(item);
    for (int64_t key = 0; key < item.keys; key += kAmxKeys) {
      const int64_t count = item.keys - key < kAmxKeys ? item.keys - key : kAmxKeys;
      pack_block(item.k + key * a.k_token_stride, item.v + key * a.v_token_stride, 0, count);
      terms.begin_block(key, count);
      for (int64_t row = 0; row < item.rows; row += kAmxGroup)
        panel(item.out, row, item.rows - row < kAmxGroup ? item.rows - row : kAmxGroup, key, count, key == 0,
              key + count == item.keys);
    }
  }
};

}  // namespace CLINFAST_ISA
}  // namespace clinfast

#endif
