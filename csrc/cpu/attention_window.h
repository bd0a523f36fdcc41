// Attention through a sliding window: a panel of rows meets the vectors of keys that one of its rows sees; the others are
// neither scored nor multiplied. Keys keep their places in blocks and vectors that start at the note's first, and what a row
// does not see counts for nothing, so its bits do not depend on the rows of its panel.
#pragma once

#include "attention_amx.h"
#include "attention_pack.h"

namespace clinfast {
namespace CLINFAST_ISA {

// Scores in memory are in units of log2, scale included, so that what is unseen lies far below the rest whatever the scale.
struct WindowTerms : NoTerms {
  static constexpr bool kScaled = true;
  using NoTerms::NoTerms;
};

static inline float slope_of(const AttentionArgs &a) { return float(double(a.scale) * kLog2e); }

// By rank in the note; where nothing is seen, begin is end.
struct KeyRange {
  int64_t begin, end;
};

// The keys that row `row` of the item sees.
template <typename T> static inline KeyRange seen(const Item<T> &item, int64_t window, int64_t row) {
  const int64_t place = item.q_places ? int64_t(item.q_places[row]) : item.first_row + row;
  auto first_from = [&](int64_t least) {
    if (!item.k_places) return least < 0 ? int64_t(0) : smaller(least, item.keys);
    int64_t low = 0, high = item.keys;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (item.k_places[middle] < least) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  return {first_from(place - window), first_from(place + window + 1)};
}

// The ranges of a panel's rows, and the hull of those that are not empty.
template <int Rows> struct PanelRanges {
  KeyRange row[Rows];
  int64_t begin, end;

  template <typename T> PanelRanges(const Item<T> &item, int64_t window, int64_t first, int64_t rows) {
    begin = item.keys, end = 0;
    for (int64_t i = 0; i < rows; i++) {
      row[i] = seen(item, window, first + i);
      if (row[i].begin == row[i].end) continue;
      begin = smaller(begin, row[i].begin);
      end = end > row[i].end ? end : row[i].end;
    }
  }
  // Whether each of `rows` rows sees all keys [from, to).
  bool all_see(int64_t rows, int64_t from, int64_t to) const {
    for (int64_t i = 0; i < rows; i++)
      if (from < row[i].begin || to > row[i].end) return false;
    return true;
  }
};

// The hull of what the item's rows see.
template <typename T> static KeyRange seen_by_all(const Item<T> &item, int64_t window) {
  KeyRange all = {item.keys, 0};
  for (int64_t row = 0; row < item.rows; row++) {
    const KeyRange keys = seen(item, window, row);
    if (keys.begin == keys.end) continue;
    all = {smaller(all.begin, keys.begin), all.end > keys.end ? all.end : keys.end};
  }
  return all;
}

static constexpr float kUnseen = -1e30f;

// What a row's scores are compared with: where it has seen none yet, its weights are to be 0, not 1.
static inline float top_of_seen(float maximum) { return maximum > kUnseen ? maximum : 0.0f; }

static inline Vec see_only(Vec x, int64_t begin, int64_t end) {
  static const float iota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Vec lane = Vec::load(iota), unseen = Vec::set(kUnseen);
  return select_less(lane, Vec::set(float(begin)), unseen, select_less(lane, Vec::set(float(end)), x, unseen));
}

template <typename T> static void zero_rows_without_keys(const AttentionArgs &a, const Item<T> &item) {
  for (int64_t row = 0; row < item.rows; row++) {
    const KeyRange keys = seen(item, a.window, row);
    if (keys.begin == keys.end) memset(item.out + row * a.out_token_stride, 0, size_t(a.head_dim) * sizeof(T));
  }
}

// score_tile for the `vecs` vectors of keys from key `key` of the block on, `k_stride` words apart; where `edges`, some of
// them are not seen by some rows.
template <bool Pairs, int M>
static inline void score_window(const float *q, int64_t q_stride, const float *k, int64_t k_stride, int64_t depth, float slope,
                                int64_t vecs, float *scores, bool edges, const KeyRange *rows, int64_t key, Vec *row_max) {
  with_constant<kTileVecs>(vecs, [&](auto n) {
    constexpr int NV = decltype(n)::value;
    for (int64_t d = 0; d < depth; d += kScoreChain) {
      const int64_t steps = depth - d < kScoreChain ? depth - d : kScoreChain;
      multiply_tile<Pairs, M, NV>(q + d, q_stride, k + d * k_stride, k_stride, steps, [&](int i, int j, Vec s) {
        float *to = scores + i * kPanelStride + j * Vec::N;
        if (d > 0) s = s + Vec::load(to);
        if (d + steps < depth) return s.store(to);
        s = max(Vec::set(kUnseen), s * Vec::set(slope));
        if (edges) s = see_only(s, rows[i].begin - key - j * Vec::N, rows[i].end - key - j * Vec::N);
        s.store(to);
        row_max[i] = max(row_max[i], s);
      });
    }
  });
}

template <typename T, bool Pairs, typename Base> struct WindowedVector : Base {
  using Base::a;
  using Base::depth;
  using Base::head_dim;
  using Base::s;
  using Base::width;

  explicit WindowedVector(const AttentionArgs &args) : Base(args) {}

  // M rows of the item from `row` on, against what they see of the block of keys [block, block_end). `packed` has a bit for
  // each of its tiles.
  template <int M>
  void panel(const Item<T> &item, int64_t row, int64_t block, int64_t block_end, const PanelRanges<kRows> &ranges,
             uint64_t &packed) {
    const T *q = item.q + row * a.q_token_stride, *k = item.k + block * a.k_token_stride;
    const T *v = item.v + block * a.v_token_stride;
    const float *queries = this->queries_in_place ? reinterpret_cast<const float *>(q) : s.queries;
    const int64_t query_stride = this->queries_in_place ? a.q_token_stride / Base::kElements : kPanelStride;
    if (!this->queries_in_place) pack_queries<Pairs>(q, a.q_token_stride, M, head_dim, s.queries);

    const int64_t begin = (ranges.begin > block ? ranges.begin - block : 0) / Vec::N * Vec::N;
    const int64_t end = smaller(ranges.end, block_end) - block, padded = round_up(end, Vec::N);
    KeyRange rows[M];
    Vec row_max[M];
    for (int i = 0; i < M; i++) {
      rows[i] = {ranges.row[i].begin - block, ranges.row[i].end - block};
      row_max[i] = Vec::set(kUnseen);
    }
    for (int64_t j = begin / kTileKeys * kTileKeys; j < end; j += kTileKeys) {
      const int64_t tile_keys = smaller(block_end - block - j, kTileKeys), tile_width = round_up(tile_keys, Vec::N);
      float *tile = s.keys + j * depth;
      const uint64_t bit = uint64_t(1) << (j / kTileKeys);
      if (!(packed & bit)) {
        packed |= bit;
        pack_keys<Pairs>(k + j * a.k_token_stride, a.k_token_stride, tile_keys, head_dim, tile);
        if (!this->values_in_place)
          pack_values<Pairs>(v + j * a.v_token_stride, a.v_token_stride, tile_keys, head_dim, width,
                             s.values + j / Base::kElements * width);
      }
      const int64_t from = begin > j ? begin : j, to = smaller(padded, j + tile_width);
      const bool edges = !ranges.all_see(M, block + from, block + to);
      score_window<Pairs, M>(queries, query_stride, tile + from - j, tile_width, depth, slope_of(a),
                             (to - from) / Vec::N, s.scores + from, edges, rows, from, row_max);
    }
    this->template weigh_and_multiply<M>(item, row, v, begin, end, padded, ranges.begin >= block,
                                         ranges.end <= block_end, row_max);
  }

  void run(const Item<T> &item) {
    const int64_t block_keys = this->block_keys();
    static_assert(kBlockKeys / kTileKeys <= 64, "a bit for each tile of a block");
    const KeyRange all = seen_by_all(item, a.window);
    for (int64_t block = all.begin / block_keys * block_keys; block < all.end; block += block_keys) {
      const int64_t block_end = smaller(block + block_keys, item.keys);
      uint64_t packed = 0;
      for (int64_t row = 0; row < item.rows; row += kRows)
        with_constant<kRows>(smaller(item.rows - row, kRows), [&](auto m) {
          constexpr int M = decltype(m)::value;
          const PanelRanges<kRows> ranges(item, a.window, row, M);
          if (ranges.begin < block_end && ranges.end > block) panel<M>(item, row, block, block_end, ranges, packed);
        });
    }
    zero_rows_without_keys(a, item);
  }
};

#if defined(CLINFAST_AMX)

template <typename Base> struct WindowedAmx : Base {
  using Base::a;
  using Base::depth;
  using Base::s;
  using Base::width;

  WindowedAmx(const AttentionArgs &args, const AmxScratch &scratch) : Base(args, scratch) {}

  // Scores of M tiles of queries with the keys [begin, end) of the block, in whole groups, then their weights.
  template <int M>
  void weigh(const uint16_t *q, int64_t rows, int64_t block, int64_t begin, int64_t end, const PanelRanges<kAmxGroup> &ranges,
             float *maximum, float *sum, const float *before) {
    for (int64_t key = begin; key < end; key += kAmxGroup) this->template score_group<M>(q, key);
    for (int64_t row = 0; row < rows; row += 4)
      with_constant<4>(rows - row < 4 ? rows - row : 4, [&](auto m) {
        constexpr int R = decltype(m)::value;
        float *scores = s.scores + row * kPanelStride, *weights = s.weights + row * kPanelStride;
        int64_t from = end, to = begin;
        const Vec slope = Vec::set(slope_of(a));
        Vec row_max[R];
        for (int i = 0; i < R; i++) {
          const KeyRange keys = {ranges.row[row + i].begin - block, ranges.row[row + i].end - block};
          row_max[i] = Vec::set(kUnseen);
          if (keys.begin == keys.end || keys.begin >= end || keys.end <= begin) continue;
          from = smaller(from, keys.begin > begin ? keys.begin / Vec::N * Vec::N : begin);
          to = to > keys.end ? to : smaller(round_up(keys.end, Vec::N), end);
        }
        if (from > to) from = to;
        for (int64_t key = from; key < to; key += Vec::N)
#pragma GCC unroll 4
          for (int i = 0; i < R; i++) {
            const KeyRange &keys = ranges.row[row + i];
            float *at = scores + i * kPanelStride + key;
            Vec x = max(Vec::set(kUnseen), Vec::load(at) * slope);
            if (block + key < keys.begin || block + key + Vec::N > keys.end)
              x = see_only(x, keys.begin - block - key, keys.end - block - key);
            x.store(at);
            row_max[i] = max(row_max[i], x);
          }
        float subtracted[R];
        for (int i = 0; i < R; i++) {
          maximum[row + i] = row_max[i].max();
          if (before && before[row + i] > maximum[row + i]) maximum[row + i] = before[row + i];
          subtracted[i] = top_of_seen(maximum[row + i]);
        }
        weigh_rows<true, R>(scores + from, weights + from / 2, to - from, this->factor, subtracted, sum + row);
        for (int i = 0; i < R; i++) {
          memset(weights + i * kPanelStride + begin / 2, 0, size_t(from - begin) * 2);
          memset(weights + i * kPanelStride + to / 2, 0, size_t(end - to) * 2);
        }
      });
    amx_memory_written();
  }

  void panel(const Item<bf16_t> &item, int64_t row, int64_t rows, int64_t block, const PanelRanges<kAmxGroup> &ranges) {
    float maximum[kAmxGroup], sum[kAmxGroup], before[kAmxGroup];
    const uint16_t *q = reinterpret_cast<const uint16_t *>(s.queries) + row * width;
    const bool first = ranges.begin >= block, last = ranges.end <= block + kAmxKeys;
    const int64_t begin = (first ? ranges.begin - block : 0) / kAmxGroup * kAmxGroup;
    const int64_t end = last ? round_up(ranges.end - block, kAmxGroup) : kAmxKeys;
    if (!first) memcpy(before, s.maximum + row, size_t(rows) * 4);
    with_constant<2>(rows > kAmxRows ? 2 : 1, [&](auto m) {
      constexpr int M = decltype(m)::value;
      weigh<M>(q, rows, block, begin, end, ranges, maximum, sum, first ? nullptr : before);
      this->template multiply<M>(begin, end);
    });
    this->finish(item.out, row, rows, maximum, sum, before, first, last);
  }

  void run(const Item<bf16_t> &item) {
    this->pack_queries(item.q, item.rows);
    const KeyRange all = seen_by_all(item, a.window);
    for (int64_t block = all.begin / kAmxKeys * kAmxKeys; block < all.end; block += kAmxKeys) {
      const int64_t begin = (all.begin > block ? all.begin - block : 0) / kAmxGroup * kAmxGroup;
      const int64_t end = smaller(smaller(round_up(all.end - block, kAmxGroup), kAmxKeys), item.keys - block);
      this->pack_block(item.k + block * a.k_token_stride, item.v + block * a.v_token_stride, begin, end);
      for (int64_t row = 0; row < item.rows; row += kAmxGroup) {
        const int64_t rows = smaller(item.rows - row, kAmxGroup);
        const PanelRanges<kAmxGroup> ranges(item, a.window, row, rows);
        if (ranges.begin < block + kAmxKeys && ranges.end > block) panel(item, row, rows, block, ranges);
      }
    }
    zero_rows_without_keys(a, item);
  }
};

#endif

}  // namespace CLINFAST_ISA
}  // namespace clinfast
