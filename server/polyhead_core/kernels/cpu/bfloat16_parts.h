// Floats as sums of bfloat16 parts, for the tile unit's products of bfloat16 that it sums in float32 (Intel AMX). Three parts
// hold all bits of a float, two hold 17.
#pragma once

#include "tiles.h"
#include "vector.h"

namespace polyhead {

#if defined(POLYHEAD_TILES) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define POLYHEAD_BFLOAT16_TILES

constexpr int64_t PAIR_DEPTH = 32;  // bfloat16 inputs of a tile

inline __m512i to_bfloat16(Floats low, Floats high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}
inline Floats low_floats(__m512i x) { return to_floats(_mm512_castsi512_si256(x)); }
inline Floats high_floats(__m512i x) { return to_floats(_mm512_extracti64x4_epi64(x, 1)); }

// 32 floats as the sum of `PARTS` bfloat16 rows, `stride` apart.
template <int PARTS>
inline void split(Floats low, Floats high, BFloat16* to, int64_t stride) {
#pragma GCC unroll 3
  for (int part = 0; part < PARTS; ++part) {
    const __m512i rounded = to_bfloat16(low, high);
    _mm512_storeu_si512(to + part * stride, rounded);
    low = _mm512_sub_ps(low, low_floats(rounded));
    high = _mm512_sub_ps(high, high_floats(rounded));
  }
}

#endif

}  // namespace polyhead
