// The CPU kernels, on torch's own thread pool. Each one computes what its namesake in reference.py defines.
//
// Every result row is computed by one thread in an order that depends on that row alone, so it is bit for bit the same
// whatever else is in the batch. Sums run in LANES independent accumulators: the order is fixed by the source, not by
// the compiler's vectoriser (compiled with -ffp-contract=off; fused multiply-adds are written out).

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t RANKS_PER_PAGE = 8;
constexpr int64_t UNIT = 64;

inline float to_float(float value) { return value; }

inline float to_float(at::BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.x) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

template <typename A>
float dot(const A* a, const float* x, int64_t size) {
  float lanes[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES)
    for (int64_t lane = 0; lane < LANES; ++lane)
      lanes[lane] = __builtin_fmaf(to_float(a[i + lane]), x[i + lane], lanes[lane]);
  float sum = 0;
  for (int64_t lane = 0; lane < LANES; ++lane) sum += lanes[lane];
  for (; i < size; ++i) sum = __builtin_fmaf(to_float(a[i]), x[i], sum);
  return sum;
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

int64_t grain(int64_t items, int64_t work_per_item) {
  constexpr int64_t MIN_WORK = 16384;  // below this a thread's wake-up costs more than it saves
  return std::max<int64_t>(1, std::min(items, MIN_WORK / std::max<int64_t>(1, work_per_item)));
}

// q = round(x / scale) with scale = max|x| / 127, written to q; returns scale.
float quantize_row(const float* x, int64_t size, int8_t* q) {
  float lanes[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES)
    for (int64_t lane = 0; lane < LANES; ++lane) {
      const float magnitude = std::fabs(x[i + lane]);
      lanes[lane] = magnitude > lanes[lane] ? magnitude : lanes[lane];
    }
  float largest = 0;
  for (int64_t lane = 0; lane < LANES; ++lane) largest = std::max(largest, lanes[lane]);
  for (; i < size; ++i) largest = std::max(largest, std::fabs(x[i]));
  const float scale = std::max(largest / 127.0f, 1e-12f);
  for (i = 0; i < size; ++i) q[i] = static_cast<int8_t>(static_cast<int32_t>(std::nearbyintf(x[i] / scale)));
  return scale;
}

at::Tensor int8_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& absmax,
                       const std::optional<at::Tensor>& input_scale, const std::optional<at::Tensor>& outlier_columns,
                       const std::optional<at::Tensor>& outlier_weight, const std::optional<at::Tensor>& bias) {
  const at::Tensor input = x.to(at::kFloat).contiguous();
  const int64_t rows = input.size(0), width = input.size(1), out_width = weight.size(0);
  TORCH_CHECK(weight.scalar_type() == at::kChar && weight.size(1) == width, "int8_linear: weight must be int8 [out, ",
              width, "]");
  const int64_t outliers = outlier_columns ? outlier_columns->numel() : 0;
  const auto int8 = input.options().dtype(at::kChar);
  at::Tensor q = at::empty({rows, width}, int8), scales = at::empty({rows, 3}, input.options());
  at::Tensor high = at::empty({rows, outliers}, int8), low = at::empty({rows, outliers}, int8);
  const float* in = input.const_data_ptr<float>();
  const float* smooth = input_scale ? input_scale->const_data_ptr<float>() : nullptr;
  const int64_t* columns = outliers ? outlier_columns->const_data_ptr<int64_t>() : nullptr;
  int8_t *q_data = q.data_ptr<int8_t>(), *high_data = high.data_ptr<int8_t>(), *low_data = low.data_ptr<int8_t>();
  float* scale_data = scales.data_ptr<float>();
  at::parallel_for(0, rows, grain(rows, width * 4), [&](int64_t begin, int64_t end) {
    std::vector<float> row(width), large(outliers);
    for (int64_t r = begin; r < end; ++r) {
      const float* source = in + r * width;
      if (smooth)
        for (int64_t i = 0; i < width; ++i) row[i] = source[i] / smooth[i];
      else
        std::copy(source, source + width, row.begin());
      for (int64_t k = 0; k < outliers; ++k) {
        large[k] = row[columns[k]];
        row[columns[k]] = 0;
      }
      scale_data[3 * r] = quantize_row(row.data(), width, q_data + r * width);
      if (!outliers) continue;
      int8_t* q1 = high_data + r * outliers;
      const float s1 = quantize_row(large.data(), outliers, q1);
      for (int64_t k = 0; k < outliers; ++k) large[k] = large[k] - static_cast<float>(q1[k]) * s1;
      scale_data[3 * r + 1] = s1;
      scale_data[3 * r + 2] = quantize_row(large.data(), outliers, low_data + r * outliers);
    }
  });
  const at::Tensor product = at::_int_mm(q, weight.t());
  const at::Tensor high_product = outliers ? at::_int_mm(high, outlier_weight->t()) : at::Tensor();
  const at::Tensor low_product = outliers ? at::_int_mm(low, outlier_weight->t()) : at::Tensor();
  at::Tensor y = at::empty({rows, out_width}, input.options());
  const int32_t* sums = product.const_data_ptr<int32_t>();
  const int32_t* high_sums = outliers ? high_product.const_data_ptr<int32_t>() : nullptr;
  const int32_t* low_sums = outliers ? low_product.const_data_ptr<int32_t>() : nullptr;
  const at::Tensor weight_scale = absmax / 127.0;
  const float* w_scale = weight_scale.const_data_ptr<float>();
  const at::Tensor bias_float = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  const float* b = bias ? bias_float.const_data_ptr<float>() : nullptr;
  float* out = y.data_ptr<float>();
  at::parallel_for(0, rows, grain(rows, out_width * 4), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float s0 = scale_data[3 * r];
      const int32_t* sum = sums + r * out_width;
      float* to = out + r * out_width;
      if (outliers) {
        const float s1 = scale_data[3 * r + 1], s2 = scale_data[3 * r + 2];
        const int32_t *sum1 = high_sums + r * out_width, *sum2 = low_sums + r * out_width;
        for (int64_t o = 0; o < out_width; ++o)
          to[o] = (static_cast<float>(sum[o]) * s0 + static_cast<float>(sum1[o]) * s1 +
                   static_cast<float>(sum2[o]) * s2) * w_scale[o];
      } else {
        for (int64_t o = 0; o < out_width; ++o) to[o] = static_cast<float>(sum[o]) * s0 * w_scale[o];
      }
      if (b)
        for (int64_t o = 0; o < out_width; ++o) to[o] += b[o];
    }
  });
  return y;
}

