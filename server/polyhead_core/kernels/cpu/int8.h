// Int8 linear layers: weights packed into panels, rows quantised one by one, exact integer sums, one float epilogue.
#pragma once

#include <vector>

#include "memory.h"
#include "team.h"
#include "tiles.h"
#include "vector.h"

namespace polyhead {

// acc[o] += sum over four neighbouring k of w[o][k] x[k], for WIDTH outputs.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)

#define POLYHEAD_VNNI
// Weights are kept with 128 added, because the instruction wants one unsigned factor; 128 sum(x) is taken off again.
constexpr bool BIASED_WEIGHTS = true, KEEPS_MAGNITUDES = false;
constexpr int64_t LANES32 = 16, MAX_ROWS = 8;
using Ints = __m512i;
inline Ints splat_int(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints load_weights(const int8_t* w) { return _mm512_loadu_si512(w); }
inline void store_ints(int32_t* to, Ints x) { _mm512_storeu_si512(to, x); }
struct Four {
  Ints values;
  explicit Four(const int8_t* x) : values(_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(x))) {}
  Ints add_product(Ints acc, Ints w) const {
    // By the intrinsic gcc 12 moves every sum to another register at each product, and some of them to memory.
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(values));
    return acc;
  }
};

#elif defined(__AVX2__)
#define POLYHEAD_AVX2

// |x| unsigned times sign(x) w: a pair of products is at most 2 * 127 * 127 and fits 16 bits.
constexpr bool BIASED_WEIGHTS = false, KEEPS_MAGNITUDES = true;
constexpr int64_t LANES32 = 8, MAX_ROWS = 4;
using Ints = __m256i;
inline Ints splat_int(int32_t x) { return _mm256_set1_epi32(x); }
inline Ints load_weights(const int8_t* w) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)); }
inline void store_ints(int32_t* to, Ints x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }
struct Four {
  Ints values, magnitudes;
  explicit Four(const int8_t* x)
      : values(_mm256_set1_epi32(reinterpret_cast<const int32_t*>(x)[0])),
        magnitudes(_mm256_set1_epi32(reinterpret_cast<const int32_t*>(x)[1])) {}
  Ints add_product(Ints acc, Ints w) const {
    const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(w, values));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

#else

constexpr bool BIASED_WEIGHTS = false, KEEPS_MAGNITUDES = false;
constexpr int64_t LANES32 = 4, MAX_ROWS = 4;
typedef int32_t Ints __attribute__((vector_size(16)));
typedef int8_t Bytes __attribute__((vector_size(16)));
inline Ints splat_int(int32_t x) { return Ints{x, x, x, x}; }
inline Ints load_weights(const int8_t* w) {
  Ints x;
  std::memcpy(&x, w, sizeof(x));
  return x;
}
inline void store_ints(int32_t* to, Ints x) { std::memcpy(to, &x, sizeof(x)); }
struct Four {
  const int8_t* x;
  explicit Four(const int8_t* values) : x(values) {}
  Ints add_product(Ints acc, Ints weights) const {
    Bytes w;
    std::memcpy(&w, &weights, sizeof(w));
    for (int64_t o = 0; o < LANES32; ++o)
      for (int64_t k = 0; k < 4; ++k) acc[o] += int32_t{w[4 * o + k]} * int32_t{x[k]};
    return acc;
  }
};

#endif

constexpr int64_t VECTORS = 2;                    // vectors of outputs in a panel
constexpr int64_t PANEL = VECTORS * LANES32;      // outputs in a panel
constexpr int64_t QUAD = 4;                       // inputs that one product instruction joins
constexpr int64_t QUAD_BYTES = KEEPS_MAGNITUDES ? 2 * QUAD : QUAD;  // of a quantised row: values, then magnitudes
constexpr int64_t PART = HAS_TILES ? TILE_DEPTH : QUAD;             // each part of a quantised row ends in zeros up to it
static_assert(!HAS_TILES || (BIASED_WEIGHTS && PANEL == 32), "tiles.h reads such panels");

// A frozen linear layer; several that read the same input may be one (their outputs side by side).
struct PackedLinear : torch::CustomClassHolder {
  int64_t in, out, outliers;  // inputs, outputs, static outlier columns
  int64_t depth, tail;        // other inputs and outlier columns, each rounded up to QUAD
  at::Tensor panels;          // int8 num_panels x [depth + tail, PANEL], in quads: [.., QUAD k of output 0, of output 1, ..]
  at::Tensor scale;           // float [num_panels * PANEL]: absmax / 127
  at::Tensor bias;            // float [num_panels * PANEL]
  at::Tensor smooth;          // float [in], or empty: none
  at::Tensor inverse_smooth;  // 1 / smooth
  at::Tensor columns;         // int32 [outliers], ascending
  std::vector<int32_t> order;  // [depth + tail]: the input at each place of a panel; -1: none
  std::vector<uint16_t> kept;  // of each 16 inputs, those that are no outlier columns
  at::Tensor column_smooth = at::empty({0}), column_inverse_smooth = column_smooth;  // of them, as of all inputs
  bool lasting;
  ReusedResult results;

