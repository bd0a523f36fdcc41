// Residual + LayerNorm in one pass over memory: the row's sum is kept in a small buffer, the mean and then the centred
// variance are taken from it (never E[x^2] - E[x]^2), all in fp32.
#include "layer_norm.h"

namespace clinfast {
namespace CLINFAST_ISA {

template <typename T> static void layer_norm_rows(const LayerNormArgs &a) {
  const T *x = static_cast<const T *>(a.x);
  const T *residual = static_cast<const T *>(a.residual);
  T *out = static_cast<T *>(a.out);
  int threads = thread_count(a.num_threads, a.rows, a.rows * a.hidden * int64_t(sizeof(T)) * 3);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < a.rows; row++) {
    const T *xs = x + row * a.x_stride;
    const T *rs = residual ? residual + row * a.residual_stride : nullptr;
    normalise_row(
        a.hidden, a.eps, a.weight, a.shift, out + row * a.out_stride, [&](int64_t i, int n) {
          Vec sum = load(xs + i, n);
          if (a.bias) sum = sum + load(a.bias + i, n);
          if (rs) sum = sum + load(rs + i, n);
          return sum;
        });
  }
}

void layer_norm(const LayerNormArgs &a) {
  if (a.dtype == DType::f32) layer_norm_rows<float>(a);
  else layer_norm_rows<bf16_t>(a);
}

}  // namespace CLINFAST_ISA
}  // namespace clinfast
