// DeBERTa's terms of the scores (He et al. 2021): a query by a position's key, and a key by a position's query. Which row of
// the tables a pair reads depends on its distance only, so a panel of queries is multiplied by the few rows that it
// reaches, and the products are then spread over the keys: neighbours read neighbours as long as a distance has a row
// of its own. Keys are multiplied in the same way for a block of queries, and transposed as they are spread.
#pragma once

#include "attention_amx.h"
#include "attention_pack.h"
#include "scratch.h"

namespace clinfast {
namespace CLINFAST_ISA {

// Queries whose sums by keys are kept at a time, for a block of keys.
static constexpr int64_t kSpreadRows = 96;

template <typename T, bool Pairs> struct DisentangledTerms {
#if defined(CLINFAST_AMX)
  static constexpr bool kTiles = Pairs;
#else
  static constexpr bool kTiles = false;
#endif
  // Columns of a table that are multiplied at a time, at least, and queries.
  static constexpr int64_t kGroup = kTiles ? 32 : Vec::N, kTogether = kTiles ? 32 : kRows;
  static constexpr bool kScaled = true;
  const AttentionArgs &a;
  const int64_t depth;  // words of a row
  const float slope;

  // A table's rows that the item reaches, packed, and by distance the column of it that a pair reads.
  struct Side {
    float *packed;
    int32_t *column;
    int64_t columns = 0;
  };
  // keys: columns fall and distances fall along keys; queries: both rise along queries.
  Side keys, queries;
  float *block, *by_query, *by_key, *words;
  int64_t query_stride = 0, key_stride = 0;  // of by_query and by_key
  Item<T> item;
  int64_t least = 0, most = 0;  // distance
  int64_t block_row = 0;
  bool in_line = true;  // places are consecutive
  bool stepwise = true;  // a distance more is at most a row more

  DisentangledTerms(const AttentionArgs &args, float *, float *, int64_t)
      : a(args), depth(kTiles ? round_up(args.head_dim, 32) / 2 : Pairs ? (args.head_dim + 1) / 2 : args.head_dim),
        slope(float(double(args.scale) * kLog2e)) {
    for (int64_t i = 0; i < 2 * a.bucket_reach; i++) stepwise = stepwise && a.buckets[i + 1] - a.buckets[i] <= 1;
  }

  int64_t query_place(int64_t row) const { return item.q_places ? item.q_places[row] : item.first_row + row; }
  int64_t key_place(int64_t key) const { return item.k_places ? item.k_places[key] : key; }

  int64_t row_of(int64_t distance) const {
    const int64_t reach = a.bucket_reach;
    return a.buckets[(distance < -reach ? -reach : distance > reach ? reach : distance) + reach];
  }

  void begin_item(const Item<T> &given) {
    item = given;
    least = query_place(0) - key_place(item.keys - 1), most = query_place(item.rows - 1) - key_place(0);
    in_line = BiasTerms::consecutive(item.q_places, item.rows) && BiasTerms::consecutive(item.k_places, item.keys);
    const int64_t low = row_of(least), columns = row_of(most) - low + 1, distances = most - least + 1;
    const int64_t room = round_up(columns, kGroup);
    query_stride = reach(block_keys() + kTogether, room), key_stride = reach(kSpreadRows + Vec::N, room);
    float *falling, *rising;
    carve<DisentangledTerms>({{&keys.packed, a.position_keys ? room * depth : 0},
                              {&queries.packed, a.position_queries ? room * depth : 0},
                              {&falling, distances + Vec::N},
                              {&rising, distances + Vec::N},
                              {&block, kSpreadRows * kPanelStride},
                              {&by_query, kTogether * query_stride},
                              {&by_key, Vec::N * key_stride},
                              {&words, kTiles ? kTogether * depth : kRows * kPanelStride}});
    keys.column = reinterpret_cast<int32_t *>(falling), queries.column = reinterpret_cast<int32_t *>(rising);
    for (int64_t x = 0; x < distances; x++) {
      queries.column[x] = int32_t(row_of(least + x) - low);
      keys.column[distances - 1 - x] = int32_t(columns - 1) - queries.column[x];
    }
    for (int64_t x = distances; x < distances + Vec::N; x++) {
      keys.column[x] = keys.column[distances - 1];
      queries.column[x] = queries.column[distances - 1];
    }
    keys.columns = queries.columns = columns;
    const int64_t row = a.head_dim, table = a.position_rows * row;
    pack(static_cast<const T *>(a.position_keys), table * item.head + (low + columns - 1) * row, -row, keys);
    pack(static_cast<const T *>(a.position_queries), table * item.head + low * row, row, queries);
  }

  int64_t block_keys() const {
#if defined(CLINFAST_AMX)
    if (kTiles && item.note_rows >= kAmxFewestQueries) return kAmxKeys;
#endif
    return kBlockKeys;
  }

  // Floats a row of products, for so many distances, which begin and end within a group: an odd number of cache lines.
  int64_t reach(int64_t distances, int64_t room) const {
    const int64_t enough = distances + 2 * kGroup, floats = (in_line && stepwise) || room < enough ? enough : room;
    return floats / 32 * 32 + 48;
  }

  void pack(const T *tables, int64_t first, int64_t step, const Side &side) const {
    constexpr int64_t kStep = kTiles ? kGroup : kTileKeys;
    for (int64_t c = 0; tables && c < side.columns; c += kStep) {
      const int64_t rest = side.columns - c;
#if defined(CLINFAST_AMX)
      if constexpr (kTiles) {
        pack_key_group(tables + first + c * step, step, rest < kStep ? rest : kStep, a.head_dim, depth,
                       side.packed + c * depth);
        continue;
      }
#endif
      pack_keys<Pairs>(tables + first + c * step, step, rest < kTileKeys ? rest : kTileKeys, a.head_dim,
                       side.packed + c * depth);
    }
  }

  void begin_block(int64_t, int64_t) {}

  // out[i, c] = left[i] . column first + c, for M rows of words and `count` columns, both whole vectors.
  template <int M>
  void multiply(const float *left, const Side &side, int64_t first, int64_t count, float *out, int64_t stride) const {
    const int64_t room = round_up(side.columns, Vec::N);
    while (count > 0) {
      const int64_t tile = first / kTileKeys * kTileKeys, in = first - tile;
      const int64_t width = room - tile < kTileKeys ? room - tile : kTileKeys;
      const int64_t taken = count < width - in ? count : width - in;
      const float *right = side.packed + tile * depth + in;
      with_constant<kTileVecs>(taken / Vec::N, [&](auto vecs) {
        for (int64_t d = 0; d < depth; d += kScoreChain) {
          const int64_t steps = depth - d < kScoreChain ? depth - d : kScoreChain;
          multiply_tile<Pairs, M, decltype(vecs)::value>(left + d, kPanelStride, right + d * width, width, steps,
                                                         [&](int i, int j, Vec c) {
                                                           float *to = out + i * stride + j * Vec::N;
                                                           if (d > 0) c = c + Vec::load(to);
                                                           c.store(to);
                                                         });
        }
      });
      first += taken, out += taken, count -= taken;
    }
  }

#if defined(CLINFAST_AMX)
  // The same for M * 16 rows, those that are not there included: a row's products are its own.
  template <int M>
  void multiply_tiles(const T *left, const float *right, int64_t count, float *out, int64_t stride) const {
    for (int64_t c = 0; c < count; c += kGroup, right += kGroup * depth) {
      zero_sums<M>();
      for (int64_t d = 0; d < depth; d += kAmxRows)
        multiply_add_sums<M>(left + 2 * d, left + kAmxRows * 2 * depth + 2 * d, depth * 4, right + d * kGroup,
                             right + d * kGroup + 16, kGroup * 4);
      store_sums<M>(out + c, stride);
    }
  }
#endif

  // `rows` of q or k by the columns [first, last] of a side. Returns the column that out begins with.
  int64_t products(const T *from, int64_t token_stride, int64_t rows, const Side &side, int64_t first, int64_t last,
                   float *out, int64_t stride) const {
    const int64_t begin = first / kGroup * kGroup, count = round_up(last + 1 - begin, kGroup);
#if defined(CLINFAST_AMX)
    if constexpr (kTiles) {
      T *left = reinterpret_cast<T *>(words);
      for (int64_t row = 0; row < rows; row++) {
        memcpy(left + row * 2 * depth, from + row * token_stride, size_t(a.head_dim) * sizeof(T));
        memset(left + row * 2 * depth + a.head_dim, 0, size_t(2 * depth - a.head_dim) * sizeof(T));
      }
      amx_memory_written();
      if (rows > kAmxRows) multiply_tiles<2>(left, side.packed + begin * depth, count, out, stride);
      else multiply_tiles<1>(left, side.packed + begin * depth, count, out, stride);
      return begin;
    }
#endif
    for (int64_t row = 0; row < rows; row += kRows)
      with_constant<kRows>(rows - row < kRows ? rows - row : kRows, [&](auto m) {
        pack_queries<Pairs>(from + row * token_stride, token_stride, decltype(m)::value, a.head_dim, words);
        multiply<decltype(m)::value>(words, side, begin, count, out + row * stride, stride);
      });
    return begin;
  }

  // products[column - begin] for the Vec::N distances from column[0] on.
  Vec spread(const float *products, const int32_t *column, int64_t begin) const {
    if (stepwise && column[Vec::N - 1] - column[0] == Vec::N - 1) return Vec::load(products + column[0] - begin);
    return Vec::gather(products - begin, column);
  }

  // block[row, key] for the item's rows [row, row + rows) and its keys [key, key + keys).
  void sum_by_keys(int64_t row, int64_t rows, int64_t key, int64_t keys) {
    block_row = row;
    for (int64_t j = 0; j < keys; j += Vec::N) {
      const int64_t present = keys - j < Vec::N ? keys - j : Vec::N;
      const int64_t low = query_place(row) - key_place(key + j + present - 1) - least;
      const int64_t high = query_place(row + rows - 1) - key_place(key + j) - least;
      const int64_t begin = products(item.k + (key + j) * a.k_token_stride, a.k_token_stride, present, queries,
                                     queries.column[low], queries.column[high], by_key, key_stride);
      if (!in_line) {
        for (int64_t i = 0; i < rows; i++)
          for (int64_t c = 0; c < Vec::N; c++) {
            const int64_t x = c < present ? query_place(row + i) - key_place(key + j + c) - least : 0;
            block[i * kPanelStride + j + c] = c < present ? by_key[c * key_stride + queries.column[x] - begin] : 0.0f;
          }
        continue;
      }
      for (int64_t i = 0; i < rows; i += Vec::N) {
        const int32_t *column = queries.column + low + present - 1 + i;
        Vec found[Vec::N];
#pragma GCC unroll 16
        for (int c = 0; c < Vec::N; c++)
          found[c] = c < present ? spread(by_key + c * key_stride, column - c, begin) : Vec::zero();
        transpose(found);
        float *to = block + i * kPanelStride + j;
#pragma GCC unroll 16
        for (int c = 0; c < Vec::N; c++) found[c].store(to + c * kPanelStride);
      }
    }
  }

  AddedTerms of_panel(int64_t row, int64_t count, int64_t key, int64_t keys) {
    if (row % kSpreadRows == 0) {
      const int64_t rest = item.rows - row, rows = rest < kSpreadRows ? rest : kSpreadRows;
      block_row = row;
      if (a.position_queries) sum_by_keys(row, rows, key, keys);
      else memset(block, 0, size_t(rows * kPanelStride) * sizeof(float));
    }
    float *at = block + (row - block_row) * kPanelStride;
    for (int64_t group = 0; group < count; group += kTogether)
      add_by_queries(row + group, count - group < kTogether ? count - group : kTogether, key, keys,
                     at + group * kPanelStride);
    return {at, kPanelStride, slope};
  }

  // sums = (sums + the products of at most kTogether queries) * slope.
  void add_by_queries(int64_t row, int64_t rows, int64_t key, int64_t count, float *sums) {
    int64_t begin = 0;
    if (a.position_keys) {
      const int64_t first = most - query_place(row + rows - 1) + key_place(key);
      const int64_t last = most - query_place(row) + key_place(key + count - 1);
      begin = products(item.q + row * a.q_token_stride, a.q_token_stride, rows, keys, keys.column[first],
                       keys.column[last], by_query, query_stride);
    }
    for (int64_t i = 0; i < rows; i++, sums += kPanelStride) {
      const float *own = by_query + i * query_stride;
      const int64_t place = most - query_place(row + i);
      if (a.position_keys && !in_line)
        for (int64_t j = 0; j < count; j++) sums[j] += own[keys.column[place + key_place(key + j)] - begin];
      const int32_t *column = keys.column + place + key_place(key);
      for (int64_t j = 0; j < count; j += Vec::N) {
        Vec sum = Vec::load(sums + j);
        if (a.position_keys && in_line) sum = sum + spread(own, column + j, begin);
        (sum * Vec::set(slope)).store(sums + j);
      }
    }
  }
};

}  // namespace CLINFAST_ISA
}  // namespace clinfast