  // `lasting`: kept for long, so worth huge pages that it shares with others of its kind, and memory for its results.
  PackedLinear(const at::Tensor& weight, const at::Tensor& absmax, const std::optional<at::Tensor>& input_scale,
               const std::optional<at::Tensor>& outlier_columns, const std::optional<at::Tensor>& bias_, bool lasting_)
      : lasting(lasting_) {
    TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == at::kChar && weight.is_contiguous(),
                "a packed weight is made from a contiguous int8 [out, in], got ", weight.sizes(), " of ",
                weight.scalar_type());
    out = weight.size(0), in = weight.size(1);
    TORCH_CHECK(!out || !in || weight.min().item<int>() >= -127,
                "weights must lie in -127..127, where absmax quantisation puts them");
    const at::Tensor given =
        outlier_columns ? std::get<0>(outlier_columns->to(at::kLong).sort()).contiguous() : at::empty({0}, at::kLong);
    columns = given.to(at::kInt);
    outliers = columns.numel();
    depth = round_up(in - outliers, QUAD), tail = round_up(outliers, QUAD);
    order.assign(depth + tail, -1);
    kept.assign((in + 15) / 16, 0xffff);
    const int64_t* column = given.const_data_ptr<int64_t>();
    for (int64_t k = 0; k < outliers; ++k) {
      TORCH_CHECK(0 <= column[k] && column[k] < in, "outlier column ", column[k], " of ", in, " inputs");
      TORCH_CHECK(k == 0 || column[k] != column[k - 1], "outlier column ", column[k], " is named twice");
      order[depth + k] = static_cast<int32_t>(column[k]);
      kept[column[k] / 16] &= static_cast<uint16_t>(~(1 << column[k] % 16));
    }
    for (int32_t i = 0, place = 0; i < in; ++i)
      if (kept[i / 16] >> i % 16 & 1) order[place++] = i;
    TORCH_CHECK(absmax.numel() == out && (!input_scale || input_scale->numel() == in) && (!bias_ || bias_->numel() == out),
                "absmax and bias must have ", out, " elements, input_scale ", in);
    smooth = input_scale ? input_scale->to(at::kFloat).contiguous() : at::empty({0});
    inverse_smooth = smooth.reciprocal();
    if (input_scale) column_smooth = smooth.index_select(0, columns), column_inverse_smooth = column_smooth.reciprocal();
    const int64_t padded = num_panels() * PANEL;
    scale = at::zeros({padded}), bias = at::zeros({padded});
    scale.narrow(0, 0, out).copy_(absmax / 127.0);
    if (bias_) bias.narrow(0, 0, out).copy_(*bias_);
    // A tile reads to its end, past the last panel's.
    const int64_t bytes = num_panels() * (depth + tail) * PANEL + (PART - QUAD) * PANEL;
    panels = lasting ? empty_on_huge_pages(bytes) : at::empty({bytes}, at::kChar);
    pack(weight.const_data_ptr<int8_t>());
    panel_data_ = panels.const_data_ptr<int8_t>();
    scale_data_ = scale.const_data_ptr<float>(), bias_data_ = bias.const_data_ptr<float>();
  }

