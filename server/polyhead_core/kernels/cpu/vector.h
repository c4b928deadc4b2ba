// Float vectors and small row functions, in the widest form the processor has. Chosen by the compiler's target, which is
// the machine itself: the library is built where it runs.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace polyhead {

using BFloat16 = at::BFloat16;

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.x) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

constexpr size_t LINE = 64;  // bytes that the caches hold together

// The cache that lines are asked into which are read once: most processors wait for more lines at once by their second (one
// core of a Zen 4 then reads adapters at 17 GB/s, by its first at 11). Zen 5, which alone has SSE4a and AVX-VNNI, is a tenth
// quicker by its first.
#if defined(__SSE4A__) && defined(__AVXVNNI__)
constexpr int READ_ONCE = 3;
#else
constexpr int READ_ONCE = 2;
#endif

template <typename T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <typename U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{LINE})); }
  void deallocate(T* data, size_t) { ::operator delete(data, std::align_val_t{LINE}); }
  bool operator==(const LineAllocator&) const { return true; }
};

// Begins with a line, so that vectors of a buffer do not lie across two.
template <typename T>
using Buffer = std::vector<T, LineAllocator<T>>;

// Room for at least `size` elements.
template <typename Vector>
inline void grow(Vector& vector, int64_t size) {
  if (static_cast<int64_t>(vector.size()) < size) vector.resize(size);
}

#if defined(__AVX512F__) && defined(__AVX512BW__)

constexpr int64_t WIDTH = 16;
using Floats = __m512;

inline Floats to_floats(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline Floats load(const BFloat16* from) { return to_floats(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats plus(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
// from - less.
inline Floats to_floats(const int32_t* from, int32_t less) {
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(from), _mm512_set1_epi32(less)));
}
// The first `count` lanes.
inline __mmask16 lanes(int64_t count) { return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, WIDTH)) - 1); }

// x / divisor, given 1 / divisor: as division rounds it (Markstein 1990), and several times as fast.
inline Floats divide(Floats x, Floats divisor, Floats inverse) {
  const Floats quotient = _mm512_mul_ps(x, inverse);
  return fma(_mm512_fnmadd_ps(quotient, divisor, x), inverse, quotient);
}

// exp(x) for x <= 0, as exp_nonpositive below has it for one number; NaN stays NaN.
inline Floats exp_nonpositive(Floats x) {
  x = _mm512_max_ps(splat(-87.0f), x);
  const Floats n = _mm512_roundscale_ps(_mm512_mul_ps(x, splat(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  Floats r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Floats p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  return _mm512_scalef_ps(fma(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, splat(1.0f))), n);
}

// 1 / (1 + exp(-x)).
inline Floats sigmoid(Floats x) {
  const Floats e = exp_nonpositive(_mm512_or_ps(x, splat(-0.0f))), one = splat(1.0f);
  const __mmask16 negative = _mm512_cmp_ps_mask(x, splat(0.0f), _CMP_LT_OQ);
  return _mm512_div_ps(_mm512_mask_mov_ps(one, negative, e), _mm512_add_ps(one, e));
}

// The first `count` elements, if any; zeros after them.
inline Floats load_first(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(lanes(count), from); }
inline void store_first(float* to, Floats x, int64_t count) { _mm512_mask_storeu_ps(to, lanes(count), x); }

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int64_t WIDTH = 8;
using Floats = __m256;

inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline Floats load(const BFloat16* from) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
inline Floats splat(float x) { return _mm256_set1_ps(x); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats plus(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats to_floats(const int32_t* from, int32_t less) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(x, _mm256_set1_epi32(less)));
}
inline float sum(Floats x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

#else  // any other processor, by the compiler's own vectors

constexpr int64_t WIDTH = 4;
typedef float Floats __attribute__((vector_size(16)));

inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
inline Floats load(const BFloat16* from) { return Floats{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])}; }
inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof(x)); }
inline Floats splat(float x) { return Floats{x, x, x, x}; }
inline Floats fma(Floats a, Floats b, Floats c) {
  for (int64_t i = 0; i < WIDTH; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
inline Floats plus(Floats a, Floats b) { return a + b; }
inline Floats times(Floats a, Floats b) { return a * b; }
inline Floats to_floats(const int32_t* from, int32_t less) {
  Floats x;
  for (int64_t i = 0; i < WIDTH; ++i) x[i] = static_cast<float>(from[i] - less);
  return x;
}
inline float sum(Floats x) { return (x[0] + x[1]) + (x[2] + x[3]); }

#endif

#if !(defined(__AVX512F__) && defined(__AVX512BW__))

inline Floats load_first(const float* from, int64_t count) {
  float all[WIDTH] = {};
  for (int64_t i = 0; i < std::min(count, WIDTH); ++i) all[i] = from[i];
  return load(all);
}
inline void store_first(float* to, Floats x, int64_t count) {
  float all[WIDTH];
  store(all, x);
  for (int64_t i = 0; i < std::min(count, WIDTH); ++i) to[i] = all[i];
}

#endif

// Products that dots() sums at once: as many as there are registers for.
#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int DOTS = 8;
#else
constexpr int DOTS = 4;
#endif

// out[q][r]: the sum of row `r` of `a`, of `R` which lie `stride` apart, times x[q], of `Q`. Two accumulators each; the
// order depends on `size` alone. Calls between() at each step of two vectors.
template <int R, int Q, typename A, typename Between>
inline void dots(const A* a, int64_t stride, const float* const* x, int64_t size, float* const* out, const Between& between) {
  Floats even[Q][R], odd[Q][R];
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < R; ++r) even[q][r] = odd[q][r] = splat(0.0f);
  int64_t i = 0;
  for (; i + 2 * WIDTH <= size; i += 2 * WIDTH) {
    between();
    Floats x0[Q], x1[Q];
    for (int q = 0; q < Q; ++q) x0[q] = load(x[q] + i), x1[q] = load(x[q] + i + WIDTH);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Floats a0 = load(a + r * stride + i), a1 = load(a + r * stride + i + WIDTH);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        even[q][r] = fma(a0, x0[q], even[q][r]);
        odd[q][r] = fma(a1, x1[q], odd[q][r]);
      }
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < R; ++r) {
      float total = sum(even[q][r]) + sum(odd[q][r]);
      for (int64_t j = i; j < size; ++j) total = __builtin_fmaf(to_float(a[r * stride + j]), x[q][j], total);
      out[q][r] = total;
    }
}

