// The PTX behind csrc/cuda/device.cuh, on the CPU: 16-bit conversions, cp.async, ldmatrix and mma.sync with the
// register layouts of the PTX manual.
#pragma once

#include "cuda_emulation.h"

namespace clinfast {
namespace cuda {

inline void after_earlier_grids() { emulation::machine.current->after_earlier_grids = true; }

inline float exp2_approximate(float x) { return std::exp2(x); }

inline float half_to_float(uint16_t bits) {
  uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(float(mantissa), -24);
  if (exponent == 31) return __uint_as_float(sign | 0x7F800000 | (mantissa << 13));
  return __uint_as_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline uint16_t float_to_half(float x) {
  uint16_t sign = uint16_t(__float_as_uint(x) >> 16 & 0x8000);
  float magnitude = std::fabs(x);
  if (x != x) return 0x7FFF;
  if (magnitude >= 65520.0f) return sign | 0x7C00;
  if (magnitude < 6.103515625e-05f) return sign | uint16_t(std::nearbyint(std::ldexp(magnitude, 24)));
  uint32_t bits = __float_as_uint(magnitude);
  bits += 0xFFF + ((bits >> 13) & 1);
  return sign | uint16_t((bits - (112u << 23)) >> 13);
}

inline uint16_t float_to_bfloat(float x) {
  uint32_t bits = __float_as_uint(x);
  if (x != x) return 0x7FFF;
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline void cp_async_16(void *to, const void *from, bool present) {
  emulation::machine.current->open.push_back({to, from, present ? 16 : 0});
}
inline void cp_async_commit() {
  emulation::Fiber &fiber = *emulation::machine.current;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int Pending> void cp_async_wait() {
  auto &groups = emulation::machine.current->groups;
  for (; int(groups.size()) > Pending; groups.pop_front()) emulation::land(groups.front());
}

struct MatrixSlot { const void *row; uint32_t *out; };

template <bool Transposed> void load_matrices(uint32_t (&out)[4], const void *row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulation::fail("ldmatrix: a row is not aligned to 16 bytes");
  MatrixSlot mine{row, out};
  emulation::collective(Transposed ? "ldmatrix.trans" : "ldmatrix", mine, [](MatrixSlot **lanes) {
    for (int lane = 0; lane < 32; lane++)
      for (int matrix = 0; matrix < 4; matrix++) {
        uint16_t pair[2];
        for (int i = 0; i < 2; i++) {
          int row = Transposed ? 2 * (lane % 4) + i : lane / 4, column = Transposed ? lane / 4 : 2 * (lane % 4) + i;
          pair[i] = static_cast<const uint16_t *>(lanes[8 * matrix + row]->row)[column];
        }
        lanes[lane]->out[matrix] = pair[0] | uint32_t(pair[1]) << 16;
      }
  });
}

struct MmaSlot { const uint32_t *a, *b; float *c; };

template <typename T> float decode(uint32_t word, int half) {
  T value;
  value.bits = uint16_t(word >> (16 * half));
  return to_float(value);
}

// c[16, 8] += a[16, 16] b[16, 8]
template <typename T> void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaSlot mine{a, b, c};
  emulation::collective("mma.m16n8k16", mine, [](MmaSlot **lanes) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 8; i++) {
        int column = 2 * (lane % 4) + i % 2, word = i / 2;
        left[lane / 4 + 8 * (word % 2)][column + 8 * (word / 2)] = decode<T>(lanes[lane]->a[word], i % 2);
        if (i < 4) right[column + 8 * word][lane / 4] = decode<T>(lanes[lane]->b[word], i % 2);
      }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += left[row][k] * right[k][column];
        lanes[lane]->c[i] += sum;
      }
  });
}

// Every thread of a block declares its shared arrays in the same order.
template <typename T> T *static_shared(int count) {
  emulation::Fiber &fiber = *emulation::machine.current;
  T *array = reinterpret_cast<T *>(emulation::machine.shared + fiber.shared_used);
  fiber.shared_used += (count * sizeof(T) + 127) / 128 * 128;
  return array;
}

}  // namespace cuda
}  // namespace clinfast

#define CLINFAST_SHARED(type, name, count) type *name = clinfast::cuda::static_shared<type>(count)
#define CLINFAST_DYNAMIC_SHARED(name) char *name = emulation::machine.shared