  int64_t num_panels() const { return (out + PANEL - 1) / PANEL; }
  // Of a quantised row's parts: where the outlier columns begin, and how long each of their two is.
  int64_t main_bytes() const { return round_up(depth, PART) / QUAD * QUAD_BYTES; }
  int64_t tail_bytes() const { return round_up(tail, PART) / QUAD * QUAD_BYTES; }
  int64_t row_bytes() const { return main_bytes() + 2 * tail_bytes(); }
  int64_t panel_bytes() const { return (depth + tail) * PANEL; }
  // int8 [out, in], as it was packed.
  at::Tensor weight() const {
    at::Tensor unpacked = at::empty({out, in}, at::kChar);
    int8_t* to = unpacked.data_ptr<int8_t>();
    at::parallel_for(0, out, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t k = 0; k < depth + tail; ++k)
          if (order[k] >= 0) to[row * in + order[k]] = flip_bias(panel(row / PANEL)[place(row % PANEL, k)]);
    });
    return unpacked;
  }
  const int8_t* panel(int64_t index) const { return panel_data_ + index * panel_bytes(); }
  const float* scale_of(int64_t panel) const { return scale_data_ + panel * PANEL; }
  const float* bias_of(int64_t panel) const { return bias_data_ + panel * PANEL; }
  int64_t num_bytes() const {
    return panels.nbytes() + scale.nbytes() + bias.nbytes() + 2 * smooth.nbytes() + columns.nbytes() +
           2 * column_smooth.nbytes() + order.size() * sizeof(order[0]) + kept.size() * sizeof(kept[0]);
  }

 private:
  // A tensor gives its data by a call, which a panel would wait for.
  const int8_t* panel_data_;
  const float *scale_data_, *bias_data_;

  // Where output `o`'s `k`-th input lies in its panel.
  static int64_t place(int64_t o, int64_t k) { return k / QUAD * QUAD * PANEL + o * QUAD + k % QUAD; }
  // Adds 128 or takes it off, which is the same.
  static int8_t flip_bias(int8_t value) {
    return BIASED_WEIGHTS ? static_cast<int8_t>(static_cast<uint8_t>(value) ^ 0x80) : value;
  }

  void pack(const int8_t* weight) {
    int8_t* to = panels.data_ptr<int8_t>();
    at::parallel_for(0, num_panels(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        for (int64_t k = 0; k < depth + tail; ++k)
          for (int64_t o = 0; o < PANEL; ++o) {
            const int64_t row = p * PANEL + o;
            const int8_t value = order[k] >= 0 && row < out ? weight[row * in + order[k]] : int8_t{0};
            to[p * panel_bytes() + place(o, k)] = flip_bias(value);
          }
    });
  }
};

// Quantised rows as the products read them: [main | high | low] of x / smooth, with scales and sums of each part.
struct QuantizedRows {
  int64_t stride = 0;
  Buffer<int8_t> quads;
  std::vector<float> scales;  // three a row
  std::vector<int32_t> sums;  // three a row

  void resize(int64_t rows, int64_t row_bytes) {
    stride = row_bytes;
    grow(quads, round_up(rows, TILE_ROWS) * stride);
    grow(scales, 3 * rows);
    grow(sums, 3 * rows);
  }
};

// What one thread needs to quantise rows.
struct QuantizeScratch {
  Buffer<float> row, large;
  Buffer<int8_t> q;

  void resize(int64_t in, int64_t outliers) {
    grow(row, round_up(in, WIDTH) + WIDTH);
    grow(q, in + PART);
    grow(large, round_up(outliers, WIDTH));
  }
};

#if defined(POLYHEAD_VNNI)

// max |x| of vectors, NaN where any is: see largest_magnitude.
struct Magnitude {
  Ints largest = splat_int(0);

