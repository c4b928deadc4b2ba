// Attention on vectors, for pages of any type and layout. Sums are in the same order in every tile, chunk and batch: scores
// by d in order, weights and values by key in order.
#pragma once

#include <utility>
#include <vector>

#include "attention_shape.h"

namespace polyhead {

struct VectorScratch {
  Buffer<float> weights, keys;
};

// Scores of `Q` queries with all keys of `N` blocks: out[q][n * block + j] = sum_d q[d] k_n[j][d], d in order. Asks
// meanwhile, line by line, for the `N` pages `next` (nullptr: none).
template <int Q, int N, typename K>
void block_scores(const float* const* queries, const K* const* keys, const AttentionShape& s, const K* const* next,
                  float* const* out) {
  const int64_t key_stride = s.transposed_keys ? 1 : s.width, d_stride = s.transposed_keys ? s.block : 1;
  int64_t j = 0;
  if (s.transposed_keys)
    for (; j + WIDTH <= s.block; j += WIDTH) {
      Floats sums[Q][N];
      for (int q = 0; q < Q; ++q)
        for (int n = 0; n < N; ++n) sums[q][n] = splat(0.0f);
      for (int64_t d = 0; d < s.width; ++d) {
        Floats k[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) {
          k[n] = load(keys[n] + d * s.block + j);
          if (next && d * s.block * sizeof(K) % LINE == 0) __builtin_prefetch(next[n] + d * s.block + j, 0, 2);
        }
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) {
          const Floats x = splat(queries[q][d]);
#pragma GCC unroll 2
          for (int n = 0; n < N; ++n) sums[q][n] = fma(x, k[n], sums[q][n]);
        }
      }
      for (int q = 0; q < Q; ++q)
        for (int n = 0; n < N; ++n) store(out[q] + n * s.block + j, sums[q][n]);
    }
  for (; j < s.block; ++j)
    for (int q = 0; q < Q; ++q)
      for (int n = 0; n < N; ++n) {
        float sum = 0;
        for (int64_t d = 0; d < s.width; ++d)
          sum = __builtin_fmaf(queries[q][d], to_float(keys[n][j * key_stride + d * d_stride]), sum);
        out[q][n * s.block + j] = sum;
      }
}

// out[q] += sum_j w[q][j] v[j] over the keys [begin, end) of one block, for one run of `V` vectors of d. Asks meanwhile for
// the same place in the page `next` (nullptr: none).
template <int Q, int V, typename K>
void block_values(const float* const* weights, const K* values, int64_t stride, int64_t begin, int64_t end,
                  const K* next, float* const* out) {
  Floats acc[Q][V];
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < V; ++v) acc[q][v] = load(out[q] + v * WIDTH);
  for (int64_t j = begin; j < end; ++j) {
    Floats w[Q];
    for (int q = 0; q < Q; ++q) w[q] = splat(weights[q][j]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Floats x = load(values + j * stride + v * WIDTH);
      if (next && v * WIDTH * sizeof(K) % LINE == 0) __builtin_prefetch(next + j * stride + v * WIDTH, 0, 2);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) acc[q][v] = fma(w[q], x, acc[q][v]);
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < V; ++v) store(out[q] + v * WIDTH, acc[q][v]);
}

template <int Q, typename K>
void weigh_values(const float* const* weights, const K* values, int64_t width, int64_t begin, int64_t end,
                  const K* next, float* const* out) {
  constexpr int V = Q == 1 ? 8 : 4;
  int64_t d = 0;
  const auto run = [&]<int N>() {
    float* to[Q];
    for (int q = 0; q < Q; ++q) to[q] = out[q] + d;
    block_values<Q, N>(weights, values + d, width, begin, end, next ? next + d : next, to);
    d += N * WIDTH;
  };
  while (d + V * WIDTH <= width) run.template operator()<V>();
  while (d + WIDTH <= width) run.template operator()<1>();
  for (; d < width; ++d)
    for (int q = 0; q < Q; ++q)
      for (int64_t j = begin; j < end; ++j) out[q][d] = __builtin_fmaf(weights[q][j], to_float(values[j * width + d]), out[q][d]);
}