struct Tables {
  const int32_t *num_pages, *pages, *bias;
  int64_t num_sites, max_pages, site;

  Tables(const at::Tensor& num_pages_, const at::Tensor& pages_, const at::Tensor& bias_, int64_t site_)
      : num_pages(num_pages_.const_data_ptr<int32_t>()), pages(pages_.const_data_ptr<int32_t>()),
        bias(bias_.const_data_ptr<int32_t>()), num_sites(num_pages_.size(1)), max_pages(pages_.size(2)), site(site_) {}

  int64_t row(int64_t slot) const { return slot * num_sites + site; }
  const int32_t* page(int64_t slot, int64_t p) const { return pages + (row(slot) * max_pages + p) * 2; }
};

// y += sum_r h[r] b[r], with b [8, out].
template <typename A>
void expand_page(float* y, const float* h, const A* b, int64_t out_width) {
  for (int64_t r = 0; r < RANKS_PER_PAGE; ++r) {
    const A* row = b + r * out_width;
    for (int64_t o = 0; o < out_width; ++o) y[o] = __builtin_fmaf(h[r], to_float(row[o]), y[o]);
  }
}

void check_rows(const at::Tensor& y, const at::Tensor& slots) {
  TORCH_CHECK(y.scalar_type() == at::kFloat && y.is_contiguous(), "adapter products add to contiguous float32 rows");
  TORCH_CHECK(slots.scalar_type() == at::kInt && slots.size(0) == y.size(0), "slots must be int32, one per row");
}