  void add(Floats x) { largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(x), splat_int(0x7fffffff))); }
  float value() const { return std::bit_cast<float>(_mm512_reduce_max_epi32(largest)); }
};

// One part of a row as the products read it, zeros up to the next multiple of PART: q = round(x / scale) with
// scale = largest / 127, and the sum of q.
inline void quantize_part(const float* x, int64_t size, float largest, int8_t* to, float& scale, int32_t& sum) {
  scale = std::max(largest / 127.0f, 1e-12f);
  const Floats divisor = splat(scale), inverse = splat(1.0f / scale);
  const int64_t padded = round_up(size, PART);
  Ints sums = splat_int(0);
  for (int64_t i = 0; i < padded; i += WIDTH) {
    const Ints q = _mm512_cvtps_epi32(divide(_mm512_maskz_loadu_ps(lanes(size - i), x + i), divisor, inverse));
    _mm512_mask_cvtepi32_storeu_epi8(to + i, lanes(padded - i), q);
    sums = _mm512_add_epi32(sums, q);
  }
  sum = _mm512_reduce_add_epi32(sums);
}

// Quantises x [in] to row `r`.
inline void quantize(const PackedLinear& linear, const float* x, QuantizeScratch& scratch, QuantizedRows& to, int64_t r) {
  scratch.resize(linear.in, linear.outliers);
  float *row = scratch.row.data(), *large = scratch.large.data();
  int8_t* quads = to.quads.data() + r * to.stride;
  float* scales = to.scales.data() + 3 * r;
  int32_t* sums = to.sums.data() + 3 * r;
  const float *smooth = linear.smooth.const_data_ptr<float>(), *inverse = linear.inverse_smooth.const_data_ptr<float>();
  const bool is_smoothed = linear.smooth.numel();
  const auto smoothed = [&](Floats values, __mmask16 mask, const float* by, const float* by_inverse) {
    return divide(values, _mm512_mask_loadu_ps(splat(1.0f), mask, by), _mm512_maskz_loadu_ps(mask, by_inverse));
  };
  if (linear.outliers) {
    const int32_t* column = linear.columns.const_data_ptr<int32_t>();
    const float* by = linear.column_smooth.const_data_ptr<float>();
    const float* by_inverse = linear.column_inverse_smooth.const_data_ptr<float>();
    int8_t* high = quads + linear.main_bytes();
    Magnitude all, rest;
    for (int64_t k = 0; k < linear.outliers; k += WIDTH) {
      const __mmask16 mask = lanes(linear.outliers - k);
      Floats values = _mm512_mask_i32gather_ps(splat(0.0f), mask, _mm512_maskz_loadu_epi32(mask, column + k), x, sizeof(float));
      if (is_smoothed) values = smoothed(values, mask, by + k, by_inverse + k);
      all.add(values);
      store(large + k, values);
    }
    quantize_part(large, linear.outliers, all.value(), high, scales[1], sums[1]);
    for (int64_t k = 0; k < linear.outliers; k += WIDTH) {
      const __mmask16 mask = lanes(linear.outliers - k);
      const Floats kept = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, high + k)));
      const Floats values = _mm512_sub_ps(load(large + k), times(kept, splat(scales[1])));
      rest.add(_mm512_maskz_mov_ps(mask, values));
      store(large + k, values);
    }
    quantize_part(large, linear.outliers, rest.value(), high + linear.tail_bytes(), scales[2], sums[2]);
  }
  Magnitude magnitude;
  for (int64_t i = 0; i < linear.in; i += WIDTH) {
    const __mmask16 mask = lanes(linear.in - i) & linear.kept[i / WIDTH];
    Floats values = _mm512_maskz_loadu_ps(mask, x + i);
    if (is_smoothed) values = smoothed(values, mask, smooth + i, inverse + i);
    magnitude.add(values);
    store(row, _mm512_maskz_compress_ps(mask, values));
    row += std::popcount(mask);
  }
  quantize_part(scratch.row.data(), linear.in - linear.outliers, magnitude.value(), quads, scales[0], sums[0]);
}

#else

