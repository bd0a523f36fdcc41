// The linear layer on AMX tiles: sums of 32 rows by 32 outputs stay in four tiles over all inputs. While the tile unit
// multiplies one such block, the vector units add bias, activation and residual to the block before.
#pragma once

#include "amx.h"
#include "linear_tile.h"

#if defined(CLINFAST_AMX)

namespace clinfast {
namespace CLINFAST_ISA {

// Bias, activation and residual of sums that wait for them, a few rows at a time.
template <typename T, typename Activate> struct AmxFinish {
  static constexpr int64_t kPanel = Layout<T>::kPanel, kBlockRows = 2 * kAmxRows;

  const LinearArgs &a;
  const Activate activate;
  const int64_t outputs = a.gated ? kPanel / 2 : kPanel;  // of a panel
  alignas(64) float sums[2][kBlockRows * kPanel];
  int turn = 0;

  // Rows [row, end) of sums that begin at `from`, and from row `second` on at `rest`.
  struct Pending {
    const float *from, *rest;
    int64_t row, second, end, column;
  } pending = {nullptr, nullptr, 0, 0, 0, 0};

  AmxFinish(const LinearArgs &args, Activate f) : a(args), activate(f) {}

  void pend(const float *from, int64_t row, int64_t end, int64_t column) {
    pending = {from, from, row, end, end, column};
    turn ^= 1;
  }

  void finish_row() {
    const int64_t row = pending.row++, columns = a.out_features - pending.column;
    if (row == pending.second) pending.from = pending.rest;
    const float *from = pending.from;
    pending.from += kPanel;
    const int64_t out_row = a.out_rows ? int64_t(a.out_rows[row]) : row;
    T *out = static_cast<T *>(a.out) + out_row * a.out_stride + pending.column;
    const T *residual =
        a.residual ? static_cast<const T *>(a.residual) + row * a.residual_stride + pending.column : nullptr;
    const float *bias = a.bias ? a.bias + pending.column : nullptr;
    if (a.gated) {
      store_gated(from, bias, columns, out);
      return;
    }
    auto at = [&](int64_t i, int n) {
      Vec y = Vec::load(from + i);
      if (bias) y = y + load(bias + i, n);
      y = activate(y);
      return residual ? y + load(residual + i, n) : y;
    };
    if (columns >= kPanel) store_both(at(0, Vec::N), at(Vec::N, Vec::N), out);
    else for_lanes(columns, [&](int64_t i, int n) { store(at(i, n), out + i, n); });
  }

  // `columns` are the outputs from the panel's first one on, of which it has half of kPanel.
  void store_gated(const float *from, const float *bias, int64_t columns, T *out) {
    for_lanes(columns < outputs ? columns : outputs, [&](int64_t i, int n) {
      Vec x = Vec::load(from + i), gate = Vec::load(from + outputs + i);
      if (bias) {
        x = x + load(bias + i, n);
        gate = gate + load(bias + a.out_features + i, n);
      }
      store(activate(x) * gate, out + i, n);
    });
  }

  void finish_some(int64_t rows) {
    for (; rows > 0 && pending.row < pending.end; rows--) finish_row();
  }
  void finish() { finish_some(pending.end - pending.row); }
};

template <typename Activate> struct AmxLinear : AmxFinish<bf16_t, Activate> {
  using Finish = AmxFinish<bf16_t, Activate>;
  using L = Layout<bf16_t>;
  using Finish::a, Finish::kPanel, Finish::kBlockRows, Finish::outputs, Finish::sums, Finish::turn, Finish::pending;

  const int64_t steps = L::steps(a.in_features) / kAmxRows, whole_steps = a.in_features / kAmxDepth;
  const int64_t panel_words = L::steps(a.in_features) * kPanel;
  const int64_t finished_a_step = (kBlockRows + steps - 1) / steps;

  AmxLinear(const LinearArgs &args, Activate f) : Finish(args, f) {}

  // Inputs past the last whole step, filled with 0.
  void copy_rest(const bf16_t *x, bf16_t *to) {
    const int64_t begin = whole_steps * kAmxDepth, count = a.in_features - begin;
    const int64_t rows = a.rows < kAmxRows ? a.rows : kAmxRows;
    for (int64_t r = 0; r < rows; r++, to += kAmxDepth) {
      memset(to, 0, kAmxDepth * 2);
      memcpy(to, x + r * a.x_stride + begin, size_t(count) * 2);
    }
  }

  // The sums of one panel for M tiles of rows; meanwhile asks for `lines` cache lines at `next` a step.
  template <int M>
  void multiply(int64_t panel, int64_t first, int64_t second, const char *next, int64_t lines) {
    const float *weights = static_cast<const float *>(a.packed) + panel * panel_words;
    const bf16_t *x0 = static_cast<const bf16_t *>(a.x) + first * a.x_stride;
    const bf16_t *x1 = static_cast<const bf16_t *>(a.x) + second * a.x_stride;
    alignas(64) bf16_t rest[2][kAmxRows * kAmxDepth];
    if (whole_steps < steps) {
      copy_rest(x0, rest[0]);
      if (M == 2) copy_rest(x1, rest[1]);
      amx_memory_written();
    }
    zero_sums<M>();
    for (int64_t step = 0; step < steps; step++, weights += kAmxRows * kPanel) {
      if (step < whole_steps)
        multiply_add_sums<M>(x0 + step * kAmxDepth, x1 + step * kAmxDepth, a.x_stride * 2, weights, weights + 16,
                             kPanel * 4);
      else
        multiply_add_sums<M>(rest[0], rest[1], kAmxDepth * 2, weights, weights + 16, kPanel * 4);
      for (int64_t line = 0; line < lines; line++, next += 64) __builtin_prefetch(next, 0, 2);
      this->finish_some(finished_a_step);
    }
    this->finish();
    store_sums<M>(sums[turn], kPanel);
  }

  // Rows [row, row + rows) of one panel. A tile reaches back to rows that are done already rather than past the last one.
  void run(int64_t panel, int64_t row, int64_t rows) {
    const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows, end = row + rows;
    const int64_t last = end > kAmxRows ? end - kAmxRows : 0;
    const int64_t lines = (panel_words * 4 + 64 * blocks * steps - 1) / (64 * blocks * steps);
    const char *next = reinterpret_cast<const char *>(static_cast<const float *>(a.packed) + (panel + 1) * panel_words);
    for (; row < end; row += kBlockRows, next += lines * steps * 64, turn ^= 1) {
      const int64_t first = row < last ? row : last;
      const int64_t second = row + kAmxRows < last ? row + kAmxRows : last;
      const float *to = sums[turn];
      if (end - row > kAmxRows) multiply<2>(panel, first, second, next, lines);
      else multiply<1>(panel, first, first, next, lines);
      pending = {to + (row - first) * kPanel,
                 to + (kAmxRows + row + kAmxRows - second) * kPanel,
                 row,
                 row + kAmxRows,
                 end - row < kBlockRows ? end : row + kBlockRows,
                 panel * outputs};
    }
  }
};

}  // namespace CLINFAST_ISA
}  // namespace clinfast

#endif