// The results of one item. `ahead(n)`: the n-th of its pages, or of the next item's after them.
template <typename K, typename Ahead>
void attend_on_vectors(const AttentionItem& item, const K* keys, const K* values, VectorScratch& scratch, const Ahead& ahead,
                       float* out) {
  const AttentionShape& s = item.s;
  const int64_t group = s.group(), num_queries = item.num_queries(), length = item.num_blocks * s.block;
  grow(scratch.weights, num_queries * length);
  const auto weights = [&](int64_t i) { return scratch.weights.data() + i * length; };

  const auto score_blocks = [&]<int N, typename T>(const T* const* blocks, int64_t first, const T* const* next) {
    int64_t i = 0;
    const auto run = [&]<int Q>() {
      const float* queries[Q];
      float* to[Q];
      for (int q = 0; q < Q; ++q) queries[q] = item.query(i + q), to[q] = weights(i + q) + first * s.block;
      block_scores<Q, N>(queries, blocks, s, i ? nullptr : next, to);
      i += Q;
    };
    while (i + 4 <= num_queries) run.template operator()<4>();
    while (i + 3 <= num_queries) run.template operator()<3>();
    while (i < num_queries) run.template operator()<1>();
  };
  const auto score = [&]<int N>(int64_t first) {
    const K *blocks[N], *next[N];
    for (int n = 0; n < N; ++n) blocks[n] = item.page(keys, first + n), next[n] = ahead(first + n + PAGES_AHEAD);
    if constexpr (!std::is_same_v<K, float>) {
      if (num_queries > 4) {  // convert once what many queries read
        grow(scratch.keys, N * s.page());
        const float* converted[N];
        for (int n = 0; n < N; ++n) {
          float* to = scratch.keys.data() + n * s.page();
          converted[n] = to;
          prefetch(next[n], s.page() * sizeof(K));
          for (int64_t e = 0; e < s.page(); ++e) to[e] = to_float(blocks[n][e]);
        }
        return score_blocks.template operator()<N, float>(converted, first, nullptr);
      }
    }
    score_blocks.template operator()<N, K>(blocks, first, next);
  };
  int64_t first = 0;
  for (; first + 2 <= item.num_blocks; first += 2) score.template operator()<2>(first);
  if (first < item.num_blocks) score.template operator()<1>(first);

  std::vector<float> totals(group);
  for (int64_t token = 0; token < item.tile.count; ++token) {
    const int64_t begin = item.begin(token), end = item.end(token);
    for (int64_t h = 0; h < group; ++h) {
      totals[h] = softmax_weights(weights(token * group + h) + begin - item.first_block * s.block, end - begin, s);
      std::fill_n(item.result(out, token * group + h), s.width, 0.0f);
    }
    for (int64_t n = 0; n < item.num_blocks; ++n) {
      // Only keys that this token sees: the rest of a block may hold anything, a NaN too.
      const int64_t first = (item.first_block + n) * s.block;
      const int64_t from = std::max(begin, first) - first, to = std::min(end, first + s.block) - first;
      const K* next = token == 0 ? ahead(item.num_blocks + n + PAGES_AHEAD) : nullptr;
      if (next && to - from < s.block) prefetch(std::exchange(next, nullptr), s.page() * sizeof(K));
      if (from >= to) continue;
      int64_t h = 0;
      const auto run = [&]<int Q>() {
        const float* w[Q];
        float* o[Q];
        for (int i = 0; i < Q; ++i) {
          w[i] = weights(token * group + h + i) + n * s.block;
          o[i] = item.result(out, token * group + h + i);
        }
        weigh_values<Q>(w, item.page(values, n), s.width, from, to, h ? nullptr : next, o);
        h += Q;
      };
      while (h + 3 <= group) run.template operator()<3>();
      while (h + 2 <= group) run.template operator()<2>();
      while (h < group) run.template operator()<1>();
    }
    for (int64_t h = 0; h < group; ++h) {
      float* to = item.result(out, token * group + h);
      const float inverse = 1.0f / totals[h];
      for (int64_t d = 0; d < s.width; ++d) to[d] *= inverse;
    }
  }
}

}  // namespace polyhead