// One part of a row as the products read it, in quads up to the next multiple of PART: q = round(x / scale) with
// scale = max|x| / 127. `q` has room for it.
inline float quantize_part(const float* x, int64_t size, int8_t* q, int8_t* to) {
  const int64_t padded = round_up(size, PART);
  const float scale = std::max(largest_magnitude(x, size) / 127.0f, 1e-12f);
  for (int64_t i = 0; i < size; ++i) q[i] = static_cast<int8_t>(static_cast<int32_t>(std::nearbyintf(x[i] / scale)));
  for (int64_t i = size; i < padded; ++i) q[i] = 0;
  if constexpr (KEEPS_MAGNITUDES) {
    for (int64_t i = 0; i < padded; i += QUAD) {
      int8_t magnitudes[QUAD];
      for (int64_t k = 0; k < QUAD; ++k) magnitudes[k] = static_cast<int8_t>(q[i + k] < 0 ? -q[i + k] : q[i + k]);
      std::memcpy(to + 2 * i, q + i, QUAD);
      std::memcpy(to + 2 * i + QUAD, magnitudes, QUAD);
    }
  } else {
    std::memcpy(to, q, padded);
  }
  return scale;
}

// Quantises x [in] to row `r`.
inline void quantize(const PackedLinear& linear, const float* x, QuantizeScratch& scratch, QuantizedRows& to, int64_t r) {
  scratch.resize(linear.in, linear.outliers);
  float* row = scratch.row.data();
  int8_t* q = scratch.q.data();
  if (linear.smooth.numel()) {
    const float* smooth = linear.smooth.const_data_ptr<float>();
    for (int64_t i = 0; i < linear.in; ++i) row[i] = x[i] / smooth[i];
  } else {
    std::copy(x, x + linear.in, row);
  }
  int8_t* quads = to.quads.data() + r * to.stride;
  float* scales = to.scales.data() + 3 * r;
  if (linear.outliers) {
    const int32_t* column = linear.columns.const_data_ptr<int32_t>();
    float* large = scratch.large.data();
    int8_t* high = quads + linear.main_bytes();
    float* to_row = row + column[0];
    for (int64_t k = 0; k < linear.outliers; ++k) {
      large[k] = row[column[k]];
      const int64_t next = k + 1 < linear.outliers ? column[k + 1] : linear.in;
      to_row = std::copy(row + column[k] + 1, row + next, to_row);
    }
    scales[1] = quantize_part(large, linear.outliers, q, high);
    for (int64_t k = 0; k < linear.outliers; ++k) large[k] = large[k] - static_cast<float>(q[k]) * scales[1];
    scales[2] = quantize_part(large, linear.outliers, q, high + linear.tail_bytes());
  }
  scales[0] = quantize_part(row, linear.in - linear.outliers, q, quads);
}

#endif

// One quad of inputs: adds w (VECTORS vectors of weights) times `ROWS` rows, `stride` apart.
template <int ROWS>
inline void add_quad(const int8_t* w, const int8_t* x, int64_t stride, Ints (&low)[ROWS], Ints (&high)[ROWS]) {
  const Ints w0 = load_weights(w), w1 = load_weights(w + LANES32 * QUAD);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    const Four four(x + r * stride);
    low[r] = four.add_product(low[r], w0);
    high[r] = four.add_product(high[r], w1);
  }
}

