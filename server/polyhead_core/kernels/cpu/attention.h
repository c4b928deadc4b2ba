// Attention over paged keys and values, for prefill and decode rows alike.
//
// Pages are [num_blocks, G, block, D] to their readers; keys may lie transposed, [.., D, block] in memory, which is how
// this device's pool keeps them: the scores of a block are then one vector of keys, with no sum across a vector.
// A row's arithmetic is the same in every tile, chunk and batch: scores by d in order, weights and values by key in order.
#pragma once

#include <atomic>
#include <cmath>
#include <vector>

#include "team.h"
#include "vector.h"

namespace polyhead {

struct AttentionShape {
  int64_t heads, kv_heads, width, block, max_blocks, window;
  float scale, softcap;
  bool transposed_keys;

  int64_t group() const { return heads / kv_heads; }
  int64_t page() const { return block * width; }
};

// Consecutive tokens of one sequence.
struct QueryTile {
  int64_t begin, count, sequence;
};

constexpr int64_t TILE_TOKENS = 8;

inline std::vector<QueryTile> query_tiles(const int32_t* sequence, const int64_t* positions, int64_t tokens) {
  std::vector<QueryTile> tiles;
  for (int64_t t = 0; t < tokens; ++t) {
    const bool follows = t && sequence[t] == sequence[t - 1] && positions[t] == positions[t - 1] + 1;
    if (follows && tiles.back().count < TILE_TOKENS) ++tiles.back().count;
    else tiles.push_back({t, 1, sequence[t]});
  }
  return tiles;
}

inline void prefetch(const void* data, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(data) + line);
}

struct AttentionScratch {
  std::vector<float> weights, keys;
};

// Scores of `Q` queries with all keys of one block: out[q][j] = sum_d q[d] k[j][d], d in order.
template <int Q, typename K>
void block_scores(const float* const* queries, const K* keys, const AttentionShape& s, float* const* out) {
  const int64_t key_stride = s.transposed_keys ? 1 : s.width, d_stride = s.transposed_keys ? s.block : 1;
  int64_t j = 0;
  if (s.transposed_keys) {
    for (; j + 2 * WIDTH <= s.block; j += 2 * WIDTH) {
      Floats low[Q], high[Q];
      for (int q = 0; q < Q; ++q) low[q] = high[q] = splat(0.0f);
      for (int64_t d = 0; d < s.width; ++d) {
        const Floats k0 = load(keys + d * s.block + j), k1 = load(keys + d * s.block + j + WIDTH);
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) {
          const Floats x = splat(queries[q][d]);
          low[q] = fma(x, k0, low[q]);
          high[q] = fma(x, k1, high[q]);
        }
      }
      for (int q = 0; q < Q; ++q) {
        store(out[q] + j, low[q]);
        store(out[q] + j + WIDTH, high[q]);
      }
    }
    for (; j + WIDTH <= s.block; j += WIDTH) {
      Floats sums[Q];
      for (int q = 0; q < Q; ++q) sums[q] = splat(0.0f);
      for (int64_t d = 0; d < s.width; ++d) {
        const Floats k = load(keys + d * s.block + j);
        for (int q = 0; q < Q; ++q) sums[q] = fma(splat(queries[q][d]), k, sums[q]);
      }
      for (int q = 0; q < Q; ++q) store(out[q] + j, sums[q]);
    }
  }
  for (; j < s.block; ++j)
    for (int q = 0; q < Q; ++q) {
      float sum = 0;
      for (int64_t d = 0; d < s.width; ++d)
        sum = __builtin_fmaf(queries[q][d], to_float(keys[j * key_stride + d * d_stride]), sum);
      out[q][j] = sum;
    }
}

// out[q] += sum_j w[q][j] v[j] over the keys [begin, end) of one block, for one run of `V` vectors of d.
template <int Q, int V, typename K>
void block_values(const float* const* weights, const K* values, int64_t stride, int64_t begin, int64_t end,
                  float* const* out) {
  Floats acc[Q][V];
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < V; ++v) acc[q][v] = load(out[q] + v * WIDTH);
  for (int64_t j = begin; j < end; ++j) {
    Floats w[Q];
    for (int q = 0; q < Q; ++q) w[q] = splat(weights[q][j]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Floats x = load(values + j * stride + v * WIDTH);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) acc[q][v] = fma(w[q], x, acc[q][v]);
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < V; ++v) store(out[q] + v * WIDTH, acc[q][v]);
}

