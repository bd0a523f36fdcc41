// Intel AMX: eight tile registers of 16 rows by 64 bytes, and their product of bf16 pairs into fp32. In assembly, because
// the compilers' intrinsics do not say which memory they read.
#pragma once

#include "vec.h"

#if defined(CLINFAST_AMX)

namespace clinfast {
namespace CLINFAST_ISA {

// Rows of a tile, and bf16 elements of a left tile's row.
static constexpr int64_t kAmxRows = 16, kAmxDepth = 32;

// Tiles 0 to 3 are sums of [rows, 16] fp32; 4 and 5 left operands [rows, 32] bf16; 6 and 7 right operands, 16 rows of 16
// pairs. Other code in the process uses the tiles too, so each parallel region configures them and lets go of them.
class AmxTiles {
 public:
  explicit AmxTiles(int64_t rows = kAmxRows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {0};
      uint16_t row_bytes[16] = {0};
      uint8_t rows[16] = {0};
    } config;
    for (int tile = 0; tile < 8; tile++) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = uint8_t(tile < 6 ? rows : kAmxRows);
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  ~AmxTiles() { __asm__ volatile("tilerelease" ::: "memory"); }
  AmxTiles(const AmxTiles &) = delete;
  AmxTiles &operator=(const AmxTiles &) = delete;
};

// Writes to what tile_load reads must stand before this; it costs nothing at run time.
static inline void amx_memory_written() { __asm__ volatile("" ::: "memory"); }

template <int Tile> static inline void tile_zero() { __asm__ volatile("tilezero %%tmm%c0" ::"i"(Tile)); }
template <int Tile> static inline void tile_load(const void *p, int64_t stride_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride_bytes), "i"(Tile));
}
template <int Tile> static inline void tile_store(void *p, int64_t stride_bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride_bytes), "i"(Tile) : "memory");
}
template <int Sum, int Left, int Right> static inline void tile_multiply_add() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Left), "i"(Right));
}

// The sums of M by 2 tiles: left tiles 4.., right tiles 6 and 7.
template <int M> static inline void zero_sums() {
  tile_zero<0>();
  tile_zero<1>();
  if constexpr (M == 2) {
    tile_zero<2>();
    tile_zero<3>();
  }
}
template <int M>
static inline void multiply_add_sums(const void *left0, const void *left1, int64_t left_bytes, const void *right0,
                                     const void *right1, int64_t right_bytes) {
  tile_load<6>(right0, right_bytes);
  tile_load<4>(left0, left_bytes);
  tile_multiply_add<0, 4, 6>();
  tile_load<7>(right1, right_bytes);
  tile_multiply_add<1, 4, 7>();
  if constexpr (M == 2) {
    tile_load<5>(left1, left_bytes);
    tile_multiply_add<2, 5, 6>();
    tile_multiply_add<3, 5, 7>();
  }
}
// The sums as M * 16 rows of 32 floats, `stride` apart.
template <int M> static inline void store_sums(float *to, int64_t stride) {
  tile_store<0>(to, stride * 4);
  tile_store<1>(to + 16, stride * 4);
  if constexpr (M == 2) {
    tile_store<2>(to + kAmxRows * stride, stride * 4);
    tile_store<3>(to + kAmxRows * stride + 16, stride * 4);
  }
}

}  // namespace CLINFAST_ISA
}  // namespace clinfast

#endif