#if defined(POLYHEAD_AVX2)
// The same for four rows with every register named: gcc 12 keeps half of the sums in memory, which costs a third.
template <>
inline void add_quad<4>(const int8_t* w, const int8_t* x, int64_t stride, Ints (&low)[4], Ints (&high)[4]) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i w0, w1, values, magnitudes, product;
#define POLYHEAD_ROW(AT, LOW, HIGH)                                                            \
  "vpbroadcastd " AT ", %[values]\n\tvpbroadcastd 4" AT ", %[magnitudes]\n\t"                  \
  "vpsignb %[values], %[w0], %[product]\n\tvpsignb %[values], %[w1], %[values]\n\t"            \
  "vpmaddubsw %[product], %[magnitudes], %[product]\n\t"                                       \
  "vpmaddubsw %[values], %[magnitudes], %[values]\n\t"                                         \
  "vpmaddwd %[ones], %[product], %[product]\n\tvpmaddwd %[ones], %[values], %[values]\n\t"     \
  "vpaddd %[product], " LOW ", " LOW "\n\tvpaddd %[values], " HIGH ", " HIGH "\n\t"
  asm("vmovdqu (%[w]), %[w0]\n\tvmovdqu 32(%[w]), %[w1]\n\t"
      POLYHEAD_ROW("(%[x])", "%[low0]", "%[high0]") POLYHEAD_ROW("(%[x],%[stride])", "%[low1]", "%[high1]")
      POLYHEAD_ROW("(%[x],%[stride],2)", "%[low2]", "%[high2]") POLYHEAD_ROW("(%[x],%[thrice])", "%[low3]", "%[high3]")
      : [low0] "+x"(low[0]), [low1] "+x"(low[1]), [low2] "+x"(low[2]), [low3] "+x"(low[3]), [high0] "+x"(high[0]),
        [high1] "+x"(high[1]), [high2] "+x"(high[2]), [high3] "+x"(high[3]), [w0] "=&x"(w0), [w1] "=&x"(w1),
        [values] "=&x"(values), [magnitudes] "=&x"(magnitudes), [product] "=&x"(product)
      : [w] "r"(w), [x] "r"(x), [stride] "r"(stride), [thrice] "r"(3 * stride), [ones] "x"(ones)
      : "memory");
#undef POLYHEAD_ROW
}
#endif

// Memory that is asked for while other is read: `step` bytes further at each quad.
struct Ahead {
  const int8_t* data;
  int64_t step;
};

// Weights that a thread reads next, line by line, up to what leaves the second-level cache room: for where it would wait.
class NextWeights {
 public:
  NextWeights() = default;
  NextWeights(const int8_t* begin, const int8_t* end) : next_(begin), end_(std::min(end, begin + MOST_BYTES)) {}

  // Asks for one line; whether any was left.
  bool operator()() {
    if (next_ >= end_) return false;
    __builtin_prefetch(next_, 0, 2);
    next_ += LINE;
    return true;
  }

 private:
  static constexpr int64_t MOST_BYTES = 384 << 10;
  const int8_t *next_ = nullptr, *end_ = nullptr;
};

// to = w times `ROWS` rows, as exact integers.
template <int ROWS>
inline void multiply(const int8_t* w, const int8_t* x, int64_t stride, int64_t depth, Ahead& ahead, int32_t (*to)[PANEL]) {
  Ints low[ROWS], high[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) low[r] = high[r] = splat_int(0);
  const int8_t* const end = w + depth * PANEL;
  for (; w != end; w += PANEL * QUAD, x += QUAD_BYTES, ahead.data += ahead.step) {
#pragma GCC unroll 2
    for (int64_t line = 0; line < PANEL * QUAD; line += LINE) __builtin_prefetch(ahead.data + line, 0, 2);
    add_quad<ROWS>(w, x, stride, low, high);
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    store_ints(to[r], low[r]);
    store_ints(to[r] + LANES32, high[r]);
  }
}

// Calls part(index, offset in a quantised row, depth, weights) for the main part and the two of the outlier columns.
template <typename Part>
inline void for_each_part(const PackedLinear& linear, int64_t panel, const Part& part) {
  const int8_t* w = linear.panel(panel);
  part(0, int64_t{0}, linear.depth, w);
  if (linear.tail) {
    part(1, linear.main_bytes(), linear.tail, w + linear.depth * PANEL);
    part(2, linear.main_bytes() + linear.tail_bytes(), linear.tail, w + linear.depth * PANEL);
  }
}

