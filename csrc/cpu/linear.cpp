// y = activation(x @ weight.T + bias) + residual on weights that were laid out once, in panels of kPanel outputs:
// [panel][step][kPanel] words, where a word is one fp32 value or two bf16 neighbours along the inputs. The next block
// of the panel is fetched while this one is multiplied, so that few rows cost the larger of memory and arithmetic and
// not their sum. A row's sum runs over the inputs in the same order whatever rows stand beside it.
#include <unistd.h>

#include "activation.h"
#include "linear_split.h"
#include "linear_tile.h"

namespace clinfast {
namespace CLINFAST_ISA {

static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many steps of a panel are multiplied before the next rows' turn, and of how many rows.
struct Blocking {
  int64_t steps, rows;
};

// Half a panel's block of kMaxBlockSteps fits a first-level cache of 48 KiB and is read from there by every tile of rows
// but the first; smaller caches read whole blocks from the second level, where longer sums in registers pay instead.
static Blocking blocking(int64_t input_bytes) {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const bool large = sysconf(_SC_LEVEL1_DCACHE_SIZE) >= 48 << 10;
#else
  static const bool large = false;
#endif
  if (!large) return {kMaxBlockSteps, 128};
  const int64_t rows = (1 << 20) / input_bytes;
  return {kMaxBlockSteps / 2, rows < 32 ? 32 : rows < kMaxBlockRows ? rows : kMaxBlockRows};
}

// Outputs of a panel: where they are gated, it has the first half's and the second half's of each.
template <typename T> static int64_t panel_outputs(bool gated) { return Layout<T>::kPanel / (gated ? 2 : 1); }

template <typename T>
static void finish_gated_rows(const LinearArgs &a, const float *sums, int64_t row, int64_t rows, int64_t column) {
  constexpr int64_t kPanel = Layout<T>::kPanel, kHalf = kPanel / 2;
  const int64_t columns = a.out_features - column < kHalf ? a.out_features - column : kHalf;
  const float *bias = a.bias ? a.bias + column : nullptr;
  with_activation<T>(a.activation, [&](auto activate) {
    for (int64_t r = 0; r < rows; r++) {
      T *out = static_cast<T *>(a.out) + (row + r) * a.out_stride + column;
      for_lanes(columns, [&](int64_t i, int n) {
        Vec x = Vec::load(sums + r * kPanel + i, n), gate = Vec::load(sums + r * kPanel + kHalf + i, n);
        if (bias) {
          x = x + load(bias + i, n);
          gate = gate + load(bias + a.out_features + i, n);
        }
        store(activate(x) * gate, out + i, n);
      });
    }
  });
}

template <typename T>
static void finish_rows(const LinearArgs &a, const float *sums, int64_t row, int64_t rows, int64_t column) {
  constexpr int64_t kPanel = Layout<T>::kPanel;
  if (a.gated) return finish_gated_rows<T>(a, sums, row, rows, column);
  const int64_t columns = a.out_features - column < kPanel ? a.out_features - column : kPanel;
  with_activation<T>(a.activation, [&](auto activate) {
    for (int64_t r = 0; r < rows; r++) {
      const int64_t out_row = a.out_rows ? int64_t(a.out_rows[row + r]) : row + r;
      T *out = static_cast<T *>(a.out) + out_row * a.out_stride + column;
      const T *residual =
          a.residual ? static_cast<const T *>(a.residual) + (row + r) * a.residual_stride + column : nullptr;
      for_lanes(columns, [&](int64_t i, int n) {
        Vec y = Vec::load(sums + r * kPanel + i);
        if (a.bias) y = y + load(a.bias + column + i, n);
        y = activate(y);
        if (residual) y = y + load(residual + i, n);
        store(y, out + i, n);
      });
    }
  });
}

// Rows [row, row + rows) of one panel. `sums` has room for rows * kPanel.
template <typename T>
static void multiply_panel(const LinearArgs &a, int64_t block_steps, int64_t panel, int64_t row, int64_t rows,
                           float *sums) {
  using L = Layout<T>;
  constexpr int64_t kPanel = L::kPanel;
  const int64_t steps = L::steps(a.in_features), tiles = divide_up(rows, kTileRows);
  const typename L::Word *b = static_cast<const typename L::Word *>(a.packed) + panel * steps * kPanel;
  const T *x = static_cast<const T *>(a.x) + row * a.x_stride;
  for (int64_t step = 0; step < steps; step += block_steps) {
    const int64_t count = steps - step < block_steps ? steps - step : block_steps;
    const typename L::Word *block = b + step * kPanel;
    // What follows in memory is what this thread multiplies next: the panel's next block, or the next panel.
    const char *next = reinterpret_cast<const char *>(block + count * kPanel);
    const int64_t lines = divide_up(count * kPanel * int64_t(sizeof(typename L::Word)), 64 * tiles);
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t at = tile * kTileRows, left = rows - at;
      float *to = sums + at * kPanel;
      with_constant<kTileRows>(left < kTileRows ? left : int64_t(kTileRows), [&](auto m) {
        multiply_rows<T, decltype(m)::value>(x + at * a.x_stride, a.x_stride, a.in_features, step, count, block,
                                             next + tile * lines * 64, lines, step > 0, to);
      });
    }
  }
  finish_rows<T>(a, sums, row, rows, panel * panel_outputs<T>(a.gated));
}

// At most `most` rows (a multiple of `tile`), whole tiles, evenly split; fewer where there are more threads than panels.
static int64_t rows_of_a_task(const LinearArgs &a, int64_t panels, int64_t most, int64_t tile) {
  int64_t parts = divide_up(a.rows, most);
  const int64_t fewest = divide_up(2 * a.num_threads, panels);
  parts = parts > fewest ? parts : fewest;
  return divide_up(divide_up(a.rows, parts), tile) * tile;
}

template <typename T> static void linear_rows(const LinearArgs &a) {
  if (!a.rows || !a.out_features) return;
  constexpr int64_t kPanel = Layout<T>::kPanel;
  const int64_t panels = divide_up(a.out_features, panel_outputs<T>(a.gated));
  const Blocking shape = blocking(a.in_features * int64_t(sizeof(T)));
  const int64_t block = rows_of_a_task(a, panels, shape.rows / kTileRows * kTileRows, kTileRows);
  const int64_t blocks = divide_up(a.rows, block), tasks = blocks * panels;
  const int threads = thread_count(a.num_threads, tasks, a.rows * a.in_features * a.out_features / 8);
#pragma omp parallel num_threads(threads)
  {
    alignas(64) float sums[kMaxBlockRows * kPanel];
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t row = task / panels * block;
      multiply_panel<T>(a, shape.steps, task % panels, row, a.rows - row < block ? a.rows - row : block, sums);
    }
  }
}

