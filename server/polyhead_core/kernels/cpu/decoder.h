// A run of decoder layers of the common form as one call: norm, q/k/v, rotary, KV write, attention, output, norm, gated MLP,
// with the adapters' products at each linear layer. One parallel region for all layers; phases end at barriers.
#pragma once

#include <ATen/record_function.h>

#include <array>
#include <chrono>
#include <vector>

#include "adapters.h"
#include "attention.h"
#include "int8.h"

namespace polyhead {

using LinearPtr = c10::intrusive_ptr<PackedLinear>;

struct FusedLinear {
  LinearPtr linear;
  std::vector<SitePart> parts;
};

struct DecoderLayer {
  at::Tensor input_norm, post_norm;  // [hidden]
  at::Tensor q_norm, k_norm;         // [head width], or empty
  FusedLinear qkv, output, gate_up, down;
  LayerPages pages;
  float scale, softcap;
  int64_t window;
};

// Rows of a step, as StepBatch lays them out.
struct Rows {
  float* x;  // [count, hidden]
  int64_t count;
  const float *cos, *sin;  // [rows, rotary_width]
  int64_t rotary_width;
  const int64_t *positions, *slot_mapping;
  SequencePages sequences;
  int64_t max_blocks;
  std::vector<QueryTile> tiles;
  SlotGroups groups;
};

// Where the time of the first member of the team goes, waiting at barriers included.
constexpr std::array<const char*, 10> PHASES{
    "norm, quantise (attention)", "q/k/v product", "rotary, KV write", "attention", "quantise (output)",
    "output product", "norm, quantise (MLP)", "gate/up product", "activation, quantise", "down product"};

class PhaseClock {
 public:
  explicit PhaseClock(bool runs) : runs_(runs) { seconds.fill(0); }

  void start() { last_ = std::chrono::steady_clock::now(); }
  void lap(size_t phase) {
    if (!runs_) return;
    const auto now = std::chrono::steady_clock::now();
    seconds[phase] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }
  std::array<double, PHASES.size()> seconds;

 private:
  bool runs_;
  std::chrono::steady_clock::time_point last_;
};

// By which threads share one product's work as it is done.
struct ProductCounters {
  Counter& deltas;
  Counter* panels;  // one for each thread's
};

// The same for one layer.
class LayerCounters {
 public:
  static int64_t size(int64_t threads) { return 1 + 4 * (1 + threads); }

  LayerCounters(Counter* counters, int64_t threads) : counters_(counters), threads_(threads) {}

  Counter& attention() const { return counters_[0]; }
  // Of the layer's n-th product.
  ProductCounters product(int64_t n) const {
    Counter* first = counters_ + 1 + n * (1 + threads_);
    return {first[0], first + 1};
  }

 private:
  Counter* counters_;
  int64_t threads_;
};

constexpr int64_t BLOCK_ROWS = 256;

enum class Activation : int64_t { SILU = 0, GELU_TANH = 1 };

struct DecoderStack : torch::CustomClassHolder {
  DecoderStack(int64_t hidden_, int64_t heads_, int64_t kv_heads_, int64_t width_, double eps_, int64_t activation_)
      : hidden(hidden_), heads(heads_), kv_heads(kv_heads_), width(width_), eps(static_cast<float>(eps_)),
        activation(static_cast<Activation>(activation_)) {
    TORCH_CHECK(activation_ == 0 || activation_ == 1, "activation must be 0 (silu) or 1 (gelu, tanh)");
    TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, heads, " heads over ", kv_heads, " key/value heads");
  }

