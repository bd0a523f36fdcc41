// What kernels are written in: 16-bit types, 16-byte vectors, warp sums, and the instructions that C++ has no word for.
// Without nvcc, the same names come from a host emulation that is kept with the tests.
#pragma once

#include <cstdint>

namespace clinfast {
namespace cuda {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <typename T> struct alignas(16) Vector {
  static constexpr int N = 16 / sizeof(T);
  T at[N];
};

#if defined(__CUDACC__)
__device__ __forceinline__ float to_float(float x);
__device__ __forceinline__ float to_float(bfloat16 x);
__device__ __forceinline__ float to_float(float16 x);
#else
inline float to_float(float x);
inline float to_float(bfloat16 x);
inline float to_float(float16 x);
#endif

}  // namespace cuda
}  // namespace clinfast

#if defined(__CUDACC__)
#include "cuda/ptx.cuh"
#else
#include "cuda_instructions.h"
#endif

namespace clinfast {
namespace cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float to_float(float16 x) { return half_to_float(x.bits); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) { return {float_to_bfloat(x)}; }
template <> __device__ __forceinline__ float16 from_float<float16>(float x) { return {float_to_half(x)}; }

template <typename T> __device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}
#if defined(__CUDACC__)
template <> __device__ __forceinline__ uint32_t pack_pair<bfloat16>(float low, float high) {
  return floats_to_bfloats(low, high);
}
template <> __device__ __forceinline__ uint32_t pack_pair<float16>(float low, float high) {
  return floats_to_halves(low, high);
}
#endif

template <typename T> __device__ __forceinline__ void unpack(const Vector<T> &vector, float (&values)[Vector<T>::N]) {
#pragma unroll
  for (int i = 0; i < Vector<T>::N; i++) values[i] = to_float(vector.at[i]);
}

template <typename T> __device__ __forceinline__ Vector<T> pack(const float (&values)[Vector<T>::N]) {
  Vector<T> vector;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < Vector<T>::N; i++) vector.at[i] = values[i];
  } else {
    uint32_t *words = reinterpret_cast<uint32_t *>(vector.at);
#pragma unroll
    for (int i = 0; i < Vector<T>::N / 2; i++) words[i] = pack_pair<T>(values[2 * i], values[2 * i + 1]);
  }
  return vector;
}

// Elements [start, start + N) of a row of `size`, those past its end 0. Aligned: start and size are multiples of N and
// the row starts on 16 bytes.
template <bool Aligned, typename T>
__device__ __forceinline__ void load_row(const T *row, int start, int size, float (&values)[Vector<T>::N]) {
  if constexpr (Aligned) {
    unpack(*reinterpret_cast<const Vector<T> *>(row + start), values);
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::N; i++) values[i] = start + i < size ? to_float(row[start + i]) : 0.0f;
  }
}

template <bool Aligned, typename T, int N>
__device__ __forceinline__ void store_row(T *row, int start, int size, const float (&values)[N]) {
  if constexpr (Aligned && N == Vector<T>::N) {
    *reinterpret_cast<Vector<T> *>(row + start) = pack<T>(values);
  } else if constexpr (Aligned && sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; i += 4)
      *reinterpret_cast<float4 *>(row + start + i) =
          make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
  } else if constexpr (Aligned && N == 4) {
    uint2 words = {pack_pair<T>(values[0], values[1]), pack_pair<T>(values[2], values[3])};
    *reinterpret_cast<uint2 *>(row + start) = words;
  } else {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (start + i < size) row[start + i] = from_float<T>(values[i]);
  }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, mask);
  return x;
}

// The sum over a block of Threads, the same bits in every thread. `scratch` has one float a warp.
template <int Threads> __device__ __forceinline__ float block_sum(float x, float *scratch) {
  x = warp_sum(x);
  if constexpr (Threads == 32) return x;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int i = 0; i < Threads / 32; i++) total += scratch[i];
  __syncthreads();
  return total;
}

}  // namespace cuda
}  // namespace clinfast