// exp(x) for x <= 0 after Cephes' expf: relative error below 2e-7. Written without a call so that it vectorises.
inline float exp_nonpositive(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float n = std::floor(__builtin_fmaf(x, 1.44269504088896341f, 0.5f));
  float r = __builtin_fmaf(n, -0.693359375f, x);
  r = __builtin_fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = __builtin_fmaf(p, r, 1.3981999507e-3f);
  p = __builtin_fmaf(p, r, 8.3334519073e-3f);
  p = __builtin_fmaf(p, r, 4.1665795894e-2f);
  p = __builtin_fmaf(p, r, 1.6666665459e-1f);
  p = __builtin_fmaf(p, r, 5.0000001201e-1f);
  p = __builtin_fmaf(p, r * r, r + 1.0f);
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}

inline float sigmoid(float x) {
  const float e = exp_nonpositive(-std::fabs(x));
  return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

// gelu with tanh: x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)).
inline float gelu_tanh(float x) {
  return x * sigmoid(1.5957691216057308f * __builtin_fmaf(0.044715f * x * x, x, x));
}

// Folds x by `step` in lanes whose number the source fixes, so that the compiler may vectorise without reordering.
template <typename Step>
inline float in_lanes(const float* x, int64_t size, float start, const Step& step) {
  constexpr int64_t LANES = 32;
  float lanes[LANES];
  for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] = start;
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES)
    for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] = step(lanes[lane], x[i + lane]);
  float total = lanes[0];
  for (int64_t lane = 1; lane < LANES; ++lane) total = step(total, lanes[lane]);
  for (; i < size; ++i) total = step(total, x[i]);
  return total;
}

// max |x|, NaN where any x is: compared as bits, magnitudes keep their order, and NaN is above infinity.
inline float largest_magnitude(const float* x, int64_t size) {
  return in_lanes(x, size, 0.0f, [](float a, float b) {
    const int32_t largest = std::bit_cast<int32_t>(a), magnitude = std::bit_cast<int32_t>(b) & 0x7fffffff;
    return std::bit_cast<float>(magnitude > largest ? magnitude : largest);
  });
}

// x / sqrt(mean(x^2) + eps) * weight.
inline void rms_norm(const float* x, const float* weight, float eps, int64_t size, float* out) {
  float square = 0;
  float* const to = &square;
  dots<1, 1>(x, 0, &x, size, &to, [] {});
  const float inverse = 1.0f / std::sqrt(square / static_cast<float>(size) + eps);
  for (int64_t i = 0; i < size; ++i) out[i] = weight[i] * (x[i] * inverse);
}

}  // namespace polyhead