// y[r, o] (+)= (s0 sum0 + s1 sum1 + s2 sum2) scale[o] + bias[o] for `rows` rows from r on: of each part, `products` holds
// the sums of MOST rows. Calls between() before each row.
template <int MOST, typename Between>
inline void put(const PackedLinear& linear, const QuantizedRows& x, const int32_t (*products)[MOST][PANEL], int64_t r,
                int64_t rows, int64_t panel, float* y, int64_t y_stride, bool accumulate, const Between& between) {
  constexpr int64_t FLOATS = PANEL / WIDTH;  // vectors of floats in a panel
  const int64_t width = std::min(PANEL, linear.out - panel * PANEL);
  const int parts = linear.tail ? 3 : 1;
  Floats scale[FLOATS], bias[FLOATS];
  for (int64_t v = 0; v < FLOATS; ++v) {
    scale[v] = load(linear.scale_of(panel) + v * WIDTH);
    bias[v] = load(linear.bias_of(panel) + v * WIDTH);
  }
  const float* scales = x.scales.data() + 3 * r;
  const int32_t* sums = x.sums.data() + 3 * r;
  float* to = y + r * y_stride + panel * PANEL;
  for (int64_t row = 0; row < rows; ++row, scales += 3, sums += 3, to += y_stride) {
    between();
    Floats total[FLOATS];
#pragma GCC unroll 8
    for (int64_t v = 0; v < FLOATS; ++v) {
      const auto sum = [&](int part) {
        return to_floats(products[part][row] + v * WIDTH, BIASED_WEIGHTS ? 128 * sums[part] : 0);
      };
      total[v] = times(sum(0), splat(scales[0]));
      for (int part = 1; part < parts; ++part) total[v] = plus(total[v], times(sum(part), splat(scales[part])));
      total[v] = plus(times(total[v], scale[v]), bias[v]);
    }
#pragma GCC unroll 8
    for (int64_t v = 0; v < FLOATS; ++v) {
      float* at = to + v * WIDTH;
      if (width == PANEL) {  // stores of a part of a vector are slow on Zen
        store(at, accumulate ? plus(load(at), total[v]) : total[v]);
      } else {
        const int64_t count = width - v * WIDTH;
        store_first(at, accumulate ? plus(load_first(at, count), total[v]) : total[v], count);
      }
    }
  }
}

// `ROWS` rows from r on, times one panel.
template <int ROWS>
void tile(const PackedLinear& linear, const QuantizedRows& x, int64_t r, int64_t panel, Ahead ahead, float* y,
          int64_t y_stride, bool accumulate) {
  alignas(LINE) int32_t products[3][ROWS][PANEL];
  for_each_part(linear, panel, [&](int index, int64_t offset, int64_t depth, const int8_t* w) {
    multiply<ROWS>(w, x.quads.data() + r * x.stride + offset, x.stride, depth, ahead, products[index]);
  });
  put(linear, x, products, r, ROWS, panel, y, y_stride, accumulate, [] {});
}

#if defined(POLYHEAD_TILES)
// The same on the tile unit, for the `rows` rows of `TILES` tiles. `next`: what is read after the panel.
template <int TILES>
void tile_on_unit(const PackedLinear& linear, const QuantizedRows& x, int64_t r, int64_t rows, int64_t panel,
                  const int8_t* next, float* y, int64_t y_stride, bool accumulate) {
  alignas(LINE) int32_t products[3][TILES * TILE_ROWS][PANEL];
  // The next panel comes from memory while this one is worked on, evenly: the processor stops where too many lines are
  // asked for at once.
  const int8_t* const end = next + linear.panel_bytes();
  for_each_part(linear, panel, [&](int index, int64_t offset, int64_t depth, const int8_t* w) {
    multiply_tiles<TILES>(w, x.quads.data() + r * x.stride + offset, x.stride, depth, products[index][0], next);
  });
  const int64_t bytes_a_row = (end - next) / rows;  // none are left of a panel of few inputs
  put(linear, x, products, r, rows, panel, y, y_stride, accumulate, [&] {
    for (int64_t byte = 0; byte < bytes_a_row; byte += LINE, next += LINE) __builtin_prefetch(next, 0, 2);
  });
}
#endif

