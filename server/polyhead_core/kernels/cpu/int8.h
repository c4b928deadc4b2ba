// Int8 linear layers: weights packed into panels, rows quantised one by one, exact integer sums, one float epilogue.
#pragma once

#include <vector>

#include "team.h"
#include "vector.h"

namespace polyhead {

// acc[o] += sum over four neighbouring k of w[o][k] x[k], for WIDTH outputs.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)

// Weights are kept with 128 added, because the instruction wants one unsigned factor; 128 sum(x) is taken off again.
constexpr bool BIASED_WEIGHTS = true, KEEPS_MAGNITUDES = false;
constexpr int64_t LANES32 = 16, MAX_ROWS = 8;
using Ints = __m512i;
inline Ints splat_int(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints load_weights(const int8_t* w) { return _mm512_loadu_si512(w); }
inline void store_ints(int32_t* to, Ints x) { _mm512_storeu_si512(to, x); }
struct Four {
  Ints values;
  Four(const int8_t* x, const uint8_t*) : values(_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(x))) {}
  Ints add_product(Ints acc, Ints w) const { return _mm512_dpbusd_epi32(acc, w, values); }
};
inline void scale_add(float* to, Ints x, float scale) {
  _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_mul_ps(_mm512_cvtepi32_ps(x), _mm512_set1_ps(scale))));
}

#elif defined(__AVX2__)

// |x| unsigned times sign(x) w: a pair of products is at most 2 * 127 * 127 and fits 16 bits.
constexpr bool BIASED_WEIGHTS = false, KEEPS_MAGNITUDES = true;
constexpr int64_t LANES32 = 8, MAX_ROWS = 4;
using Ints = __m256i;
inline Ints splat_int(int32_t x) { return _mm256_set1_epi32(x); }
inline Ints load_weights(const int8_t* w) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)); }
inline void store_ints(int32_t* to, Ints x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }
struct Four {
  Ints values, magnitudes;
  Four(const int8_t* x, const uint8_t* magnitude)
      : values(_mm256_set1_epi32(*reinterpret_cast<const int32_t*>(x))),
        magnitudes(_mm256_set1_epi32(*reinterpret_cast<const int32_t*>(magnitude))) {}
  Ints add_product(Ints acc, Ints w) const {
    const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(w, values));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};
inline void scale_add(float* to, Ints x, float scale) {
  _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), _mm256_mul_ps(_mm256_cvtepi32_ps(x), _mm256_set1_ps(scale))));
}

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
  Four(const int8_t* values, const uint8_t*) : x(values) {}
  Ints add_product(Ints acc, Ints weights) const {
    Bytes w;
    std::memcpy(&w, &weights, sizeof(w));
    for (int64_t o = 0; o < LANES32; ++o)
      for (int64_t k = 0; k < 4; ++k) acc[o] += int32_t{w[4 * o + k]} * int32_t{x[k]};
    return acc;
  }
};
inline void scale_add(float* to, Ints x, float scale) {
  for (int64_t o = 0; o < LANES32; ++o) to[o] += static_cast<float>(x[o]) * scale;
}

#endif

constexpr int64_t VECTORS = 2;                    // vectors of outputs in a panel
constexpr int64_t PANEL = VECTORS * LANES32;      // outputs in a panel
constexpr int64_t QUAD = 4;                       // inputs that one product instruction joins

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// A frozen linear layer; several that read the same input may be one (their outputs side by side).
struct PackedLinear : torch::CustomClassHolder {
  int64_t in, out, outliers;  // inputs, outputs, static outlier columns
  int64_t depth, tail;        // inputs and outlier columns, each rounded up to QUAD
  at::Tensor panels;          // int8 [num_panels, depth + tail, PANEL], in quads: [.., QUAD k of output 0, of output 1, ..]
  at::Tensor scale;           // float [num_panels * PANEL]: absmax / 127
  at::Tensor bias;            // float [num_panels * PANEL]
  at::Tensor smooth;          // float [in], or empty: none
  at::Tensor columns;         // int64 [outliers]

