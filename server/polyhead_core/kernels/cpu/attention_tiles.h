// Attention on the processor's tile unit (Intel AMX): bfloat16 pages, keys transposed within their blocks, 16 queries at
// once. Float queries and weights are split into bfloat16 parts whose products the unit sums in float32: queries into
// three, which hold all their bits, weights into two, which hold 17. As on vectors, a query's sums are in an order that
// depends on that query alone: by keys in order, 32 at a time, whatever its tile begins with.
#pragma once

#include <vector>

#include "attention_shape.h"
#include "bfloat16_parts.h"

namespace polyhead {

#if defined(POLYHEAD_BFLOAT16_TILES)

constexpr int64_t QUERY_PARTS = 3, WEIGHT_PARTS = 2;
constexpr int64_t SETS = 3;  // of 16 keys, scored together

inline bool attends_on_unit(const LayerPages& pages, const AttentionShape& s) {
  return s.transposed_keys && pages.keys.scalar_type() == at::kBFloat16 && s.width % PAIR_DEPTH == 0 &&
         s.block % TILE_ROWS == 0 && tiles_are_allowed();
}

struct TileScratch {
  Buffer<float> scores, totals;                     // [rows, length], [rows]
  Buffer<BFloat16> queries, keys, weights, values;  // as the tiles read them

  void reserve(int64_t width, int64_t rows, int64_t length) {
    grow(scores, rows * length), grow(totals, rows);
    grow(queries, rows * QUERY_PARTS * width), grow(keys, SETS * TILE_ROWS * width);
    grow(weights, WEIGHT_PARTS * rows * length), grow(values, length * width);
  }
};

// As softmax_weights(), the weights as WEIGHT_PARTS bfloat16 rows, `plane` apart.
inline float softmax_split(float* x, int64_t size, const AttentionShape& s, BFloat16* to, int64_t plane) {
  static_assert(WEIGHT_PARTS == 2);
  return softmax(x, size, s, [&](int64_t i, __mmask32 seen, Floats low, Floats high) {
    const __m512i first = to_bfloat16(low, high);
    _mm512_mask_storeu_epi16(to + i, seen, first);
    _mm512_mask_storeu_epi16(to + plane + i, seen,
                             to_bfloat16(_mm512_sub_ps(low, low_floats(first)), _mm512_sub_ps(high, high_floats(first))));
  });
}

// Two rows of 32 as 32 pairs.
inline void interleave(__m512i first, __m512i second, BFloat16* to) {
  alignas(64) static constexpr uint16_t PAIRS[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(PAIRS), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(first, low, second));
  _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(first, high, second));
}

// The pages that are read after those at hand, asked for a few lines at a time between other work: where many are asked for
// at once the processor stops until most of them are there, and work and memory take turns.
template <typename Ahead>
class PageStream {
 public:
  // Pages ahead(first) to ahead(last - 1), of `bytes`.
  PageStream(const Ahead& ahead, int64_t first, int64_t last, int64_t bytes)
      : ahead_(ahead), page_(first), last_(last), bytes_(bytes) {}

  // Fewer than a page's, which they divide.
  void ask(int64_t lines) {
    if (next_ >= end_) {
      if (page_ == last_) return;
      next_ = reinterpret_cast<const char*>(ahead_(page_++));
      end_ = next_ + bytes_;
    }
    for (; lines > 0; --lines, next_ += LINE) __builtin_prefetch(next_, 0, 2);
  }

 private:
  const Ahead& ahead_;
  int64_t page_;
  const int64_t last_, bytes_;
  const char *next_ = nullptr, *end_ = nullptr;
};

// 16 keys of a transposed block -> [width / 2, 16 keys, 2]. Asks meanwhile for half as many lines; scoring asks for the others.
template <typename Stream>
inline void pack_keys(const BFloat16* keys, const AttentionShape& s, Stream& stream, BFloat16* to) {
  alignas(64) static constexpr uint16_t PAIRS[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pairs = _mm512_load_si512(PAIRS);
  for (int64_t begin = 0; begin < s.width; begin += 16) {
    stream.ask(4);
#pragma GCC unroll 8
    for (int64_t d = begin; d < begin + 16; d += 2) {
      const BFloat16* row = keys + d * s.block;
      const __m256i even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
      const __m256i odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + s.block));
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
      _mm512_storeu_si512(to + d * TILE_ROWS, _mm512_permutexvar_epi16(pairs, both));
    }
  }
}

// 16 values [16, width] -> [8, width, 2]; those outside [begin, end) may hold anything, a NaN too, and become zeros.
// Asks meanwhile for half as many lines; weighing asks for the others.
template <typename Stream>
inline void pack_values(const BFloat16* values, int64_t width, int64_t begin, int64_t end, Stream& stream, BFloat16* to) {
  for (int64_t j = 0; j < TILE_ROWS; j += 2, to += 2 * width) {
    if (j % 4 == 0) stream.ask(width / 16);
    const __mmask32 first = begin <= j && j < end ? ~0u : 0u, second = begin <= j + 1 && j + 1 < end ? ~0u : 0u;
    const BFloat16* row = values + j * width;
    for (int64_t d = 0; d < width; d += PAIR_DEPTH)
      interleave(_mm512_maskz_loadu_epi16(first, row + d), _mm512_maskz_loadu_epi16(second, row + width + d), to + 2 * d);
  }
}

