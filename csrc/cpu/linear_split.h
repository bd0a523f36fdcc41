// The linear layer in fp32 on AMX tiles, which multiply bf16 only. An fp32 value is exactly the sum of three bf16 pieces of
// falling size, and six of the nine products of two such sums are taken (Henry, Tang and Heinecke 2019, arXiv:1904.06376).
// The three left out are below 2^-23 of |x||w|, and a tile adds 32 products before it rounds into its sum: the whole is as
// close to the exact result as a chain of fp32 multiply-adds. Vector units cut the next weights into pieces while the
// tile unit multiplies. An infinity has no pieces and gives NaN.
#pragma once

#include "linear_amx.h"
#include "scratch.h"

#if defined(CLINFAST_AMX)

namespace clinfast {
namespace CLINFAST_ISA {

static constexpr int64_t kPieces = 3, kTileWords = kAmxRows * Vec::N;
// Longest sum in tiles, in steps of a tile's depth: more inputs are taken in parts, whose sums are added.
static constexpr int64_t kSplitSteps = 24;
// Panels whose sums are kept meanwhile.
static constexpr int64_t kSplitPanels = 32;
// With rows for one turn only, the pieces of so many steps of the weights stay in the first-level cache.
static constexpr int64_t kFewRowsSteps = 2;
// The pieces of a block of rows share the second-level cache with those of two panels of weights.
static constexpr int64_t kSplitBytes = 1280 << 10;

// low[i] and high[i] as a word of each piece, `stride` words apart.
static inline void split_words(Vec low, Vec high, float *to, int64_t stride) {
  const __m512i half = _mm512_set1_epi32(0x8000), top = _mm512_set1_epi32(int(0xffff0000u));
  auto rounded = [&](Vec x) {
    return Vec{_mm512_castsi512_ps(_mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x.v), half), top))};
  };
  // Below 2^-110 the last pieces have bits that bf16 lacks: those must not reach the neighbour's half.
  auto word = [&](Vec a, Vec b) {
    constexpr int kFirstOrMaskedSecond = 0xf8;
    const __m512i shifted = _mm512_srli_epi32(_mm512_castps_si512(a.v), 16);
    return Vec{_mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(shifted, _mm512_castps_si512(b.v), top, kFirstOrMaskedSecond))};
  };
  for (int piece = 0; piece < kPieces - 1; piece++, to += stride) {
    const Vec a = rounded(low), b = rounded(high);
    word(a, b).store(to);
    low = low - a;
    high = high - b;
  }
  word(low, high).store(to);
}

struct SplitScratch {
  float *left, *right[2], *sums;

  SplitScratch(int64_t left_words, int64_t right_words, int64_t sum_words) {
    // Not whole pages, or stores to one half would look to the processor like stores to what is loaded from the other.
    right_words += kTileWords / 2 + 16;
    carve<SplitScratch>({{&left, left_words}, {&right[0], right_words}, {&right[1], right_words}, {&sums, sum_words}});
  }
};