  // `sites`: those of q, k, v, o, gate, up, down.
  void add_layer(const at::Tensor& input_norm, const at::Tensor& post_norm, const at::Tensor& q_norm,
                 const at::Tensor& k_norm, const LinearPtr& qkv, const LinearPtr& output, const LinearPtr& gate_up,
                 const LinearPtr& down, const at::Tensor& key_pages, const at::Tensor& value_pages, double scale,
                 int64_t window, double softcap, const std::vector<int64_t>& sites) {
    const int64_t q = heads * width, kv = kv_heads * width, inner = down->in;
    TORCH_CHECK(sites.size() == 7, "seven sites a layer");
    TORCH_CHECK(qkv->in == hidden && qkv->out == q + 2 * kv && output->in == q && output->out == hidden &&
                gate_up->in == hidden && gate_up->out == 2 * inner && down->out == hidden, "layers do not fit together");
    TORCH_CHECK(key_pages.size(1) == kv_heads && key_pages.size(3) == width, "pages do not fit the heads");
    keys_are_transposed(key_pages, value_pages);  // refuses other layouts
    for (const at::Tensor& norm : {input_norm, post_norm})
      TORCH_CHECK(norm.numel() == hidden && norm.scalar_type() == at::kFloat && norm.is_contiguous(), "norm weights");
    for (const at::Tensor& norm : {q_norm, k_norm})
      TORCH_CHECK((norm.numel() == 0 || norm.numel() == width) && norm.scalar_type() == at::kFloat, "head norm weights");
    layers.push_back({input_norm, post_norm, q_norm, k_norm,
                      {qkv, {{sites[0], 0, q}, {sites[1], q, kv}, {sites[2], q + kv, kv}}},
                      {output, {{sites[3], 0, hidden}}},
                      {gate_up, {{sites[4], 0, inner}, {sites[5], inner, inner}}},
                      {down, {{sites[6], 0, hidden}}},
                      {key_pages, value_pages}, static_cast<float>(scale), static_cast<float>(softcap), window});
  }