#if defined(CLINFAST_AMX)

static void linear_rows_amx(const LinearArgs &a) {
  if (!a.rows || !a.out_features) return;
  const int64_t panels = divide_up(a.out_features, panel_outputs<bf16_t>(a.gated));
  // The rows of a block are read once a panel, from the second-level cache.
  int64_t most = (1 << 20) / (a.in_features * 2) / 32 * 32;
  most = most < 64 ? 64 : most > 512 ? 512 : most;
  const int64_t block = rows_of_a_task(a, panels, most, 32);
  const int64_t tasks = divide_up(a.rows, block) * panels;
  const int threads = thread_count(a.num_threads, tasks, a.rows * a.in_features * a.out_features / 64);
  with_activation<bf16_t>(a.activation, [&](auto activate) {
#pragma omp parallel num_threads(threads)
    {
      AmxTiles tiles(a.rows < kAmxRows ? a.rows : kAmxRows);
      AmxLinear<decltype(activate)> linear(a, activate);
#pragma omp for schedule(static)
      for (int64_t task = 0; task < tasks; task++) {
        const int64_t row = task / panels * block;
        linear.run(task % panels, row, a.rows - row < block ? a.rows - row : block);
      }
      linear.finish();
    }
  });
}

static void linear_rows_split(const LinearArgs &a) {
  if (!a.rows || !a.out_features) return;
  const int64_t panels = divide_up(a.out_features, panel_outputs<float>(a.gated));
  with_activation<float>(a.activation, [&](auto activate) {
    using Linear = SplitLinear<decltype(activate)>;
    const int64_t block = rows_of_a_task(a, panels, Linear::most_rows(a.in_features), 32);
    const int64_t tasks = divide_up(a.rows, block) * panels;
    const int threads = thread_count(a.num_threads, tasks, a.rows * a.in_features * a.out_features / 24);
#pragma omp parallel num_threads(threads)
    {
      AmxTiles tiles;
      Linear linear(a, activate, block);
#pragma omp for schedule(static)
      for (int thread = 0; thread < threads; thread++)
        linear.run(tasks * thread / threads, tasks * (thread + 1) / threads);
    }
  });
}