// scores [rows of a tile, 16 keys], rows `stride` apart, for each of `BLOCKS` sets of keys, which lie one behind the other;
// queries are [rows, QUERY_PARTS, width]. Several sets at once: the unit takes long for one product, and less for many.
// Calls between() for every set and 32 d.
template <int BLOCKS, typename Between>
inline void score_keys(const BFloat16* queries, const BFloat16* keys, int64_t width, float* scores, int64_t stride,
                       const Between& between) {
  const int64_t query_bytes = QUERY_PARTS * width * sizeof(BFloat16), block = TILE_ROWS * width;
  asm volatile("" ::: "memory");
  _tile_zero(0);
  if constexpr (BLOCKS > 1) _tile_zero(1);
  if constexpr (BLOCKS > 2) _tile_zero(2);
  for (int64_t d = 0; d < width; d += PAIR_DEPTH, keys += PAIR_DEPTH * TILE_ROWS) {
    _tile_loadd(6, queries + d, query_bytes);
    _tile_loadd(7, queries + width + d, query_bytes);
    _tile_loadd(3, queries + 2 * width + d, query_bytes);
    between();
    _tile_loadd(4, keys, 64);
    _tile_dpbf16ps(0, 6, 4);
    _tile_dpbf16ps(0, 7, 4);
    _tile_dpbf16ps(0, 3, 4);
    if constexpr (BLOCKS > 1) {
      between();
      _tile_loadd(5, keys + block, 64);
      _tile_dpbf16ps(1, 6, 5);
      _tile_dpbf16ps(1, 7, 5);
      _tile_dpbf16ps(1, 3, 5);
    }
    if constexpr (BLOCKS > 2) {
      between();
      _tile_loadd(4, keys + 2 * block, 64);
      _tile_dpbf16ps(2, 6, 4);
      _tile_dpbf16ps(2, 7, 4);
      _tile_dpbf16ps(2, 3, 4);
    }
  }
  _tile_stored(0, scores, stride * sizeof(float));
  if constexpr (BLOCKS > 1) _tile_stored(1, scores + TILE_ROWS, stride * sizeof(float));
  if constexpr (BLOCKS > 2) _tile_stored(2, scores + 2 * TILE_ROWS, stride * sizeof(float));
}

// out [rows of a tile, 16 VECTORS] = weights [WEIGHT_PARTS planes of [rows, length]] times packed values
// [length / 2, width, 2], of which before(j) packs those of the keys from j on. Calls between() VECTORS times after that.
template <int VECTORS, typename Before, typename Between>
inline void weigh_on_unit(const BFloat16* weights, int64_t plane, int64_t length, const BFloat16* values, int64_t width,
                          float* out, const Before& before, const Between& between) {
  const int64_t weight_bytes = length * sizeof(BFloat16), value_bytes = 2 * width * sizeof(BFloat16);
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (VECTORS == 4) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t j = 0; j < length; j += PAIR_DEPTH, values += PAIR_DEPTH * width) {
    before(j);
    asm volatile("" ::: "memory");
    _tile_loadd(6, weights + j, weight_bytes);
    _tile_loadd(7, weights + plane + j, weight_bytes);
    between();
    _tile_loadd(4, values, value_bytes);
    _tile_dpbf16ps(0, 6, 4);
    between();
    _tile_loadd(5, values + 32, value_bytes);
    _tile_dpbf16ps(1, 6, 5);
    _tile_dpbf16ps(0, 7, 4);
    _tile_dpbf16ps(1, 7, 5);
    if constexpr (VECTORS == 4) {
      between();
      _tile_loadd(4, values + 64, value_bytes);
      _tile_dpbf16ps(2, 6, 4);
      between();
      _tile_loadd(5, values + 96, value_bytes);
      _tile_dpbf16ps(3, 6, 5);
      _tile_dpbf16ps(2, 7, 4);
      _tile_dpbf16ps(3, 7, 5);
    }
  }
  _tile_stored(0, out, 16 * VECTORS * sizeof(float));
  _tile_stored(1, out + 16, 16 * VECTORS * sizeof(float));
  if constexpr (VECTORS == 4) {
    _tile_stored(2, out + 32, 16 * VECTORS * sizeof(float));
    _tile_stored(3, out + 48, 16 * VECTORS * sizeof(float));
  }
}

// The rows of the tiles that attend_on_unit wants.
inline int64_t tile_rows(const AttentionItem& item) { return std::min(item.num_queries(), TILE_ROWS); }

