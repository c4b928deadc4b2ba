// Int8 products on the processor's tile unit (Intel AMX), over the same panels: 16 or 32 rows times 32 outputs at once.
// Integer sums are exact, so that which unit computes a row cannot show in its result.
#pragma once

#include <cstdint>

#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define POLYHEAD_TILES
#endif

namespace polyhead {

constexpr int64_t TILE_ROWS = 16;     // rows of a tile
constexpr int64_t TILE_DEPTH = 64;    // inputs of a tile
constexpr int64_t MIN_TILE_ROWS = 5;  // fewer are quicker by vectors

#if defined(POLYHEAD_TILES)

constexpr bool HAS_TILES = true;

// The system lends the tile unit to a process that asks for it; true where it did.
inline bool tiles_are_allowed() {
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
  static const bool allowed = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
  return allowed;
}

// The eight tiles of this thread, rows of 64 bytes, given back at the end: tiles 4 and 5 of 16 rows, the others of `rows`.
class TileUnit {
 public:
  explicit TileUnit(int64_t rows = TILE_ROWS) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = TILE_DEPTH;
      config.rows[tile] = static_cast<uint8_t>(tile == 4 || tile == 5 ? TILE_ROWS : rows);
    }
    // gcc 12's intrinsic says that it reads eight bytes of it, and the others would not be written.
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~TileUnit() { _tile_release(); }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
};

// Asks for `LINES` of memory at `next`, and moves it on.
template <int LINES>
inline void ask(const int8_t*& next) {
#pragma GCC unroll 16
  for (int line = 0; line < LINES; ++line, next += 64) __builtin_prefetch(next, 0, 2);
}

// to [16 TILES, 32] = rows x (`stride` apart, read to the next multiple of 64) times the panel w, whose weights are kept
// with 128 added. What w holds beyond `depth` meets zeros of x. Asks meanwhile, a few lines between any two products, for
// most of as much memory at `next`, and moves it on.
template <int TILES>
inline void multiply_tiles(const int8_t* w, const int8_t* x, int64_t stride, int64_t depth, int32_t* to, const int8_t*& next) {
  constexpr int64_t W_STRIDE = 128, Y_STRIDE = 128;
  constexpr int LINES = 24 / (2 * TILES);  // of the 32 of a step
  asm volatile("" ::: "memory");           // gcc 12's tile loads do not say that they read memory
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (TILES == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += TILE_DEPTH, x += TILE_DEPTH, w += TILE_DEPTH * 32) {
    ask<LINES>(next);
    _tile_loadd(4, x, stride);
    _tile_loadd(6, w, W_STRIDE);
    _tile_dpbsud(0, 4, 6);
    ask<LINES>(next);
    _tile_loadd(7, w + 64, W_STRIDE);
    _tile_dpbsud(1, 4, 7);
    if constexpr (TILES == 2) {
      ask<LINES>(next);
      _tile_loadd(5, x + TILE_ROWS * stride, stride);
      _tile_dpbsud(2, 5, 6);
      ask<LINES>(next);
      _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, to, Y_STRIDE);
  _tile_stored(1, to + 16, Y_STRIDE);
  if constexpr (TILES == 2) {
    _tile_stored(2, to + TILE_ROWS * 32, Y_STRIDE);
    _tile_stored(3, to + TILE_ROWS * 32 + 16, Y_STRIDE);
  }
}

#else

constexpr bool HAS_TILES = false;

#endif

}  // namespace polyhead
