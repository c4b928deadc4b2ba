// Of each row of logits the largest one's index, and whether all are finite.
#pragma once

#include "team.h"
#include "vector.h"

namespace polyhead {

// The lowest index of the largest logit; rows that are not finite get -1. Piece by piece, so that each comes once from the
// second-level cache, and only the piece that holds the largest is searched for it.
inline int64_t greedy_row(const float* x, int64_t size) {
  constexpr int64_t PIECE = 2048;
  float largest = x[0], zero = 0.0f;  // or NaN
  int64_t at = 0;
  for (int64_t begin = 0; begin < size; begin += PIECE) {
    const int64_t count = std::min(PIECE, size - begin);
    zero += in_lanes(x + begin, count, 0.0f, [](float a, float b) { return a + (b - b); });
    const float here = in_lanes(x + begin, count, largest, [](float a, float b) { return b > a ? b : a; });
    if (here > largest) largest = here, at = begin;
  }
  if (std::isnan(zero)) return -1;
  while (x[at] != largest) ++at;
  return at;
}

inline void greedy_rows(const float* x, int64_t rows, int64_t size, int64_t* out) {
  with_team(rows * size < (1 << 17), [&](const Member& member) {
    const auto [begin, end] = member.share(rows);
    for (int64_t r = begin; r < end; ++r) out[r] = greedy_row(x + r * size, size);
  });
}

}  // namespace polyhead