// Tasks are panels of blocks of rows, in that order, and a thread takes a range of them.
template <typename Activate> struct SplitLinear : AmxFinish<float, Activate> {
  using Finish = AmxFinish<float, Activate>;
  using Finish::a, Finish::kPanel, Finish::kBlockRows, Finish::outputs;
  // Words of one step's pieces: of two tiles of rows, one tile of rows, and of a panel.
  static constexpr int64_t kLeftStep = kPieces * kTileWords, kRightStep = 2 * kPieces * kTileWords;

  const int64_t block, steps, parts, part_steps, chunk, panels;
  const int64_t panel_words = steps * kAmxDepth * kPanel;
  SplitScratch s;

  SplitLinear(const LinearArgs &args, Activate f, int64_t rows_of_a_block)
      : Finish(args, f), block(rows_of_a_block), steps((args.in_features + kAmxDepth - 1) / kAmxDepth),
        parts(split_parts(steps)), part_steps((steps + parts - 1) / parts),
        chunk(block > kBlockRows ? part_steps : kFewRowsSteps), panels((args.out_features + outputs - 1) / outputs),
        s(block / kAmxRows * part_steps * kLeftStep, chunk * kRightStep,
          parts > 1 ? block * kPanel * kSplitPanels : 0) {}

  static int64_t split_parts(int64_t steps) { return (steps + kSplitSteps - 1) / kSplitSteps; }
  // Rows of a block at most.
  static int64_t most_rows(int64_t in_features) {
    const int64_t steps = (in_features + kAmxDepth - 1) / kAmxDepth, parts = split_parts(steps);
    const int64_t rows = kSplitBytes / ((steps + parts - 1) / parts * kAmxDepth * 2 * kPieces) / 32 * 32;
    return rows < 64 ? 64 : rows < 256 ? rows : 256;
  }

  // Steps [step, step + count) of the inputs of rows [row, row + rows). A step's word i holds inputs i and i + 16.
  void split_rows(int64_t row, int64_t rows, int64_t step, int64_t count) {
    for (int64_t tile = 0; tile < rows; tile += kAmxRows) {
      const int64_t tile_rows = rows - tile < kAmxRows ? rows - tile : kAmxRows;
      const float *x = static_cast<const float *>(a.x) + (row + tile) * a.x_stride + step * kAmxDepth;
      float *to = s.left + tile / kAmxRows * count * kLeftStep;
      for (int64_t i = 0; i < count; i++, x += kAmxDepth, to += kLeftStep) {
        const int64_t inputs = a.in_features - (step + i) * kAmxDepth;
        const float *from = x;
        if (inputs >= kAmxDepth)
          for (int64_t r = 0; r < tile_rows; r++, from += a.x_stride)
            split_words(Vec::load(from), Vec::load(from + Vec::N), to + r * Vec::N, kTileWords);
        else
          for (int64_t r = 0; r < tile_rows; r++, from += a.x_stride)
            split_words(Vec::load(from, int(inputs < Vec::N ? inputs : Vec::N)),
                        inputs > Vec::N ? Vec::load(from + Vec::N, int(inputs) - Vec::N) : Vec::zero(),
                        to + r * Vec::N, kTileWords);
      }
    }
    amx_memory_written();
  }

  // A part of a panel on its way into pieces.
  struct Splitting {
    const float *from;
    float *to;
    int64_t word, words;
  } splitting = {nullptr, nullptr, 0, 0};

  void split_next(int64_t panel, int64_t part, int64_t at) {
    const int64_t count = steps_of(part) - at, step = part * part_steps + at;
    splitting = {static_cast<const float *>(a.packed) + panel * panel_words + step * kAmxDepth * kPanel,
                 s.right[side ^ 1], 0, (count < chunk ? count : chunk) * kPanel};
  }
  void split_some(int64_t words) {
    Splitting &n = splitting;
    for (const int64_t end = n.word + words < n.words ? n.word + words : n.words; n.word < end; n.word++) {
      const float *from = n.from + n.word * kAmxDepth;
      __builtin_prefetch(from + panel_words, 0, 2);
      __builtin_prefetch(from + panel_words + Vec::N, 0, 2);
      split_words(Vec::load(from), Vec::load(from + Vec::N),
                  n.to + n.word / kPanel * kRightStep + n.word % kPanel * Vec::N, 2 * kTileWords);
    }
  }

  // One step of M by 2 tiles: the six products, the small ones first. After each, up to `words` of the next weights are
  // cut and up to `finished` rows finished: spread out, they find room beside the tiles (6 to 10% faster than at the end).
  template <int M>
  void multiply_step(const float *left0, const float *left1, const float *right, int64_t words, int64_t finished) {
    auto row_tile = [&](int piece) {
      tile_load<4>(left0 + piece * kTileWords, 64);
      if (M == 2) tile_load<5>(left1 + piece * kTileWords, 64);
    };
    auto panel_tile = [&](int piece) {
      tile_load<6>(right + 2 * piece * kTileWords, 64);
      tile_load<7>(right + (2 * piece + 1) * kTileWords, 64);
    };
    auto multiply = [&] {
      tile_multiply_add<0, 4, 6>();
      tile_multiply_add<1, 4, 7>();
      if (M == 2) {
        tile_multiply_add<2, 5, 6>();
        tile_multiply_add<3, 5, 7>();
      }
      split_some(words);
      this->finish_some(finished);
    };
    row_tile(2);
    panel_tile(0);
    multiply();
    row_tile(1);
    multiply();
    panel_tile(1);
    multiply();
    row_tile(0);
    multiply();
    panel_tile(2);
    multiply();
    panel_tile(0);
    multiply();
  }

  // `count` steps of M tiles of rows and a panel, which `begin` or `end` their sums; `next` tile of rows is that far on.
  template <int M>
  void multiply(const float *left, int64_t next, const float *right, int64_t count, int64_t words, bool begin, float *end) {
    const int64_t products = 6 * count, finished = (kBlockRows + products - 1) / products;
    if (begin) zero_sums<M>();
    for (int64_t step = 0; step < count; step++, left += kLeftStep, right += kRightStep)
      multiply_step<M>(left, left + next, right, words, finished);
    if (!end) return;
    this->finish();
    store_sums<M>(end, kPanel);
  }

  static void add(const float *from, float *to) {
    for (int64_t i = 0; i < kBlockRows * kPanel; i += Vec::N) (Vec::load(to + i) + Vec::load(from + i)).store(to + i);
    amx_memory_written();
  }

  // Panels [panel, end) of the rows from `row` on; `next` is the first panel after them, -1 where there is none.
  void run_panels(int64_t row, int64_t rows, int64_t panel, int64_t end, int64_t next) {
    const int64_t tiles = (rows + kAmxRows - 1) / kAmxRows, pairs = (tiles + 1) / 2;
    for (int64_t part = 0; part < parts; part++) {
      const int64_t step = part * part_steps, count = steps_of(part);
      split_rows(row, rows, step, count);
      for (int64_t p = panel; p < end; p++)
        for (int64_t at = 0; at < count; at += chunk, side ^= 1) {
          const int64_t taken = count - at < chunk ? count - at : chunk;
          split_some(splitting.words);
          amx_memory_written();
          if (at + taken < count) split_next(p, part, at + taken);
          else if (p + 1 < end) split_next(p + 1, part, 0);
          else if (part + 1 < parts) split_next(panel, part + 1, 0);
          else if (next >= 0) split_next(next, 0, 0);
          const int64_t products = 6 * pairs * taken, words = (splitting.words + products - 1) / products;
          for (int64_t pair = 0; pair < pairs; pair++) {
            const float *left = s.left + (2 * pair * count + at) * kLeftStep;
            const int64_t first = row + pair * kBlockRows, left_rows = row + rows - first;
            const bool last = part + 1 == parts;
            float *kept = s.sums + ((p - panel) * block + pair * kBlockRows) * kPanel;
            float *to = part > 0 || last ? this->sums[this->turn] : kept;
            float *sums_end = at + taken < count ? nullptr : to;
            if (2 * pair + 1 < tiles) multiply<2>(left, count * kLeftStep, s.right[side], taken, words, at == 0, sums_end);
            else multiply<1>(left, count * kLeftStep, s.right[side], taken, words, at == 0, sums_end);
            if (!sums_end) continue;
            if (part > 0 && last) add(kept, to);
            else if (part > 0) add(to, kept);
            if (last) this->pend(to, first, first + (left_rows < kBlockRows ? left_rows : kBlockRows), p * outputs);
          }
        }
    }
  }

  void run(int64_t begin, int64_t end) {
    if (begin >= end) return;
    split_next(begin % panels, 0, 0);
    side ^= 1;
    while (begin < end) {
      const int64_t panel = begin % panels, row = begin / panels * block;
      int64_t count = panels - panel < end - begin ? panels - panel : end - begin;
      if (parts > 1 && count > kSplitPanels) count = kSplitPanels;
      begin += count;
      run_panels(row, a.rows - row < block ? a.rows - row : block, panel, panel + count,
                 begin < end ? begin % panels : -1);
    }
    this->finish();
  }

 private:
  int side = 0;  // of the two panels' pieces
  int64_t steps_of(int64_t part) const {
    const int64_t left = steps - part * part_steps;
    return left < part_steps ? left : part_steps;
  }
};

}  // namespace CLINFAST_ISA
}  // namespace clinfast

#endif