template <typename A>
void low_rank_add_typed(float* y, const float* x, const A* arena, const Tables& tables, const int32_t* slots,
                        int64_t rows, int64_t width, int64_t out_width) {
  at::parallel_for(0, rows, grain(rows, 16 * (width + out_width)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t slot = slots[t];
      if (slot < 0) continue;
      const int64_t count = tables.num_pages[tables.row(slot)];
      for (int64_t p = 0; p < count; ++p) {
        const int32_t* units = tables.page(slot, p);
        float h[RANKS_PER_PAGE];
        for (int64_t r = 0; r < RANKS_PER_PAGE; ++r)
          h[r] = dot(arena + units[0] * UNIT + r * width, x + t * width, width);
        expand_page(y + t * out_width, h, arena + units[1] * UNIT, out_width);
      }
      const int64_t unit = tables.bias[tables.row(slot)];
      if (unit >= 0)
        for (int64_t o = 0; o < out_width; ++o) y[t * out_width + o] += to_float(arena[unit * UNIT + o]);
    }
  });
}

void low_rank_add(at::Tensor& y, const at::Tensor& x, const at::Tensor& arena, const at::Tensor& num_pages,
                  const at::Tensor& pages, const at::Tensor& bias, int64_t site, const at::Tensor& slots) {
  check_rows(y, slots);
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous(), "low_rank_add reads contiguous float32 rows");
  const Tables tables(num_pages, pages, bias, site);
  const auto run = [&](auto* weights) {
    low_rank_add_typed(y.data_ptr<float>(), x.const_data_ptr<float>(), weights, tables,
                       slots.const_data_ptr<int32_t>(), x.size(0), x.size(1), y.size(1));
  };
  if (arena.scalar_type() == at::kFloat) run(arena.const_data_ptr<float>());
  else run(arena.const_data_ptr<at::BFloat16>());
}

template <typename A>
void embedding_add_typed(float* y, const int64_t* ids, const A* arena, const Tables& tables, const int32_t* slots,
                         int64_t rows, int64_t out_width) {
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t slot = slots[t];
    if (slot < 0) continue;
    const int64_t count = tables.num_pages[tables.row(slot)];
    for (int64_t p = 0; p < count; ++p) {
      const int32_t* units = tables.page(slot, p);
      float h[RANKS_PER_PAGE];
      for (int64_t r = 0; r < RANKS_PER_PAGE; ++r) h[r] = to_float(arena[units[0] * UNIT + ids[t] * RANKS_PER_PAGE + r]);
      expand_page(y + t * out_width, h, arena + units[1] * UNIT, out_width);
    }
  }
}

void embedding_add(at::Tensor& y, const at::Tensor& ids, const at::Tensor& arena, const at::Tensor& num_pages,
                   const at::Tensor& pages, const at::Tensor& bias, int64_t site, const at::Tensor& slots) {
  check_rows(y, slots);
  TORCH_CHECK(ids.scalar_type() == at::kLong && ids.is_contiguous(), "token ids must be contiguous int64");
  const Tables tables(num_pages, pages, bias, site);
  const auto run = [&](auto* weights) {
    embedding_add_typed(y.data_ptr<float>(), ids.const_data_ptr<int64_t>(), weights, tables,
                        slots.const_data_ptr<int32_t>(), y.size(0), y.size(1));
  };
  if (arena.scalar_type() == at::kFloat) run(arena.const_data_ptr<float>());
  else run(arena.const_data_ptr<at::BFloat16>());
}

struct AttentionShape {
  int64_t heads, kv_heads, block_size, width, max_blocks, window;
  float scale, softcap;
};