// As attend_on_vectors(), with a TileUnit of tile_rows(item).
template <typename Ahead>
void attend_on_unit(const AttentionItem& item, const BFloat16* keys, const BFloat16* values, TileScratch& scratch,
                    const Ahead& ahead, float* out) {
  const AttentionShape& s = item.s;
  const int64_t num_queries = item.num_queries(), rows = round_up(num_queries, TILE_ROWS);
  // Keys are weighed PAIR_DEPTH at a time, from a multiple of it on whatever the first block is: what a query sums does not
  // depend on what else is in its tile.
  const int64_t first = item.first_block * s.block / PAIR_DEPTH * PAIR_DEPTH, lead = item.first_block * s.block - first;
  const int64_t end_used = lead + item.num_blocks * s.block, length = round_up(end_used, PAIR_DEPTH), plane = rows * length;
  scratch.reserve(s.width, rows, length);
  float* scores = scratch.scores.data();
  BFloat16 *queries = scratch.queries.data(), *weights = scratch.weights.data(), *packed = scratch.values.data();
  PageStream stream(ahead, PAGES_AHEAD, 2 * item.num_blocks + PAGES_AHEAD, s.page() * sizeof(BFloat16));

  for (int64_t i = 0; i < num_queries; ++i)
    for (int64_t d = 0; d < s.width; d += PAIR_DEPTH)
      split<QUERY_PARTS>(load(item.query(i) + d), load(item.query(i) + d + WIDTH), queries + i * QUERY_PARTS * s.width + d,
                         s.width);
  const int64_t per_block = s.block / TILE_ROWS, num_sets = item.num_blocks * per_block;
  for (int64_t set = 0; set < num_sets; set += SETS) {
    const int64_t count = std::min(SETS, num_sets - set);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t n = (set + k) / per_block, j = (set + k) % per_block * TILE_ROWS;
      pack_keys(item.page(keys, n) + j, s, stream, scratch.keys.data() + k * TILE_ROWS * s.width);
    }
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      const BFloat16* tile_queries = queries + r * QUERY_PARTS * s.width;
      float* to = scores + r * length + lead + set * TILE_ROWS;
      const auto ask = [&] {
        if (r == 0) stream.ask(8);  // half of 16 keys' in 32 d
      };
      if (count == 3) score_keys<3>(tile_queries, scratch.keys.data(), s.width, to, length, ask);
      else if (count == 2) score_keys<2>(tile_queries, scratch.keys.data(), s.width, to, length, ask);
      else score_keys<1>(tile_queries, scratch.keys.data(), s.width, to, length, ask);
    }
  }
  for (int64_t i = 0; i < num_queries; ++i) {
    const int64_t begin = item.begin(i / s.group()) - first, end = item.end(i / s.group()) - first;
    BFloat16* to = weights + i * length;
    for (int64_t part = 0; part < WEIGHT_PARTS; ++part) {
      std::fill(to + part * plane, to + part * plane + begin, BFloat16(0.0f));
      std::fill(to + part * plane + end, to + part * plane + length, BFloat16(0.0f));
    }
    scratch.totals[i] = softmax_split(scores + i * length + begin, end - begin, s, to + begin, plane);
  }
  const auto pack = [&](int64_t begin) {
    for (int64_t key = begin; key < begin + PAIR_DEPTH; key += TILE_ROWS) {
      BFloat16* to = packed + key * s.width;
      const int64_t place = key - lead, n = place / s.block;
      if (place < 0 || key >= end_used) std::fill_n(to, TILE_ROWS * s.width, BFloat16(0.0f));
      else pack_values(item.page(values, n) + place % s.block * s.width, s.width, item.first_key - first - key,
                       item.end_key - first - key, stream, to);
    }
  };
  alignas(64) float sums[TILE_ROWS * 64];
  for (int64_t r = 0; r < rows; r += TILE_ROWS)
    for (int64_t d = 0; d < s.width;) {
      const int64_t step = s.width - d >= 64 ? 64 : 32;
      const bool is_first = r == 0 && d == 0;
      const auto pack_first = [&](int64_t j) {
        if (is_first) pack(j);
      };
      const auto ask = [&] {
        if (is_first) stream.ask(s.width * 8 / step);  // half of 32 values', in step / 16 times
      };
      if (step == 64) weigh_on_unit<4>(weights + r * length, plane, length, packed + 2 * d, s.width, sums, pack_first, ask);
      else weigh_on_unit<2>(weights + r * length, plane, length, packed + 2 * d, s.width, sums, pack_first, ask);
      for (int64_t i = r; i < std::min(r + TILE_ROWS, num_queries); ++i) {
        float* to = item.result(out, i) + d;
        const Floats inverse = splat(1.0f / scratch.totals[i]);
        for (int64_t o = 0; o < step; o += WIDTH) store(to + o, _mm512_mul_ps(load(sums + (i - r) * step + o), inverse));
      }
      d += step;
    }
}

#else

struct TileScratch {};
inline bool attends_on_unit(const LayerPages&, const AttentionShape&) { return false; }

#endif

}  // namespace polyhead
