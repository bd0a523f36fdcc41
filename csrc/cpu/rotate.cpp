// Rotary position embedding (Su et al. 2021, arXiv:2104.09864) on the halves of each head, in place; in fp32, rounded once.
#include "vec.h"

namespace clinfast {
namespace CLINFAST_ISA {

static int64_t note_of(const int32_t *cu_seqlens, int64_t batch, int64_t token) {
  int64_t low = 0, high = batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (cu_seqlens[middle] <= token) low = middle;
    else high = middle;
  }
  return low;
}

template <typename T> static int64_t rotate_tokens(const RotateArgs &a) {
  const int64_t half = a.head_dim / 2;
  const int threads = thread_count(a.num_threads, a.tokens, a.tokens * a.num_heads * a.head_dim * int64_t(sizeof(T)) * 2);
  int64_t bad = a.tokens;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(min : bad)
  for (int64_t token = 0; token < a.tokens; token++) {
    const int64_t place = a.places ? a.places[token] : token - a.cu_seqlens[note_of(a.cu_seqlens, a.batch, token)];
    const int64_t at = place < 0 ? -place : place;
    if (at >= a.positions) {
      bad = token < bad ? token : bad;
      continue;
    }
    const float *cosines = a.cos + at * half, *sines = a.sin + at * half;
    T *row = static_cast<T *>(a.x) + token * a.token_stride;
    for_lanes(half, [&](int64_t i, int n) {
      const Vec c = load(cosines + i, n), up = load(sines + i, n), s = place < 0 ? Vec::zero() - up : up;
      T *to = row + i;
      for (int64_t head = 0; head < a.num_heads; head++, to += a.head_stride) {
        const Vec x = load(to, n), y = load(to + half, n);
        store(fma(x, c, Vec::zero() - y * s), to, n);
        store(fma(y, c, x * s), to + half, n);
      }
    });
  }
  return bad < a.tokens ? bad : -1;
}

int64_t rotate(const RotateArgs &a) {
  return a.dtype == DType::f32 ? rotate_tokens<float>(a) : rotate_tokens<bf16_t>(a);
}

}  // namespace CLINFAST_ISA
}  // namespace clinfast
