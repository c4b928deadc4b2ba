// Of each row of logits the largest one's index, and whether all are finite.
#pragma once

#include "team.h"
#include "vector.h"

namespace polyhead {

// The lowest index of the largest logit; rows that are not finite get -1.
inline int64_t greedy_row(const float* x, int64_t size) {
  const float largest = in_lanes(x, size, x[0], [](float a, float b) { return b > a ? b : a; });
  const float zero = in_lanes(x, size, 0.0f, [](float a, float b) { return a + (b - b); });  // or NaN
  if (std::isnan(zero)) return -1;
  for (int64_t i = 0; i < size; ++i)
    if (x[i] == largest) return i;
  return -1;
}

inline void greedy_rows(const float* x, int64_t rows, int64_t size, int64_t* out) {
  with_team(rows * size < (1 << 17), [&](const Member& member) {
    const auto [begin, end] = member.share(rows);
    for (int64_t r = begin; r < end; ++r) out[r] = greedy_row(x + r * size, size);
  });
}

}  // namespace polyhead