  PackedLinear(const at::Tensor& weight, const at::Tensor& absmax, const std::optional<at::Tensor>& input_scale,
               const std::optional<at::Tensor>& outlier_columns, const std::optional<at::Tensor>& bias_) {
    TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == at::kChar && weight.is_contiguous(),
                "a packed weight is made from a contiguous int8 [out, in], got ", weight.sizes(), " of ",
                weight.scalar_type());
    out = weight.size(0), in = weight.size(1);
    columns = outlier_columns ? outlier_columns->to(at::kLong).contiguous() : at::empty({0}, at::kLong);
    outliers = columns.numel();
    for (int64_t k = 0; k < outliers; ++k) {
      const int64_t column = columns.const_data_ptr<int64_t>()[k];
      TORCH_CHECK(0 <= column && column < in, "outlier column ", column, " of ", in, " inputs");
    }
    depth = round_up(in, QUAD), tail = round_up(outliers, QUAD);
    TORCH_CHECK(absmax.numel() == out && (!input_scale || input_scale->numel() == in) && (!bias_ || bias_->numel() == out),
                "absmax and bias must have ", out, " elements, input_scale ", in);
    smooth = input_scale ? input_scale->to(at::kFloat).contiguous() : at::empty({0});
    const int64_t padded = num_panels() * PANEL;
    scale = at::zeros({padded}), bias = at::zeros({padded});
    scale.narrow(0, 0, out).copy_(absmax / 127.0);
    if (bias_) bias.narrow(0, 0, out).copy_(*bias_);
    panels = at::empty({num_panels(), depth + tail, PANEL}, at::kChar);
    pack(weight.const_data_ptr<int8_t>());
  }

  int64_t num_panels() const { return (out + PANEL - 1) / PANEL; }
  int64_t row_bytes() const { return depth + 2 * tail; }
  const int8_t* panel(int64_t index) const {
    return panels.const_data_ptr<int8_t>() + index * (depth + tail) * PANEL;
  }
  int64_t num_bytes() const {
    return panels.nbytes() + scale.nbytes() + bias.nbytes() + smooth.nbytes() + columns.nbytes();
  }

 private:
  void pack(const int8_t* weight) {
    const int64_t* column = columns.const_data_ptr<int64_t>();
    int8_t* to = panels.data_ptr<int8_t>();
    at::parallel_for(0, num_panels(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        for (int64_t k = 0; k < depth + tail; ++k) {
          const bool is_tail = k >= depth;
          const int64_t index = is_tail ? k - depth : k;
          const bool exists = index < (is_tail ? outliers : in);
          const int64_t source = exists && is_tail ? column[index] : index;
          for (int64_t o = 0; o < PANEL; ++o) {
            const int64_t row = p * PANEL + o;
            const int8_t value = exists && row < out ? weight[row * in + source] : int8_t{0};
            to[(p * (depth + tail) + k / QUAD * QUAD) * PANEL + o * QUAD + k % QUAD] =
                BIASED_WEIGHTS ? static_cast<int8_t>(static_cast<uint8_t>(value) ^ 0x80) : value;
          }
        }
    });
  }
};

// Quantised rows as the products read them: [main | high | low] of x / smooth, with scales and sums of each part.
struct QuantizedRows {
  int64_t stride = 0;
  std::vector<int8_t> values;
  std::vector<uint8_t> magnitudes;
  std::vector<float> scales;  // three a row
  std::vector<int32_t> sums;  // three a row

  void resize(int64_t rows, int64_t row_bytes) {
    stride = row_bytes;
    const auto grow = [](auto& vector, int64_t size) {
      if (static_cast<int64_t>(vector.size()) < size) vector.resize(size);
    };
    grow(values, rows * stride);
    if (KEEPS_MAGNITUDES) grow(magnitudes, rows * stride);
    grow(scales, 3 * rows);
    grow(sums, 3 * rows);
  }
};

