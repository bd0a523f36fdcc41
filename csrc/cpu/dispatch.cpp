// Chooses the widest kernels that this processor runs. Built for the plain target, like everything outside the ISA
// namespaces.
#include <cstring>

#include "kernels.h"

namespace clinfast {

#define CLINFAST_DECLARE(isa) namespace isa { extern const KernelTable table; }
CLINFAST_DECLARE(plain)
#ifdef CLINFAST_X86
CLINFAST_DECLARE(avx2)
CLINFAST_DECLARE(avx512)
CLINFAST_DECLARE(avx512_bf16)
#endif
#undef CLINFAST_DECLARE

namespace {

struct Candidate {
  const KernelTable *table;
  bool (*supported)();
};

bool always() { return true; }

#ifdef CLINFAST_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

const Candidate kCandidates[] = {
#ifdef CLINFAST_X86
    {&avx512_bf16::table, has_avx512_bf16},
    {&avx512::table, has_avx512},
    {&avx2::table, has_avx2},
#endif
    {&plain::table, always},
};

}  // namespace

const char *const *available_isas(int *count) {
  static const char *names[4];
  int n = 0;
  for (const Candidate &c : kCandidates)
    if (c.supported()) names[n++] = c.table->isa;
  *count = n;
  return names;
}

int table_number(const KernelTable *table) {
  int number = 0;
  while (kCandidates[number].table != table) number++;
  return number;
}

const KernelTable *table_of(int number) { return kCandidates[number].table; }

const KernelTable *select_kernels(const char *name, const char **error) {
  for (const Candidate &c : kCandidates) {
    if (name && *name && strcmp(name, c.table->isa) != 0) continue;
    if (c.supported()) return c.table;
    if (name && *name) {
      *error = "this processor does not have it";
      return nullptr;
    }
  }
  *error = "there are no kernels of that name";
  return nullptr;
}

}  // namespace clinfast