template <int Q, typename K>
void weigh_values(const float* const* weights, const K* values, int64_t width, int64_t begin, int64_t end,
                  float* const* out) {
  constexpr int V = Q == 1 ? 8 : 4;
  int64_t d = 0;
  const auto run = [&]<int N>() {
    float* to[Q];
    for (int q = 0; q < Q; ++q) to[q] = out[q] + d;
    block_values<Q, N>(weights, values + d, width, begin, end, to);
    d += N * WIDTH;
  };
  while (d + V * WIDTH <= width) run.template operator()<V>();
  while (d + WIDTH <= width) run.template operator()<1>();
  for (; d < width; ++d)
    for (int q = 0; q < Q; ++q)
      for (int64_t j = begin; j < end; ++j) out[q][d] = __builtin_fmaf(weights[q][j], to_float(values[j * width + d]), out[q][d]);
}

// Turns scores [size] into exp(scale s - max); returns their sum.
inline float softmax_weights(float* x, int64_t size, const AttentionShape& s) {
  for (int64_t i = 0; i < size; ++i) x[i] *= s.scale;
  if (s.softcap != 0.0f)
    for (int64_t i = 0; i < size; ++i) x[i] = s.softcap * std::tanh(x[i] / s.softcap);
  const float largest = in_lanes(x, size, x[0], [](float a, float b) { return b > a ? b : a; });
  for (int64_t i = 0; i < size; ++i) x[i] = exp_nonpositive(x[i] - largest);
  const float total = in_lanes(x, size, 0.0f, [](float a, float b) { return a + b; });
  return total;
}

// The query heads of a tile's tokens that share key/value head g. q and out are [tokens, q_stride] and [tokens, heads * width].
template <typename K>
void attend(const float* q, int64_t q_stride, const K* keys, const K* values, const int32_t* blocks,
            const int64_t* positions, const QueryTile& tile, int64_t g, const AttentionShape& s, AttentionScratch& scratch,
            float* out) {
  const int64_t group = s.group(), num_queries = tile.count * group, row = s.heads * s.width;
  const int64_t first_position = positions[tile.begin], last_position = positions[tile.begin + tile.count - 1];
  const int64_t tile_begin = s.window ? std::max<int64_t>(0, first_position + 1 - s.window) : 0;
  const int64_t first_block = tile_begin / s.block, last_block = last_position / s.block;
  const int64_t length = (last_block - first_block + 1) * s.block;
  if (static_cast<int64_t>(scratch.weights.size()) < num_queries * length) scratch.weights.resize(num_queries * length);
  const auto page = [&](const K* pages, int64_t block) { return pages + (blocks[block] * s.kv_heads + g) * s.page(); };
  const auto query = [&](int64_t i) { return q + (tile.begin + i / group) * q_stride + (g * group + i % group) * s.width; };
  const auto result = [&](int64_t i) { return out + (tile.begin + i / group) * row + (g * group + i % group) * s.width; };
  const auto weights = [&](int64_t i) { return scratch.weights.data() + i * length; };

  // Pages lie anywhere, and the processor cannot guess the next one: all key pages, then all value pages, in order.
  constexpr int64_t PAGES_AHEAD = 3;
  const int64_t num_blocks = last_block - first_block + 1;
  const auto prefetch_page = [&](int64_t n) {
    if (n >= 2 * num_blocks) return;
    prefetch(n < num_blocks ? page(keys, first_block + n) : page(values, first_block + n - num_blocks),
             s.page() * sizeof(K));
  };
  for (int64_t n = 0; n < PAGES_AHEAD; ++n) prefetch_page(n);

  const auto score_block = [&](const auto* block_keys, int64_t offset) {
    int64_t i = 0;
    const auto run = [&]<int Q>() {
      const float* queries[Q];
      float* to[Q];
      for (int n = 0; n < Q; ++n) queries[n] = query(i + n), to[n] = weights(i + n) + offset;
      block_scores<Q>(queries, block_keys, s, to);
      i += Q;
    };
    while (i + 4 <= num_queries) run.template operator()<4>();
    while (i + 3 <= num_queries) run.template operator()<3>();
    while (i < num_queries) run.template operator()<1>();
  };
  for (int64_t block = first_block; block <= last_block; ++block) {
    const K* block_keys = page(keys, block);
    const int64_t offset = (block - first_block) * s.block;
    prefetch_page(block - first_block + PAGES_AHEAD);
    if constexpr (!std::is_same_v<K, float>) {
      if (num_queries > 4) {  // convert once what many queries read
        scratch.keys.resize(s.page());
        for (int64_t e = 0; e < s.page(); ++e) scratch.keys[e] = to_float(block_keys[e]);
        score_block(scratch.keys.data(), offset);
        continue;
      }
    }
    score_block(block_keys, offset);
  }

  std::vector<float> totals(group);
  for (int64_t token = 0; token < tile.count; ++token) {
    const int64_t end = positions[tile.begin + token] + 1;
    const int64_t begin = s.window ? std::max<int64_t>(0, end - s.window) : 0;
    const int64_t skipped = begin - first_block * s.block;
    for (int64_t h = 0; h < group; ++h) {
      totals[h] = softmax_weights(weights(token * group + h) + skipped, end - begin, s);
      std::fill_n(result(token * group + h), s.width, 0.0f);
    }
    for (int64_t block = begin / s.block; block * s.block < end; ++block) {
      // Only keys that this token sees: the rest of a block may hold anything, a NaN too.
      const int64_t from = std::max(begin, block * s.block) - block * s.block;
      const int64_t to = std::min(end, (block + 1) * s.block) - block * s.block;
      const K* block_values = page(values, block);
      if (token == 0) prefetch_page(num_blocks + block - first_block + PAGES_AHEAD);
      int64_t h = 0;
      const auto run = [&]<int Q>() {
        const float* w[Q];
        float* o[Q];
        for (int n = 0; n < Q; ++n) {
          w[n] = weights(token * group + h + n) + (block - first_block) * s.block;
          o[n] = result(token * group + h + n);
        }
        weigh_values<Q>(w, block_values, s.width, from, to, o);
        h += Q;
      };
      while (h + 3 <= group) run.template operator()<3>();
      while (h + 2 <= group) run.template operator()<2>();
      while (h < group) run.template operator()<1>();
    }
    for (int64_t h = 0; h < group; ++h) {
      float* to = result(token * group + h);
      const float inverse = 1.0f / totals[h];
      for (int64_t d = 0; d < s.width; ++d) to[d] *= inverse;
    }
  }
}

