// Chooses the widest kernels that this processor runs. Built for the plain target, like everything outside the ISA
// namespaces.
#include <cstring>

#if defined(CLINFAST_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace clinfast {

#define CLINFAST_DECLARE(isa) namespace isa { extern const KernelTable table; }
CLINFAST_DECLARE(plain)
#ifdef CLINFAST_X86
CLINFAST_DECLARE(avx2)
CLINFAST_DECLARE(avx512)
CLINFAST_DECLARE(avx512_bf16)
#endif
#ifdef CLINFAST_BUILDS_AMX
CLINFAST_DECLARE(amx)
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

#ifdef CLINFAST_BUILDS_AMX
// The processor has the tiles, the system saves them, and it lets this process use them.
bool has_amx() {
  static const bool found = [] {
    unsigned a, b, c, d, low, high;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low >> 17 & 3) != 3) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return found;
}
#endif

const Candidate kCandidates[] = {
#ifdef CLINFAST_BUILDS_AMX
    {&amx::table, has_amx},
#endif
#ifdef CLINFAST_X86
    {&avx512_bf16::table, has_avx512_bf16},
    {&avx512::table, has_avx512},
    {&avx2::table, has_avx2},
#endif
    {&plain::table, always},
};

}  // namespace

const char *const *available_isas(int *count) {
  static const char *names[5];
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
