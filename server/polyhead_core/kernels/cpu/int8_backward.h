// The gradient of an int8 layer's input on the tile unit (Intel AMX), for training: g W, W as it is stored, [out, in]. Int8
// weights are exact in bfloat16, and gradients are split into three bfloat16 parts, which hold all their bits. A row's sums
// are over the outputs in order, 32 at a time in runs of MOST_DEPTH, whatever its tile begins with.
#pragma once

#include "bfloat16_parts.h"
#include "memory.h"

namespace polyhead {

#if defined(POLYHEAD_BFLOAT16_TILES)

constexpr int64_t GRADIENT_PARTS = 3;
constexpr int64_t COLUMN_TILES = 4;  // of 16 inputs, summed together
constexpr int64_t COLUMNS = COLUMN_TILES * TILE_ROWS;
constexpr int64_t TILE_SIZE = TILE_ROWS * PAIR_DEPTH;           // bfloat16 elements of a tile
constexpr int64_t MOST_ROWS = 128, MOST_DEPTH = 48 * PAIR_DEPTH;  // whose parts stay in the second-level cache

inline bool runs_backward_on_unit() { return tiles_are_allowed(); }

// `out` outputs of rows `stride` apart, times scale [out], as tiles [rows / 16, out / 32, GRADIENT_PARTS, 16, 32], zeros
// beyond both ends.
inline void split_gradients(const float* g, int64_t stride, const float* scale, int64_t rows, int64_t out, int64_t depth,
                            BFloat16* to) {
  for (int64_t row = 0; row < round_up(rows, TILE_ROWS); ++row) {
    BFloat16* tile = to + row / TILE_ROWS * (depth * GRADIENT_PARTS * TILE_ROWS) + row % TILE_ROWS * PAIR_DEPTH;
    for (int64_t k = 0; k < depth; k += PAIR_DEPTH, tile += GRADIENT_PARTS * TILE_SIZE) {
      const int64_t left = row < rows ? std::clamp<int64_t>(out - k, 0, PAIR_DEPTH) : 0;
      const __mmask32 seen = left == PAIR_DEPTH ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
      const auto scaled = [&](int64_t at, __mmask16 mask) {
        return _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, g + row * stride + at), _mm512_maskz_loadu_ps(mask, scale + at));
      };
      const Floats low = scaled(k, static_cast<__mmask16>(seen));
      split<GRADIENT_PARTS>(low, scaled(k + WIDTH, static_cast<__mmask16>(seen >> 16)), tile, TILE_SIZE);
    }
  }
}

// Columns [begin, begin + COLUMNS) of w [out, in] as tiles [out / 32, COLUMN_TILES, 16 pairs of rows, 16 columns, 2], zeros
// beyond both ends.
inline void pack_columns(const int8_t* w, int64_t out, int64_t in, int64_t begin, int64_t depth, BFloat16* to) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
  for (int64_t k = 0; k < depth; k += PAIR_DEPTH)
    for (int64_t tile = 0; tile < COLUMN_TILES; ++tile) {
      const int64_t column = begin + tile * TILE_ROWS, left = std::clamp<int64_t>(in - column, 0, TILE_ROWS);
      const __mmask16 seen = static_cast<__mmask16>((1u << left) - 1);
      const auto row = [&](int64_t o) {
        const __m128i bytes = _mm_maskz_loadu_epi8(o < out ? seen : __mmask16{0}, w + o * in + column);
        return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
      };
      for (int64_t pair = 0; pair < PAIR_DEPTH; pair += 2, to += PAIR_DEPTH)
        _mm512_storeu_si512(
            to, _mm512_or_si512(_mm512_srli_epi32(row(k + pair), 16), _mm512_and_si512(row(k + pair + 1), upper)));
    }
}

// to [16, COLUMNS] = a tile's rows of gradients times packed columns.
inline void multiply_gradients(const BFloat16* gradients, const BFloat16* columns, int64_t depth, float* to) {
  constexpr int64_t LINE_BYTES = 64;
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < depth; k += PAIR_DEPTH, columns += COLUMN_TILES * TILE_SIZE) {
#pragma GCC unroll 3
    for (int64_t part = 0; part < GRADIENT_PARTS; ++part, gradients += TILE_SIZE) {
      _tile_loadd(4, gradients, LINE_BYTES);
      _tile_loadd(5, columns, LINE_BYTES);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, columns + TILE_SIZE, LINE_BYTES);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(7, columns + 2 * TILE_SIZE, LINE_BYTES);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, columns + 3 * TILE_SIZE, LINE_BYTES);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  constexpr int64_t ROW_BYTES = COLUMNS * sizeof(float);
  _tile_stored(0, to, ROW_BYTES);
  _tile_stored(1, to + 16, ROW_BYTES);
  _tile_stored(2, to + 32, ROW_BYTES);
  _tile_stored(3, to + 48, ROW_BYTES);
}

// y [rows, in] = (g * scale) w / input_scale; `input_scale` may be null.
inline void backward_on_unit(const float* g, const int8_t* w, const float* scale, const float* input_scale, int64_t rows,
                             int64_t out, int64_t in, float* y) {
  if (rows == 0) return;
  const int64_t threads = at::get_num_threads(), most_depth = std::min(round_up(out, PAIR_DEPTH), MOST_DEPTH);
  const int64_t shares = threads * std::max<int64_t>(1, (rows + threads * MOST_ROWS - 1) / (threads * MOST_ROWS));
  const int64_t block = round_up((rows + shares - 1) / shares, TILE_ROWS), num_blocks = (rows + block - 1) / block;
  at::parallel_for(0, num_blocks, 1, [&](int64_t from, int64_t to) {
    const TileUnit unit;
    Buffer<BFloat16> gradients(block * most_depth * GRADIENT_PARTS), columns(most_depth * COLUMNS);
    alignas(64) float sums[TILE_ROWS * COLUMNS];
    for (int64_t b = from; b < to; ++b)
      for (int64_t output = 0; output < out; output += MOST_DEPTH) {
        const int64_t first = b * block, count = std::min(block, rows - first);
        const int64_t outputs = std::min(MOST_DEPTH, out - output), depth = round_up(outputs, PAIR_DEPTH);
        const bool is_last = output + outputs == out;
        split_gradients(g + first * out + output, out, scale + output, count, outputs, depth, gradients.data());
        for (int64_t column = 0; column < in; column += COLUMNS) {
          pack_columns(w + output * in, outputs, in, column, depth, columns.data());
          const int64_t width = std::min(COLUMNS, in - column);
          for (int64_t r = 0; r < count; r += TILE_ROWS) {
            multiply_gradients(gradients.data() + r * depth * GRADIENT_PARTS, columns.data(), depth, sums);
            for (int64_t i = 0; i < std::min(TILE_ROWS, count - r); ++i) {
              float* to_row = y + (first + r + i) * in + column;
              float* row = sums + i * COLUMNS;
              for (int64_t c = 0; output && c < width; ++c) row[c] += to_row[c];
              for (int64_t c = 0; c < width; ++c)
                to_row[c] = is_last && input_scale ? row[c] / input_scale[column + c] : row[c];
            }
          }
        }
      }
  });
}

#else

inline bool runs_backward_on_unit() { return false; }
inline void backward_on_unit(const float*, const int8_t*, const float*, const float*, int64_t, int64_t, int64_t, float*) {
  TORCH_CHECK(false, "int8_linear_backward is for processors with a tile unit: ask runs_backward() first");
}

#endif

}  // namespace polyhead
