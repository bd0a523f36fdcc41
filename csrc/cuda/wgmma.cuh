// Hopper's asynchronous product of a warpgroup, its shared memory descriptors, and mbarriers.
#pragma once

#include "cuda/device.cuh"

namespace clinfast {
namespace cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Rows of 64 16-bit elements, 128 bytes, in the 128-byte swizzle; eight rows repeat after 1,024 bytes. `across` is the
// distance in bytes to the next 64 columns, where columns are the product's outer dimension.
__device__ __forceinline__ uint64_t descriptor(const void *tile, int across) {
  const uint64_t start = (shared_address(tile) & 0x3FFFF) >> 4;
  return start | uint64_t(across >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// Keeps the compiler from moving what reads or writes an accumulator across the place of this call.
template <int N> __device__ __forceinline__ void hold(float (&d)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+f"(d[n][i])::"memory");
}

template <typename T> __device__ __forceinline__ void wgmma_scores(float (&d)[16][4], uint64_t a, uint64_t b, int add);
template <typename T, int N>
__device__ __forceinline__ void wgmma_values(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b);

// The tiles of four sums that a product writes, as operands of its assembly.
#define CLINFAST_FOUR(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define CLINFAST_SUMS_64 \
  CLINFAST_FOUR(0), CLINFAST_FOUR(1), CLINFAST_FOUR(2), CLINFAST_FOUR(3), CLINFAST_FOUR(4), CLINFAST_FOUR(5), \
      CLINFAST_FOUR(6), CLINFAST_FOUR(7)
#define CLINFAST_SUMS_128 \
  CLINFAST_SUMS_64, CLINFAST_FOUR(8), CLINFAST_FOUR(9), CLINFAST_FOUR(10), CLINFAST_FOUR(11), CLINFAST_FOUR(12), \
      CLINFAST_FOUR(13), CLINFAST_FOUR(14), CLINFAST_FOUR(15)
#define CLINFAST_NAMES_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CLINFAST_NAMES_128 \
  CLINFAST_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// For elements of `type`, which the instruction calls `name`:
// wgmma_scores: d[64, 128] (+)= a[64, 16] b[128, 16]^T, both in shared memory with their 16 columns contiguous.
// wgmma_values: d[64, N] += a[64, 16] b[16, N], a in registers, b in shared memory with its N columns contiguous.
#define CLINFAST_WGMMA(type, name)                                                                                   \
  template <>                                                                                                        \
  __device__ __forceinline__ void wgmma_scores<type>(float(&d)[16][4], uint64_t a, uint64_t b, int add) {            \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name \
                 " {" CLINFAST_NAMES_128 "}, %64, %65, p, 1, 1, 0, 0; }"                                             \
                 : CLINFAST_SUMS_128                                                                                 \
                 : "l"(a), "l"(b), "r"(add));                                                                        \
  }                                                                                                                  \
  template <>                                                                                                        \
  __device__ __forceinline__ void wgmma_values<type, 64>(float(&d)[8][4], const uint32_t(&a)[4], uint64_t b) {       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name                                         \
                 " {" CLINFAST_NAMES_64 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                  \
                 : CLINFAST_SUMS_64                                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                              \
  }                                                                                                                  \
  template <>                                                                                                        \
  __device__ __forceinline__ void wgmma_values<type, 128>(float(&d)[16][4], const uint32_t(&a)[4], uint64_t b) {     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name                                        \
                 " {" CLINFAST_NAMES_128 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                 \
                 : CLINFAST_SUMS_128                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                              \
  }
CLINFAST_WGMMA(bfloat16, "bf16")
CLINFAST_WGMMA(float16, "f16")
#undef CLINFAST_WGMMA
#undef CLINFAST_NAMES_128
#undef CLINFAST_NAMES_64
#undef CLINFAST_SUMS_128
#undef CLINFAST_SUMS_64
#undef CLINFAST_FOUR

__device__ __forceinline__ void barrier_create(uint64_t *barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t *barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Whether the phase of this parity has ended.
__device__ __forceinline__ bool barrier_passed(uint64_t *barrier, int parity) {
  int passed;
  asm volatile("{ .reg .pred done; mbarrier.test_wait.parity.acquire.cta.shared::cta.b64 done, [%1], %2; "
               "selp.s32 %0, 1, 0, done; }"
               : "=r"(passed)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return passed;
}
// Until the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(uint64_t *barrier, int parity) {
  asm volatile("{ .reg .pred done; "
               "CLINFAST_AGAIN_%=: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1; "
               "@done bra CLINFAST_ENDED_%=; bra CLINFAST_AGAIN_%=; CLINFAST_ENDED_%=: }" ::"r"(shared_address(barrier)),
               "r"(parity)
               : "memory");
}
// What this thread wrote to shared memory is seen by wgmma, which reads it through another proxy.
__device__ __forceinline__ void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void named_barrier(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}
template <int Registers> __device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers> __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

#endif

}  // namespace cuda
}  // namespace clinfast