// The query heads of one token that share key/value head g.
template <typename K>
void attend(const float* q, const K* keys, const K* values, const int32_t* blocks, int64_t position, int64_t g,
            const AttentionShape& s, std::vector<float>& scores, float* out) {
  const int64_t group = s.heads / s.kv_heads, end = position + 1;
  const int64_t begin = s.window ? std::max<int64_t>(0, end - s.window) : 0, length = end - begin;
  const auto row = [&](const K* pages, int64_t at) {
    return pages + ((blocks[at / s.block_size] * s.kv_heads + g) * s.block_size + at % s.block_size) * s.width;
  };
  scores.resize(group * length);
  for (int64_t at = begin; at < end; ++at) {
    const K* key = row(keys, at);
    for (int64_t h = 0; h < group; ++h) {
      float score = dot(key, q + (g * group + h) * s.width, s.width) * s.scale;
      if (s.softcap != 0.0f) score = s.softcap * std::tanh(score / s.softcap);
      scores[h * length + at - begin] = score;
    }
  }
  for (int64_t h = 0; h < group; ++h) {
    float* weights = scores.data() + h * length;
    const float largest = *std::max_element(weights, weights + length);
    for (int64_t i = 0; i < length; ++i) weights[i] = exp_nonpositive(weights[i] - largest);
    float sum = 0;
    for (int64_t i = 0; i < length; ++i) sum += weights[i];
    const float inverse = 1.0f / sum;
    for (int64_t i = 0; i < length; ++i) weights[i] *= inverse;
  }
  std::fill(out, out + group * s.width, 0.0f);
  for (int64_t at = begin; at < end; ++at) {
    const K* value = row(values, at);
    for (int64_t h = 0; h < group; ++h) {
      const float weight = scores[h * length + at - begin];
      float* to = out + h * s.width;
      for (int64_t d = 0; d < s.width; ++d) to[d] = __builtin_fmaf(weight, to_float(value[d]), to[d]);
    }
  }
}

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k_pages, const at::Tensor& v_pages,
                           const at::Tensor& block_tables, const at::Tensor& sequences, const at::Tensor& positions,
                           double scale, int64_t window, double softcap) {
  TORCH_CHECK(q.scalar_type() == at::kFloat && q.is_contiguous(), "paged_attention reads contiguous float32 queries");
  TORCH_CHECK(block_tables.scalar_type() == at::kInt && sequences.scalar_type() == at::kInt, "tables must be int32");
  const int64_t tokens = q.size(0);
  const AttentionShape shape{q.size(1),           k_pages.size(1), k_pages.size(2), q.size(2),
                             block_tables.size(1), window,         static_cast<float>(scale),
                             static_cast<float>(softcap)};
  at::Tensor out = at::empty_like(q);
  const float* q_data = q.const_data_ptr<float>();
  float* out_data = out.data_ptr<float>();
  const int32_t *blocks = block_tables.const_data_ptr<int32_t>(), *sequence = sequences.const_data_ptr<int32_t>();
  const int64_t* position = positions.const_data_ptr<int64_t>();
  const int64_t row = shape.heads * shape.width, group_row = row / shape.kv_heads;
  const auto run = [&](auto* keys, auto* values) {
    at::parallel_for(0, tokens * shape.kv_heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scores;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t t = item / shape.kv_heads, g = item % shape.kv_heads;
        attend(q_data + t * row, keys, values, blocks + sequence[t] * shape.max_blocks, position[t], g, shape, scores,
               out_data + t * row + g * group_row);
      }
    });
  };
  if (k_pages.scalar_type() == at::kFloat) run(k_pages.const_data_ptr<float>(), v_pages.const_data_ptr<float>());
  else run(k_pages.const_data_ptr<at::BFloat16>(), v_pages.const_data_ptr<at::BFloat16>());
  return out;
}

}  // namespace

TORCH_LIBRARY(polyhead_cpu, library) {
  library.def("int8_linear(Tensor x, Tensor weight, Tensor absmax, Tensor? input_scale, Tensor? outlier_columns, "
              "Tensor? outlier_weight, Tensor? bias) -> Tensor", &int8_linear);
  library.def("low_rank_add(Tensor(a!) y, Tensor x, Tensor arena, Tensor num_pages, Tensor pages, Tensor bias, "
              "int site, Tensor slots) -> ()", &low_rank_add);
  library.def("embedding_add(Tensor(a!) y, Tensor ids, Tensor arena, Tensor num_pages, Tensor pages, Tensor bias, "
              "int site, Tensor slots) -> ()", &embedding_add);
  library.def("paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_tables, Tensor sequences, "
              "Tensor positions, float scale, int window, float softcap) -> Tensor", &paged_attention);
}