static void pack_split(const float *weight, int64_t stride, int64_t in_features, int64_t out_features, bool gated,
                       float *to, int num_threads) {
  constexpr int64_t kPanel = Layout<float>::kPanel;
  const int64_t outputs = panel_outputs<float>(gated), panels = divide_up(out_features, outputs);
  const int64_t steps = Layout<float>::steps(in_features) / kAmxDepth;
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t panel = 0; panel < panels; panel++)
    for (int64_t step = 0; step < steps; step++)
      for (int64_t j = 0; j < kPanel; j++)
        for (int64_t i = 0; i < kAmxDepth; i++) {
          const int64_t output = panel * outputs + j % outputs, column = step * kAmxDepth + i;
          const int64_t row = output + j / outputs * out_features;
          const int64_t word = (panel * steps + step) * kPanel + j / Vec::N * kAmxRows + i % kAmxRows;
          to[word * 2 * Vec::N + i / kAmxRows * Vec::N + j % Vec::N] =
              output < out_features && column < in_features ? weight[row * stride + column] : 0.0f;
        }
}

#endif

template <typename T>
static void pack_panels(const T *weight, int64_t stride, int64_t in_features, int64_t out_features, bool gated,
                        void *packed, int num_threads) {
  using L = Layout<T>;
  constexpr int64_t kPanel = L::kPanel;
  const int64_t outputs = panel_outputs<T>(gated), panels = divide_up(out_features, outputs), steps = L::steps(in_features);
  T *to = static_cast<T *>(packed);
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t panel = 0; panel < panels; panel++)
    for (int64_t step = 0; step < steps; step++)
      for (int64_t j = 0; j < kPanel; j++)
        for (int64_t i = 0; i < L::kWordInputs; i++) {
          const int64_t output = panel * outputs + j % outputs, column = step * L::kWordInputs + i;
          const int64_t row = output + j / outputs * out_features;
          to[((panel * steps + step) * kPanel + j) * L::kWordInputs + i] =
              output < out_features && column < in_features ? weight[row * stride + column] : T(0);
        }
}

template <typename T> static int64_t packed_bytes(int64_t in_features, int64_t out_features, bool gated) {
  using L = Layout<T>;
  return divide_up(out_features, panel_outputs<T>(gated)) * L::kPanel * L::steps(in_features) * L::kWordInputs * int64_t(sizeof(T));
}

void linear(const LinearArgs &a) {
#if defined(CLINFAST_AMX)
  a.dtype == DType::f32 ? linear_rows_split(a) : linear_rows_amx(a);
#else
  a.dtype == DType::f32 ? linear_rows<float>(a) : linear_rows<bf16_t>(a);
#endif
}

int64_t linear_packed_bytes(int64_t in_features, int64_t out_features, bool gated, DType dtype) {
  if (dtype == DType::f32) return packed_bytes<float>(in_features, out_features, gated);
  return packed_bytes<bf16_t>(in_features, out_features, gated);
}

void linear_pack(const void *weight, int64_t stride, int64_t in_features, int64_t out_features, bool gated,
                 DType dtype, void *packed, int num_threads) {
  if (dtype == DType::bf16)
    return pack_panels(static_cast<const bf16_t *>(weight), stride, in_features, out_features, gated, packed, num_threads);
  const float *values = static_cast<const float *>(weight);
#if defined(CLINFAST_AMX)
  pack_split(values, stride, in_features, out_features, gated, static_cast<float *>(packed), num_threads);
#else
  pack_panels(values, stride, in_features, out_features, gated, packed, num_threads);
#endif
}

}  // namespace CLINFAST_ISA
}  // namespace clinfast
