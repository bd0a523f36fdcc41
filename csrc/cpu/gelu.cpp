// Bias + GELU, element by element; bf16 is widened, computed in fp32 and rounded once.
#include "gelu.h"

namespace clinfast {
namespace CLINFAST_ISA {

template <typename T, GeluKind kind> static void gelu_rows(const GeluArgs &a) {
  const T *x = static_cast<const T *>(a.x);
  T *out = static_cast<T *>(a.out);
  int threads = thread_count(a.num_threads, a.rows, a.rows * a.hidden * int64_t(sizeof(T)) * 2);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < a.rows; row++) {
    const T *xs = x + row * a.x_stride;
    T *os = out + row * a.out_stride;
    if (a.bias)
      for_lanes(a.hidden, [&](int64_t i, int n) {
        store(gelu_of<T, kind>(load(xs + i, n) + load(a.bias + i, n)), os + i, n);
      });
    else
      for_lanes(a.hidden, [&](int64_t i, int n) { store(gelu_of<T, kind>(load(xs + i, n)), os + i, n); });
  }
}

void gelu(const GeluArgs &a) {
  bool f32 = a.dtype == DType::f32;
  if (a.kind == GeluKind::erf) f32 ? gelu_rows<float, GeluKind::erf>(a) : gelu_rows<bf16_t, GeluKind::erf>(a);
  else f32 ? gelu_rows<float, GeluKind::tanh>(a) : gelu_rows<bf16_t, GeluKind::tanh>(a);
}

}  // namespace CLINFAST_ISA
}  // namespace clinfast