  // x [T, hidden] float32 -> the output of the layers [first, last), in place.
  void forward(int64_t first, int64_t last, at::Tensor x, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& positions,
               const at::Tensor& sequence, const at::Tensor& block_tables, const at::Tensor& key_offsets,
               const at::Tensor& slot_mapping, const at::Tensor& slots, const at::Tensor& arena,
               const at::Tensor& num_pages, const at::Tensor& pages, const at::Tensor& bias) {
    RECORD_FUNCTION("polyhead_cpu::decoder_layers", std::vector<c10::IValue>());
    TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.dim() == 2 && x.size(1) == hidden,
                "the decoder reads contiguous float32 [tokens, ", hidden, "]");
    TORCH_CHECK(0 <= first && first <= last && last <= static_cast<int64_t>(layers.size()), "no layers ", first, " to ", last);
    const int64_t rows = x.size(0);
    for (const at::Tensor& table : {cos, sin})
      TORCH_CHECK(table.scalar_type() == at::kFloat && table.is_contiguous() && table.size(0) == rows &&
                  table.size(1) % 2 == 0 && table.size(1) <= width, "rotary tables");
    TORCH_CHECK(positions.numel() == rows && sequence.numel() == rows && slot_mapping.numel() == rows &&
                slots.numel() == rows, "one position, sequence, KV slot and adapter slot for each token");
    TORCH_CHECK(key_offsets.numel() == block_tables.size(0), "one key offset for each sequence");
    const AdapterTables tables(arena, num_pages, pages, bias);
    const int64_t* position = positions.const_data_ptr<int64_t>();
    // A layer runs over some rows after the other, so that what passes from one phase to the next stays in the caches. Keys
    // and values that a row sees belong to itself and to rows before it.
    std::vector<Rows> blocks;
    bool has_adapters = false;
    for (int64_t begin = 0; begin < rows; begin += BLOCK_ROWS) {
      const int64_t count = std::min(BLOCK_ROWS, rows - begin);
      blocks.push_back({x.data_ptr<float>() + begin * hidden, count, cos.const_data_ptr<float>() + begin * cos.size(1),
                        sin.const_data_ptr<float>() + begin * cos.size(1), cos.size(1), position + begin,
                        slot_mapping.const_data_ptr<int64_t>() + begin,
                        {block_tables.const_data_ptr<int32_t>(), key_offsets.const_data_ptr<int32_t>()}, block_tables.size(1),
                        query_tiles(sequence.const_data_ptr<int32_t>() + begin, position + begin, count),
                        SlotGroups(tables, 0, tables.num_sites(), slots.const_data_ptr<int32_t>() + begin, count)});
      has_adapters |= blocks.back().groups.size() > 0;
    }
    reserve(std::min(BLOCK_ROWS, rows), has_adapters);
    const int64_t threads = at::get_num_threads();
    std::vector<Counter> counters((last - first) * blocks.size() * LayerCounters::size(threads));
    tables.with_arena([&](const auto* weights) {
      with_team(rows * hidden < 64, [&](const Member& member) {
        QuantizeScratch scratch;
        AttentionScratches attention;
        NextWeights upcoming;
        PhaseClock clock(member.rank == 0);
        clock.start();
        Counter* of_layer = counters.data();
        for (int64_t index = first; index < last; ++index)
          for (const Rows& block : blocks) {
            run_layer(layers[index], layers[(index + 1) % layers.size()], block, weights, {of_layer, threads}, scratch,
                      attention, member, upcoming, clock);
            of_layer += LayerCounters::size(threads);
          }
        if (member.rank == 0)
          for (size_t phase = 0; phase < PHASES.size(); ++phase) seconds[phase] += clock.seconds[phase];
      });
    });
  }

  // (phase, seconds since the last call) in the order of a layer.
  std::vector<std::tuple<std::string, double>> take_phase_seconds() {
    std::vector<std::tuple<std::string, double>> result;
    for (size_t phase = 0; phase < PHASES.size(); ++phase) result.emplace_back(PHASES[phase], seconds[phase]);
    seconds.fill(0);
    return result;
  }

  int64_t num_bytes() const {
    int64_t total = 0;
    for (const DecoderLayer& layer : layers)
      total += layer.input_norm.nbytes() + layer.post_norm.nbytes() + layer.q_norm.nbytes() + layer.k_norm.nbytes() +
               layer.qkv.linear->num_bytes() + layer.output.linear->num_bytes() + layer.gate_up.linear->num_bytes() +
               layer.down.linear->num_bytes();
    return total;
  }

 private:
  int64_t hidden, heads, kv_heads, width;
  float eps;
  Activation activation;
  std::vector<DecoderLayer> layers;
  std::array<double, PHASES.size()> seconds{};
  QuantizedRows quantized;
  Buffer<float> normed, qkv_rows, attended, gate_up_rows, activated, delta_rows;

  void reserve(int64_t rows, bool has_adapters) {
    int64_t row_bytes = 0, qkv = 0, gate_up = 0;
    for (const DecoderLayer& layer : layers) {
      for (const FusedLinear* one : {&layer.qkv, &layer.output, &layer.gate_up, &layer.down})
        row_bytes = std::max(row_bytes, one->linear->row_bytes());
      qkv = std::max(qkv, layer.qkv.linear->out);
      gate_up = std::max(gate_up, layer.gate_up.linear->out);
    }
    quantized.resize(rows, row_bytes);
    grow(normed, rows * hidden);
    grow(qkv_rows, rows * qkv);
    grow(attended, rows * heads * width);
    grow(gate_up_rows, rows * gate_up);
    grow(activated, rows * gate_up / 2);
    if (has_adapters) grow(delta_rows, rows * std::max({qkv, gate_up, hidden}));
  }

  // y (+)= W x; `x` holds the float rows, `quantized` their int8 form. Returns what the adapters add, which is still to be
  // added to each row by the member that goes on with it. `next`: the layer that is multiplied next, whose weights
  // `upcoming` then asks for.
  template <typename A>
  Deltas<A> product(const FusedLinear& one, const FusedLinear& next, const float* x, float* y, bool accumulate,
                    const Rows& rows, const A* arena, const ProductCounters& counters, const Member& member,
                    NextWeights& upcoming) {
    const PackedLinear &linear = *one.linear, &after = *next.linear;
    const auto [next_first, next_last] = member.share(after.num_panels());
    upcoming = NextWeights(after.panel(next_first), after.panel(next_last));
    const Deltas deltas(arena, rows.groups, one.parts, x, linear.in, delta_rows.data(), linear.out, false);
    if (deltas.empty() && rows.count >= member.size) {
      const auto [first, last] = member.share(linear.num_panels());
      multiply_panels(linear, quantized, rows.count, first, last, after.panel(next_first), y, linear.out, accumulate);
    } else {
      const auto multiply = [&] {
        for (int64_t n = 0; n < member.size; ++n) {
          const int64_t owner = (member.rank + n) % member.size;
          const auto [first, last] = Member{owner, member.size, nullptr}.share(linear.num_panels());
          const int64_t some = std::max<int64_t>(1, (last - first) / 8);
          for (int64_t begin; (begin = first + counters.panels[owner].take() * some) < last;)
            multiply_panels(linear, quantized, rows.count, begin, std::min(begin + some, last),
                            begin + some < last ? linear.panel(begin + some) : after.panel(next_first), y, linear.out,
                            accumulate);
        }
      };
      // Adapters are bound by memory, many rows' products by arithmetic: half of the team begins with the one, half with
      // the other, and goes on with what is left. Without adapters it is a member without a row that is ahead.
      if (member.rank % 2) multiply();
      deltas.compute(counters.deltas);
      multiply();
    }
    member.wait(upcoming);
    return deltas;
  }

  template <typename A>
  void run_layer(const DecoderLayer& layer, const DecoderLayer& next, const Rows& rows, const A* arena,
                 const LayerCounters& counters, QuantizeScratch& scratch, AttentionScratches& attention, const Member& member,
                 NextWeights& upcoming, PhaseClock& clock) {
    float* x = rows.x;
    const auto [begin, end] = member.share(rows.count);
    for (int64_t r = begin; r < end; ++r) norm_row(layer.input_norm, *layer.qkv.linear, x, r, scratch);
    member.wait(upcoming);
    clock.lap(0);
    const Deltas at_qkv = product(layer.qkv, layer.output, normed.data(), qkv_rows.data(), false, rows, arena,
                                  counters.product(0), member, upcoming);
    clock.lap(1);
    layer.pages.with_data([&](const auto* keys, const auto* values) {
      for (int64_t r = begin; r < end; ++r) {
        at_qkv.add_to(qkv_rows.data(), r);
        rotate_and_write(layer, keys, values, rows, r);
      }
    });
    member.wait(upcoming);
    clock.lap(2);
    const AttentionShape shape{heads, kv_heads, width, layer.pages.keys.size(2), rows.max_blocks, layer.window,
                               layer.scale, layer.softcap, layer.pages.keys.stride(2) == 1 && width > 1};
    attend_tiles(layer.pages, qkv_rows.data(), layer.qkv.linear->out, rows.sequences, rows.positions, rows.tiles, shape,
                 counters.attention(), attention, member, attended.data());
    member.wait(upcoming);
    clock.lap(3);
    for (int64_t r = begin; r < end; ++r)
      quantize(*layer.output.linear, attended.data() + r * heads * width, scratch, quantized, r);
    member.wait(upcoming);
    clock.lap(4);
    const Deltas at_output =
        product(layer.output, layer.gate_up, attended.data(), x, true, rows, arena, counters.product(1), member, upcoming);
    clock.lap(5);
    for (int64_t r = begin; r < end; ++r) {
      at_output.add_to(x, r);
      norm_row(layer.post_norm, *layer.gate_up.linear, x, r, scratch);
    }
    member.wait(upcoming);
    clock.lap(6);
    const Deltas at_gate_up = product(layer.gate_up, layer.down, normed.data(), gate_up_rows.data(), false, rows, arena,
                                      counters.product(2), member, upcoming);
    clock.lap(7);
    for (int64_t r = begin; r < end; ++r) activate(layer, r, at_gate_up.of(r, 0), at_gate_up.of(r, 1), scratch);
    member.wait(upcoming);
    clock.lap(8);
    const Deltas at_down =
        product(layer.down, next.qkv, activated.data(), x, true, rows, arena, counters.product(3), member, upcoming);
    for (int64_t r = begin; r < end; ++r) at_down.add_to(x, r);
    clock.lap(9);
  }

  void norm_row(const at::Tensor& weight, const PackedLinear& linear, const float* x, int64_t r, QuantizeScratch& scratch) {
    float* to = normed.data() + r * hidden;
    rms_norm(x + r * hidden, weight.const_data_ptr<float>(), eps, hidden, to);
    quantize(linear, to, scratch, quantized, r);
  }

  // `gate_delta`, `up_delta`: what adapters add; nullptr: nothing.
  void activate(const DecoderLayer& layer, int64_t r, const float* gate_delta, const float* up_delta,
                QuantizeScratch& scratch) {
    const int64_t inner = layer.down.linear->in;
    const float *gate = gate_up_rows.data() + r * 2 * inner, *up = gate + inner;
    float* to = activated.data() + r * inner;
    int64_t i = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__)
    // Asks for the next row meanwhile: much of it lies in another core's caches.
    const auto of_row = [&](const float* value, const float* delta) {
      __builtin_prefetch(value + i + 2 * inner, 0, 2);
      if (!delta) return load(value + i);
      __builtin_prefetch(delta + i + 2 * inner, 0, 2);
      return plus(load(value + i), load(delta + i));
    };
    for (; i + WIDTH <= inner; i += WIDTH) {
      const Floats x = of_row(gate, gate_delta);
      const Floats argument = activation == Activation::SILU
          ? x : times(times(splat(1.5957691216057308f), x), fma(times(splat(0.044715f), x), x, splat(1.0f)));
      store(to + i, times(times(x, sigmoid(argument)), of_row(up, up_delta)));
    }