// q = round(x / scale) with scale = max|x| / 127, filled up with zeros to `padded`; returns scale.
inline float quantize_part(const float* x, int64_t size, int64_t padded, int8_t* q, uint8_t* magnitudes, int32_t* total) {
  const float scale = std::max(largest_magnitude(x, size) / 127.0f, 1e-12f);
  for (int64_t i = 0; i < size; ++i) q[i] = static_cast<int8_t>(static_cast<int32_t>(std::nearbyintf(x[i] / scale)));
  for (int64_t i = size; i < padded; ++i) q[i] = 0;
  if (KEEPS_MAGNITUDES)
    for (int64_t i = 0; i < padded; ++i) magnitudes[i] = static_cast<uint8_t>(q[i] < 0 ? -q[i] : q[i]);
  if (BIASED_WEIGHTS) {
    int32_t sum = 0;
    for (int64_t i = 0; i < padded; ++i) sum += q[i];
    *total = sum;
  }
  return scale;
}

// Quantises row `r`; `row` [in] is scratch that is changed.
inline void quantize(const PackedLinear& linear, const float* x, float* row, QuantizedRows& to, int64_t r) {
  const int64_t outliers = linear.outliers;
  if (linear.smooth.numel()) {
    const float* smooth = linear.smooth.const_data_ptr<float>();
    for (int64_t i = 0; i < linear.in; ++i) row[i] = x[i] / smooth[i];
  } else if (row != x) {
    std::copy(x, x + linear.in, row);
  }
  int8_t* q = to.values.data() + r * to.stride;
  uint8_t* m = KEEPS_MAGNITUDES ? to.magnitudes.data() + r * to.stride : nullptr;
  const auto after = [&](int64_t offset) { return KEEPS_MAGNITUDES ? m + offset : nullptr; };
  float* scales = to.scales.data() + 3 * r;
  int32_t* sums = to.sums.data() + 3 * r;
  if (outliers) {
    const int64_t* column = linear.columns.const_data_ptr<int64_t>();
    const int64_t high = linear.depth, low = linear.depth + linear.tail;
    std::vector<float> large(outliers);
    for (int64_t k = 0; k < outliers; ++k) {
      large[k] = row[column[k]];
      row[column[k]] = 0;
    }
    scales[1] = quantize_part(large.data(), outliers, linear.tail, q + high, after(high), sums + 1);
    for (int64_t k = 0; k < outliers; ++k) large[k] = large[k] - static_cast<float>(q[high + k]) * scales[1];
    scales[2] = quantize_part(large.data(), outliers, linear.tail, q + low, after(low), sums + 2);
  }
  scales[0] = quantize_part(row, linear.in, linear.depth, q, m, sums);
}

template <int ROWS>
inline void multiply(const int8_t* w, const int8_t* x, const uint8_t* magnitudes, int64_t stride, int64_t depth,
                     const int32_t* sums, float (*y)[PANEL], const float* scales) {
  Ints acc[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) acc[r][v] = splat_int(BIASED_WEIGHTS ? -128 * sums[3 * r] : 0);
  for (int64_t k = 0; k < depth; k += QUAD) {
    const Ints w0 = load_weights(w + k * PANEL), w1 = load_weights(w + k * PANEL + LANES32 * QUAD);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const Four four(x + r * stride + k, KEEPS_MAGNITUDES ? magnitudes + r * stride + k : nullptr);
      acc[r][0] = four.add_product(acc[r][0], w0);
      acc[r][1] = four.add_product(acc[r][1], w1);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) scale_add(y[r] + v * LANES32, acc[r][v], scales[3 * r]);
}