// One layer's pages; K is the type of their elements.
struct LayerPages {
  at::Tensor keys, values;

  template <typename F>
  void with_data(const F& run) const {
    if (keys.scalar_type() == at::kFloat) run(keys.const_data_ptr<float>(), values.const_data_ptr<float>());
    else run(keys.const_data_ptr<BFloat16>(), values.const_data_ptr<BFloat16>());
  }
};

inline bool keys_are_transposed(const at::Tensor& keys, const at::Tensor& values) {
  const int64_t block = keys.size(2), width = keys.size(3);
  TORCH_CHECK(values.is_contiguous() && values.sizes() == keys.sizes() && values.scalar_type() == keys.scalar_type(),
              "value pages must be contiguous and like the key pages");
  TORCH_CHECK(keys.scalar_type() == at::kFloat || keys.scalar_type() == at::kBFloat16, "pages must be float32 or bfloat16");
  if (keys.stride(2) == 1 && keys.stride(3) == block && keys.stride(1) == block * width) return true;
  TORCH_CHECK(keys.is_contiguous(), "key pages must be contiguous, or transposed within their blocks");
  return false;
}

// Takes tiles from `next` until none is left.
inline void attend_tiles(const LayerPages& pages, const float* q, int64_t q_stride, const int32_t* block_tables,
                         const int64_t* positions, const std::vector<QueryTile>& tiles, const AttentionShape& s,
                         std::atomic<int64_t>& next, AttentionScratch& scratch, float* out) {
  const int64_t items = static_cast<int64_t>(tiles.size()) * s.kv_heads;
  pages.with_data([&](const auto* keys, const auto* values) {
    for (int64_t item = next.fetch_add(1); item < items; item = next.fetch_add(1)) {
      const QueryTile& tile = tiles[item / s.kv_heads];
      attend(q, q_stride, keys, values, block_tables + tile.sequence * s.max_blocks, positions, tile, item % s.kv_heads, s,
             scratch, out);
    }
  });
}

}  // namespace polyhead