// tile() for `count` rows, at most ROWS.
template <int ROWS>
void tile_of(int64_t count, const PackedLinear& linear, const QuantizedRows& x, int64_t r, int64_t panel, Ahead ahead, float* y,
             int64_t y_stride, bool accumulate) {
  if constexpr (ROWS > 0) {
    if (count >= ROWS) tile<ROWS>(linear, x, r, panel, ahead, y, y_stride, accumulate);
    else tile_of<ROWS - 1>(count, linear, x, r, panel, ahead, y, y_stride, accumulate);
  }
}

#if defined(POLYHEAD_TILES)
// As multiply_panels(): weights that stay in the second-level cache over all rows, rows in the first over these weights.
inline void multiply_panels_on_unit(const PackedLinear& linear, const QuantizedRows& x, int64_t rows, int64_t first,
                                    int64_t last, const int8_t* after, float* y, int64_t y_stride, bool accumulate) {
  constexpr int64_t CACHE_BYTES = 768 << 10;
  const int64_t block = std::max<int64_t>(1, CACHE_BYTES / linear.panel_bytes());
  const TileUnit unit;
  for (int64_t begin = first; begin < last; begin += block)
    for (int64_t r = 0; r < rows; r += 2 * TILE_ROWS)
      for (int64_t panel = begin; panel < std::min(last, begin + block); ++panel) {
        const int8_t* next = panel + 1 < last ? linear.panel(panel + 1) : after;
        if (rows - r > TILE_ROWS)
          tile_on_unit<2>(linear, x, r, std::min(rows - r, 2 * TILE_ROWS), panel, next, y, y_stride, accumulate);
        else
          tile_on_unit<1>(linear, x, r, rows - r, panel, next, y, y_stride, accumulate);
      }
}
#endif

// Outputs of the panels [first, last) for all rows; y is [rows, y_stride]. `after`: the weights that this thread reads next,
// or any.
inline void multiply_panels(const PackedLinear& linear, const QuantizedRows& x, int64_t rows, int64_t first, int64_t last,
                            const int8_t* after, float* y, int64_t y_stride, bool accumulate) {
#if defined(POLYHEAD_TILES)
  if (rows >= MIN_TILE_ROWS && tiles_are_allowed())
    return multiply_panels_on_unit(linear, x, rows, first, last, after, y, y_stride, accumulate);
#endif
  constexpr int64_t CACHE_BYTES = 192 << 10;  // quantised rows that stay in the second-level cache over the panels
  const int64_t block = std::max<int64_t>(MAX_ROWS, CACHE_BYTES / x.stride / MAX_ROWS * MAX_ROWS);
  const int64_t quads = (linear.depth + 2 * linear.tail) / QUAD;
  for (int64_t begin = 0; begin < rows; begin += block) {
    const int64_t end = std::min(rows, begin + block), tiles = (end - begin + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t panel = first; panel < last; ++panel) {
      // The next panel comes from memory meanwhile, evenly.
      const int8_t* next = panel + 1 < last ? linear.panel(panel + 1) : after;
      Ahead ahead{next, linear.panel_bytes() / std::max<int64_t>(1, tiles * quads) + 1};
      for (int64_t r = begin; r < end; r += MAX_ROWS, ahead.data += ahead.step * quads)
        tile_of<MAX_ROWS>(end - r, linear, x, r, panel, ahead, y, y_stride, accumulate);
    }
  }
}

// x [rows, in] -> y [rows, out].
inline void linear_forward(const PackedLinear& linear, const float* x, int64_t rows, float* y) {
  QuantizedRows quantized;
  quantized.resize(rows, linear.row_bytes());
  const bool alone = rows * linear.in * linear.out < (1 << 18);
  with_team(alone, [&](const Member& member) {
    QuantizeScratch scratch;
    const auto [begin, end] = member.share(rows);
    for (int64_t r = begin; r < end; ++r) quantize(linear, x + r * linear.in, scratch, quantized, r);
    member.wait();
    const auto [first, last] = member.share(linear.num_panels());
    multiply_panels(linear, quantized, rows, first, last, linear.panel(last), y, linear.out, false);
  });
}

}  // namespace polyhead
