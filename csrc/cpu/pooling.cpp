// One row a note: its first token, the mean or the maximum of its rows. A task is one note and one stretch of columns,
// so nothing is reduced across threads; rows are added in blocks anchored at the note's start.
#include "vec.h"

namespace clinfast {
namespace CLINFAST_ISA {

static constexpr int64_t kColumns = 256, kBlockRows = 8, kBlocks = 16;

template <typename T> static void mean_columns(const T *x, int64_t stride, int64_t rows, int64_t columns, T *out) {
  // Sums of 8 rows, of 16 such blocks, then of those: long notes lose no precision to one long chain.
  float total[kColumns] = {}, part[kColumns];
  for (int64_t begin = 0; begin < rows; begin += kBlockRows * kBlocks) {
    memset(part, 0, sizeof part);
    for (int64_t block = begin; block < rows && block < begin + kBlockRows * kBlocks; block += kBlockRows) {
      const T *first = x + block * stride;
      int64_t count = rows - block < kBlockRows ? rows - block : kBlockRows;
      for_lanes(columns, [&](int64_t i, int n) {
        Vec sum = load(first + i, n);
        for (int64_t r = 1; r < count; r++) sum = sum + load(first + r * stride + i, n);
        store(load(part + i, n) + sum, part + i, n);
      });
    }
    for_lanes(columns, [&](int64_t i, int n) { store(load(total + i, n) + load(part + i, n), total + i, n); });
  }
  Vec size = Vec::set(float(rows));
  for_lanes(columns, [&](int64_t i, int n) { store(load(total + i, n) / size, out + i, n); });
}

template <typename T> static void max_columns(const T *x, int64_t stride, int64_t rows, int64_t columns, T *out) {
  float best[kColumns];
  for_lanes(columns, [&](int64_t i, int n) { store(load(x + i, n), best + i, n); });
  for (int64_t block = 0; block < rows; block += kBlockRows) {
    const T *first = x + block * stride;
    int64_t count = rows - block < kBlockRows ? rows - block : kBlockRows;
    for_lanes(columns, [&](int64_t i, int n) {
      Vec largest = load(best + i, n);
      for (int64_t r = 0; r < count; r++) largest = max_or_nan(largest, load(first + r * stride + i, n));
      store(largest, best + i, n);
    });
  }
  for_lanes(columns, [&](int64_t i, int n) { store(load(best + i, n), out + i, n); });
}

template <typename T> static void pool(const PoolingArgs &a) {
  const T *x = static_cast<const T *>(a.x);
  T *out = static_cast<T *>(a.out);
  int64_t stretches = (a.hidden + kColumns - 1) / kColumns, tasks = a.batch * stretches;
  int64_t rows = a.kind == PoolingKind::first_token ? a.batch : a.rows;
  int threads = thread_count(a.num_threads, tasks, rows * a.hidden * int64_t(sizeof(T)));
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int64_t task = 0; task < tasks; task++) {
    int64_t note = task / stretches, column = task % stretches * kColumns;
    int64_t columns = a.hidden - column < kColumns ? a.hidden - column : kColumns;
    int64_t begin = a.cu_seqlens[note], size = a.cu_seqlens[note + 1] - begin;
    const T *first = x + begin * a.x_stride + column;
    T *to = out + note * a.out_stride + column;
    if (size == 0) memset(to, 0, size_t(columns) * sizeof(T));
    else if (a.kind == PoolingKind::first_token) memcpy(to, first, size_t(columns) * sizeof(T));
    else if (a.kind == PoolingKind::mean) mean_columns(first, a.x_stride, size, columns, to);
    else max_columns(first, a.x_stride, size, columns, to);
  }
}

int64_t pooling(const PoolingArgs &a) {
  for (int64_t note = 0; note < a.batch; note++)
    if (a.cu_seqlens[note] < 0 || a.cu_seqlens[note + 1] < a.cu_seqlens[note] || a.cu_seqlens[note + 1] > a.rows)
      return note;
  a.dtype == DType::f32 ? pool<float>(a) : pool<bf16_t>(a);
  return -1;
}

}  // namespace CLINFAST_ISA
}  // namespace clinfast
