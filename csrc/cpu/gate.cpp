// activation(first half) * second half of each row, for products of a library that cannot end in it.
#include "activation.h"

namespace clinfast {
namespace CLINFAST_ISA {

template <typename T> static void gate_rows(const GateArgs &a) {
  const T *x = static_cast<const T *>(a.x);
  T *out = static_cast<T *>(a.out);
  const int threads = thread_count(a.num_threads, a.rows, a.rows * a.outputs * int64_t(sizeof(T)) * 3);
  with_activation<T>(a.activation, [&](auto activate) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < a.rows; row++) {
      const T *from = x + row * a.x_stride;
      T *to = out + row * a.out_stride;
      for_lanes(a.outputs, [&](int64_t i, int n) {
        store(activate(load(from + i, n)) * load(from + a.outputs + i, n), to + i, n);
      });
    }
  });
}

void gate(const GateArgs &a) {
  if (a.dtype == DType::f32) gate_rows<float>(a);
  else gate_rows<bf16_t>(a);
}

}  // namespace CLINFAST_ISA
}  // namespace clinfast