#endif
    for (; i < inner; ++i) {
      const float x = gate[i] + (gate_delta ? gate_delta[i] : 0.0f), y = up[i] + (up_delta ? up_delta[i] : 0.0f);
      to[i] = activation == Activation::SILU ? x * sigmoid(x) * y : gelu_tanh(x) * y;
    }
    quantize(*layer.down.linear, to, scratch, quantized, r);
  }

  // Rotates by halves (Su et al. 2021, as GPT-NeoX lays it out): the first rotary_width elements of each head.
  void rotate(const at::Tensor& norm, const float* cos, const float* sin, int64_t rotary_width, float* head) const {
    if (norm.numel()) rms_norm(head, norm.const_data_ptr<float>(), eps, width, head);
    const int64_t half = rotary_width / 2;
    for (int64_t d = 0; d < half; ++d) {
      const float a = head[d], b = head[d + half];
      head[d] = a * cos[d] - b * sin[d];
      head[d + half] = b * cos[d + half] + a * sin[d + half];
    }
  }

  template <typename K>
  void rotate_and_write(const DecoderLayer& layer, const K*, const K*, const Rows& rows, int64_t r) {
    const float *cos = rows.cos + r * rows.rotary_width, *sin = rows.sin + r * rows.rotary_width;
    float* row = qkv_rows.data() + r * layer.qkv.linear->out;
    for (int64_t h = 0; h < heads; ++h) rotate(layer.q_norm, cos, sin, rows.rotary_width, row + h * width);
    const at::Tensor &keys = layer.pages.keys, &values = layer.pages.values;
    K* key_data = static_cast<K*>(keys.data_ptr());
    K* value_data = static_cast<K*>(values.data_ptr());
    const int64_t block = keys.size(2), at = rows.slot_mapping[r];
    for (int64_t g = 0; g < kv_heads; ++g) {
      float* key = row + (heads + g) * width;
      const float* value = row + (heads + kv_heads + g) * width;
      rotate(layer.k_norm, cos, sin, rows.rotary_width, key);
      const int64_t page = (at / block * kv_heads + g) * block * width, offset = at % block;
      K *k = key_data + page + offset * keys.stride(2), *v = value_data + page + offset * width;
      const int64_t stride = keys.stride(3);
      for (int64_t d = 0; d < width; ++d) k[d * stride] = static_cast<K>(key[d]);
      for (int64_t d = 0; d < width; ++d) v[d] = static_cast<K>(value[d]);
    }
  }
};

}  // namespace polyhead