// `ROWS` rows from r on, times one panel: y[r, o] (+)= (s0 sum0 + s1 sum1 + s2 sum2) scale[o] + bias[o].
template <int ROWS>
void tile(const PackedLinear& linear, const QuantizedRows& x, int64_t r, int64_t panel, float* y, int64_t y_stride,
          bool accumulate) {
  float sums[ROWS][PANEL] = {};
  const int8_t* w = linear.panel(panel);
  const int8_t* q = x.values.data() + r * x.stride;
  const uint8_t* m = KEEPS_MAGNITUDES ? x.magnitudes.data() + r * x.stride : nullptr;
  const auto part = [&](int index, int64_t offset, int64_t depth, const int8_t* weights) {
    multiply<ROWS>(weights, q + offset, KEEPS_MAGNITUDES ? m + offset : nullptr, x.stride, depth,
                   x.sums.data() + 3 * r + index, sums, x.scales.data() + 3 * r + index);
  };
  part(0, 0, linear.depth, w);
  if (linear.tail) {
    part(1, linear.depth, linear.tail, w + linear.depth * PANEL);
    part(2, linear.depth + linear.tail, linear.tail, w + linear.depth * PANEL);
  }
  const float* scale = linear.scale.const_data_ptr<float>() + panel * PANEL;
  const float* bias = linear.bias.const_data_ptr<float>() + panel * PANEL;
  const int64_t width = std::min(PANEL, linear.out - panel * PANEL);
  for (int row = 0; row < ROWS; ++row) {
    float* to = y + (r + row) * y_stride + panel * PANEL;
    for (int64_t o = 0; o < PANEL; ++o) sums[row][o] = sums[row][o] * scale[o] + bias[o];
    if (accumulate)
      for (int64_t o = 0; o < width; ++o) to[o] += sums[row][o];
    else
      for (int64_t o = 0; o < width; ++o) to[o] = sums[row][o];
  }
}

template <int ROWS>
void rest_of_rows(const PackedLinear& linear, const QuantizedRows& x, int64_t r, int64_t count, int64_t panel, float* y,
                  int64_t y_stride, bool accumulate) {
  if constexpr (ROWS > 0) {
    if (count == ROWS) tile<ROWS>(linear, x, r, panel, y, y_stride, accumulate);
    else rest_of_rows<ROWS - 1>(linear, x, r, count, panel, y, y_stride, accumulate);
  }
}

// Outputs of the panels [first, last) for all rows; y is [rows, y_stride].
inline void multiply_panels(const PackedLinear& linear, const QuantizedRows& x, int64_t rows, int64_t first, int64_t last,
                            float* y, int64_t y_stride, bool accumulate) {
  constexpr int64_t CACHE_BYTES = 192 << 10;  // quantised rows that stay in the second-level cache over the panels
  const int64_t bytes = x.stride * (KEEPS_MAGNITUDES ? 2 : 1);
  const int64_t block = std::max<int64_t>(MAX_ROWS, CACHE_BYTES / bytes / MAX_ROWS * MAX_ROWS);
  for (int64_t begin = 0; begin < rows; begin += block) {
    const int64_t end = std::min(rows, begin + block);
    for (int64_t panel = first; panel < last; ++panel) {
      int64_t r = begin;
      for (; r + MAX_ROWS <= end; r += MAX_ROWS) tile<MAX_ROWS>(linear, x, r, panel, y, y_stride, accumulate);
      rest_of_rows<MAX_ROWS - 1>(linear, x, r, end - r, panel, y, y_stride, accumulate);
    }
  }
}

// x [rows, in] -> y [rows, out].
inline void linear_forward(const PackedLinear& linear, const float* x, int64_t rows, float* y) {
  QuantizedRows quantized;
  quantized.resize(rows, linear.row_bytes());
  const bool alone = rows * linear.in * linear.out < (1 << 18);
  with_team(alone, [&](const Member& member) {
    std::vector<float> scratch(linear.in);
    const auto [begin, end] = member.share(rows);
    for (int64_t r = begin; r < end; ++r) quantize(linear, x + r * linear.in, scratch.data(), quantized, r);
    member.wait();
    const auto [first, last] = member.share(linear.num_panels());
    multiply_panels(linear, quantized, rows, first, last, y, linear.out, false);
  });
}

}  // namespace polyhead
