// Memory that a thread keeps from one call to the next.
#pragma once

#include <cstdlib>

#include "vec.h"

namespace clinfast {
namespace CLINFAST_ISA {

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Part {
  float **start;
  int64_t floats;
};

// Memory of this thread for all the parts, each on a cache line; `Owner` keeps that of one user from another's.
template <typename Owner, int N> static void carve(const Part (&parts)[N]) {
  static thread_local struct Arena {
    char *base = nullptr;
    size_t bytes = 0;
    ~Arena() { free(base); }
  } arena;
  size_t bytes = 0;
  for (const Part &p : parts) bytes += size_t(round_up(p.floats, 16)) * sizeof(float);
  if (bytes > arena.bytes) {
    free(arena.base);
    arena.base = static_cast<char *>(aligned_alloc(64, bytes));
    if (!arena.base) abort();
    arena.bytes = bytes;
  }
  char *at = arena.base;
  for (const Part &p : parts) {
    *p.start = reinterpret_cast<float *>(at);
    at += size_t(round_up(p.floats, 16)) * sizeof(float);
  }
}

}  // namespace CLINFAST_ISA
}  // namespace clinfast
