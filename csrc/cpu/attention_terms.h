// What is added to the scores of attention before their row maxima are taken. With terms, scores in memory are in units
// of log2 already, scale included: whatever its sign, and 0 too, softmax goes on with a factor of 1.
#pragma once

#include "vec.h"

namespace clinfast {
namespace CLINFAST_ISA {

static constexpr double kLog2e = 1.44269504088896341;

// A range of one note's queries at one head, and the note's keys.
template <typename T> struct Item {
  const T *q, *k, *v;
  T *out;
  int64_t rows, keys;
  int64_t note_rows;
  int64_t head, first_row;             // of the queries, in their note
  const int32_t *q_places, *k_places;  // of the item's rows and keys; null where they are ranks
};

// Plain attention: nothing is added, and scores in memory keep their scale. This is what a kind of terms has: a block
// of keys is begun before its panels, for which `of_panel` gives what is called on each vector of scores.
struct NoTerms {
  static constexpr bool kScaled = false;  // whether scores in memory are in units of log2
  NoTerms(const AttentionArgs &, float *, float *, int64_t) {}
  template <typename T> void begin_item(const Item<T> &) {}
  void begin_block(int64_t, int64_t) {}
  struct Nothing {
    Vec operator()(int, int64_t, Vec score) const { return score; }
  };
  Nothing of_panel(int64_t, int64_t, int64_t, int64_t) const { return {}; }
};

// score * slope + at[row * stride + key], for the rows of a panel and the keys of a block; `at` is read in whole vectors.
struct AddedTerms {
  const float *at;
  int64_t stride;
  float slope;
  Vec operator()(int row, int64_t key, Vec score) const {
    return fma(score, Vec::set(slope), Vec::load(at + row * stride + key));
  }
};

// bias[head, clamp(key's place - query's place)]: along a block of keys, a row of it is the row above moved by one. So
// it is laid out once for all the item's rows, as a line; where places are not consecutive, a panel's values one by one.
struct BiasTerms {
  const AttentionArgs &a;
  float *const line, *const panel;  // rows + keys + `kSpare` floats; a panel's rows of `stride`
  const int64_t stride;
  const float *own = nullptr;  // the head's, by distance
  const int32_t *q_places = nullptr, *k_places = nullptr;
  int64_t rows = 0, first_row = 0;
  bool in_line = true;
  static constexpr int64_t kSpare = 64;
  static constexpr bool kScaled = true;

  BiasTerms(const AttentionArgs &args, float *line_scratch, float *panel_scratch, int64_t panel_stride)
      : a(args), line(line_scratch), panel(panel_scratch), stride(panel_stride) {}

  static bool consecutive(const int32_t *places, int64_t count) {
    for (int64_t i = 1; places && i < count; i++)
      if (places[i] != places[0] + i) return false;
    return true;
  }

  int64_t query_place(int64_t row) const { return q_places ? q_places[row] : first_row + row; }
  int64_t key_place(int64_t key) const { return k_places ? k_places[key] : key; }

  template <typename T> void begin_item(const Item<T> &item) {
    own = a.bias + item.head * (2 * a.bias_reach + 1) + a.bias_reach;
    q_places = item.q_places, k_places = item.k_places;
    rows = item.rows, first_row = item.first_row;
    in_line = consecutive(q_places, rows) && consecutive(k_places, item.keys);
  }

  // The keys [key, key + keys) of the item. line[x] is of the distance that is x more than that of the item's last row
  // and the block's first key.
  void begin_block(int64_t key, int64_t keys) {
    if (!in_line) return;
    const int64_t reach = a.bias_reach, first = key_place(key) - query_place(rows - 1), end = rows + keys + kSpare;
    const float unit = float(kLog2e), least = own[-reach] * unit, most = own[reach] * unit;
    auto within = [&](int64_t x) { return x < 0 ? 0 : x < end ? x : end; };
    const int64_t below = within(-reach - first), above = within(reach + 1 - first);
    int64_t x = 0;
    for (; x < below; x++) line[x] = least;
    for (; x < above; x++) line[x] = own[first + x] * unit;
    for (; x < end; x++) line[x] = most;
  }

  // Rows [row, row + count) of the item.
  AddedTerms of_panel(int64_t row, int64_t count, int64_t key, int64_t keys) const {
    const float slope = float(double(a.scale) * kLog2e);
    if (in_line) return {line + rows - 1 - row, -1, slope};
    for (int64_t i = 0; i < count; i++) {
      const int64_t place = query_place(row + i), reach = a.bias_reach;
      float *to = panel + i * stride;
      for (int64_t j = 0; j < keys; j++) {
        const int64_t distance = key_place(key + j) - place;
        to[j] = own[distance < -reach ? -reach : distance > reach ? reach : distance] * float(kLog2e);
      }
      memset(to + keys, 0, size_t(-keys & (kSpare - 1)) * sizeof(float));
    }
    return {panel, stride, slope};
  }
};

}  // namespace CLINFAST_ISA
}  // namespace clinfast
