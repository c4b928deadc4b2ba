// What attention works on: its shape, the tiles of queries, one layer's pages, and the softmax.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "tiles.h"
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

constexpr int64_t TILE_TOKENS = HAS_TILES ? 16 : 8;  // at most

inline std::vector<QueryTile> query_tiles(const int32_t* sequence, const int64_t* positions, int64_t tokens) {
  std::vector<QueryTile> tiles;
  for (int64_t t = 0; t < tokens; ++t) {
    const bool follows = t && sequence[t] == sequence[t - 1] && positions[t] == positions[t - 1] + 1;
    if (follows && tiles.back().count < TILE_TOKENS) ++tiles.back().count;
    else tiles.push_back({t, 1, sequence[t]});
  }
  return tiles;
}

// Into the second-level cache: it waits for more lines at once than the first.
inline void prefetch(const void* data, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += LINE) __builtin_prefetch(static_cast<const char*>(data) + line, 0, 2);
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

// Where the sequences of a step have their keys and values.
struct SequencePages {
  const int32_t* block_tables;  // [sequences, max blocks]
  const int32_t* key_offsets;   // [sequences]: the place of position 0 in the first block; null: 0
};

// The queries of one tile's tokens whose heads share the key/value head g.
struct AttentionItem {
  const AttentionShape& s;
  const float* q;  // [tokens, q_stride]
  int64_t q_stride;
  const int64_t* positions;
  const int32_t* blocks;  // of the tile's sequence
  int64_t key_offset;     // of the tile's sequence
  QueryTile tile;
  int64_t g;
  int64_t first_key, end_key, first_block, num_blocks;  // what any of the tokens sees, by places in the blocks

  AttentionItem(const AttentionShape& shape, const float* q_, int64_t q_stride_, const int64_t* positions_,
                const SequencePages& pages, const QueryTile& tile_, int64_t g_)
      : s(shape), q(q_), q_stride(q_stride_), positions(positions_),
        blocks(pages.block_tables + tile_.sequence * shape.max_blocks),
        key_offset(pages.key_offsets ? pages.key_offsets[tile_.sequence] : 0), tile(tile_), g(g_) {
    first_key = begin(0), end_key = end(tile.count - 1);
    first_block = first_key / s.block, num_blocks = (end_key - 1) / s.block - first_block + 1;
  }

  // The keys that a token sees, by their places.
  int64_t end(int64_t token) const { return key_offset + positions[tile.begin + token] + 1; }
  int64_t begin(int64_t token) const { return s.window ? std::max(key_offset, end(token) - s.window) : key_offset; }

  int64_t num_queries() const { return tile.count * s.group(); }
  const float* query(int64_t i) const {
    return q + (tile.begin + i / s.group()) * q_stride + (g * s.group() + i % s.group()) * s.width;
  }
  // Where the i-th query's result lies in out [tokens, heads * width].
  float* result(float* out, int64_t i) const {
    return out + ((tile.begin + i / s.group()) * s.heads + g * s.group() + i % s.group()) * s.width;
  }

  template <typename K>
  const K* page(const K* pages, int64_t n) const {
    return pages + (blocks[first_block + n] * s.kv_heads + g) * s.page();
  }

  // The n-th page that is read: all key pages, then all value pages, in order. nullptr where there is no n-th.
  template <typename K>
  const K* page_in_turn(const K* keys, const K* values, int64_t n) const {
    if (n >= 2 * num_blocks) return nullptr;
    return n < num_blocks ? page(keys, n) : page(values, n - num_blocks);
  }
};

// Pages lie anywhere, and the processor cannot guess the next one: it is asked for so many ahead.
constexpr int64_t PAGES_AHEAD = 6;

// Caps scores [size] where they are to be; returns the factor that is still to be applied to them.
inline float cap_scores(float* x, int64_t size, const AttentionShape& s) {
  if (s.softcap == 0.0f) return s.scale;
  for (int64_t i = 0; i < size; ++i) x[i] = s.softcap * std::tanh(x[i] * s.scale / s.softcap);
  return 1.0f;
}

#if defined(__AVX512F__) && defined(__AVX512BW__)

// NaN is passed over: its weight is NaN anyway.
inline float largest_score(const float* x, int64_t size) {
  Floats largest = splat(-INFINITY);
  for (int64_t i = 0; i < size; i += WIDTH) {
    const __mmask16 seen = lanes(size - i);
    largest = _mm512_mask_max_ps(largest, seen, _mm512_maskz_loadu_ps(seen, x + i), largest);
  }
  return _mm512_reduce_max_ps(largest);
}

// put(i, seen, low, high): exp(scale s - max) of scores [size], 32 from i on, zero where not seen. Returns their sum, whose
// order starts with x.
template <typename Put>
inline float softmax(float* x, int64_t size, const AttentionShape& s, const Put& put) {
  const float scale = cap_scores(x, size, s);
  const Floats factor = splat(scale), shift = splat(-largest_score(x, size) * scale);
  Floats even = splat(0.0f), odd = even;
  for (int64_t i = 0; i < size; i += 2 * WIDTH) {
    const __mmask32 seen = size - i >= 2 * WIDTH ? ~__mmask32{0} : (__mmask32{1} << (size - i)) - 1;
    const auto weights = [&](int64_t at, __mmask16 mask) {
      return _mm512_maskz_mov_ps(mask, exp_nonpositive(fma(_mm512_maskz_loadu_ps(mask, x + at), factor, shift)));
    };
    const Floats low = weights(i, static_cast<__mmask16>(seen)), high = weights(i + WIDTH, static_cast<__mmask16>(seen >> WIDTH));
    even = _mm512_add_ps(even, low), odd = _mm512_add_ps(odd, high);
    put(i, seen, low, high);
  }
  return sum(_mm512_add_ps(even, odd));
}

// Turns scores [size] into exp(scale s - max); returns their sum.
inline float softmax_weights(float* x, int64_t size, const AttentionShape& s) {
  return softmax(x, size, s, [&](int64_t i, __mmask32 seen, Floats low, Floats high) {
    _mm512_mask_storeu_ps(x + i, static_cast<__mmask16>(seen), low);
    _mm512_mask_storeu_ps(x + i + WIDTH, static_cast<__mmask16>(seen >> WIDTH), high);
  });
}

#else

inline float largest_score(const float* x, int64_t size) {
  return in_lanes(x, size, x[0], [](float a, float b) { return b > a ? b : a; });
}

inline float softmax_weights(float* x, int64_t size, const AttentionShape& s) {
  const float scale = cap_scores(x, size, s), largest = largest_score(x, size);
  for (int64_t i = 0; i < size; ++i) x[i] = exp_nonpositive((x[i] - largest) * scale);
  return in_lanes(x, size, 0.0f, [](float a, float b) { return a + b; });
}

#endif

}  // namespace polyhead
