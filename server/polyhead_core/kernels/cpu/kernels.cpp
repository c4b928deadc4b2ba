// The CPU kernels as torch operators, on torch's own thread pool. Each computes what its namesake in reference.py defines.
//
// Every result row is computed in an order that depends on that row alone, so it is bit for bit the same whatever else is
// in the batch: the order of sums is fixed by the source, not by the compiler's vectoriser (-ffp-contract=off; fused
// multiply-adds are written out).

#include <ATen/ATen.h>
#include <ATen/record_function.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include "decoder.h"
#include "int8_backward.h"
#include "logits.h"
#include "sampling.h"

namespace polyhead {
namespace {

at::Tensor packed_forward(const LinearPtr& linear, const at::Tensor& x) {
  RECORD_FUNCTION("polyhead_cpu::packed_linear", std::vector<c10::IValue>());
  TORCH_CHECK(x.dim() == 2 && x.size(1) == linear->in, "expected rows of ", linear->in, ", got ", x.sizes());
  const at::Tensor input = x.to(at::kFloat).contiguous();
  at::Tensor y = linear->lasting ? linear->results.empty(x.size(0), linear->out) : at::empty({x.size(0), linear->out});
  linear_forward(*linear, input.const_data_ptr<float>(), x.size(0), y.data_ptr<float>());
  return y;
}

void check_backward(const at::Tensor& g, const at::Tensor& weight, const at::Tensor& scale,
                    const std::optional<at::Tensor>& input_scale) {
  TORCH_CHECK(g.dim() == 2 && g.scalar_type() == at::kFloat && weight.dim() == 2 && weight.scalar_type() == at::kChar &&
                  weight.is_contiguous() && g.size(1) == weight.size(0),
              "expected float32 gradients [rows, out] and a contiguous int8 weight [out, in], got ", g.sizes(), " of ",
              g.scalar_type(), " and ", weight.sizes(), " of ", weight.scalar_type());
  TORCH_CHECK(scale.numel() == weight.size(0) && scale.scalar_type() == at::kFloat &&
                  (!input_scale || (input_scale->numel() == weight.size(1) && input_scale->scalar_type() == at::kFloat)),
              "scale must be float32 [out], input_scale float32 [in]");
}

at::Tensor int8_linear_backward(const at::Tensor& g, const at::Tensor& weight, const at::Tensor& scale,
                                const std::optional<at::Tensor>& input_scale) {
  RECORD_FUNCTION("polyhead_cpu::int8_linear_backward", std::vector<c10::IValue>());
  check_backward(g, weight, scale, input_scale);
  const at::Tensor rows = g.contiguous(), by_output = scale.contiguous();
  const at::Tensor by_input = input_scale ? input_scale->contiguous() : at::Tensor();
  at::Tensor y = at::empty({g.size(0), weight.size(1)}, g.options());
  backward_on_unit(rows.const_data_ptr<float>(), weight.const_data_ptr<int8_t>(), by_output.const_data_ptr<float>(),
                   by_input.defined() ? by_input.const_data_ptr<float>() : nullptr, g.size(0), weight.size(0),
                   weight.size(1), y.data_ptr<float>());
  return y;
}

at::Tensor int8_linear_backward_shape(const at::Tensor& g, const at::Tensor& weight, const at::Tensor& scale,
                                      const std::optional<at::Tensor>& input_scale) {
  check_backward(g, weight, scale, input_scale);
  return at::empty_symint({g.sym_size(0), weight.sym_size(1)}, g.options());
}

void advise(at::Tensor& tensor) { advise_huge_pages(tensor.data_ptr(), tensor.nbytes()); }

void check_rows(const at::Tensor& y, const at::Tensor& slots) {
  TORCH_CHECK(y.scalar_type() == at::kFloat && y.is_contiguous(), "adapter products add to contiguous float32 rows");
  TORCH_CHECK(slots.scalar_type() == at::kInt && slots.numel() == y.size(0), "slots must be int32, one per row");
}

void low_rank_add(at::Tensor& y, const at::Tensor& x, const at::Tensor& arena, const at::Tensor& num_pages,
                  const at::Tensor& pages, const at::Tensor& bias, int64_t site, const at::Tensor& slots) {
  check_rows(y, slots);
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous(), "low_rank_add reads contiguous float32 rows");
  low_rank_add_rows(AdapterTables(arena, num_pages, pages, bias), site, slots.const_data_ptr<int32_t>(),
                    x.const_data_ptr<float>(), x.size(0), x.size(1), y.data_ptr<float>(), y.size(1));
}

void embedding_add(at::Tensor& y, const at::Tensor& ids, const at::Tensor& arena, const at::Tensor& num_pages,
                   const at::Tensor& pages, const at::Tensor& bias, int64_t site, const at::Tensor& slots) {
  check_rows(y, slots);
  TORCH_CHECK(ids.scalar_type() == at::kLong && ids.is_contiguous(), "token ids must be contiguous int64");
  embedding_add_rows(AdapterTables(arena, num_pages, pages, bias), site, slots.const_data_ptr<int32_t>(),
                     ids.const_data_ptr<int64_t>(), y.size(0), y.data_ptr<float>(), y.size(1));
}

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k_pages, const at::Tensor& v_pages,
                           const at::Tensor& block_tables, const at::Tensor& sequences, const at::Tensor& positions,
                           double scale, int64_t window, double softcap, const std::optional<at::Tensor>& key_offsets) {
  TORCH_CHECK(q.scalar_type() == at::kFloat && q.is_contiguous(), "paged_attention reads contiguous float32 queries");
  TORCH_CHECK(block_tables.scalar_type() == at::kInt && sequences.scalar_type() == at::kInt, "tables must be int32");
  TORCH_CHECK(!key_offsets || (key_offsets->scalar_type() == at::kInt && key_offsets->numel() == block_tables.size(0)),
              "key offsets must be int32, one for each sequence");
  const SequencePages pages_of{block_tables.const_data_ptr<int32_t>(),
                               key_offsets ? key_offsets->const_data_ptr<int32_t>() : nullptr};
  const bool transposed = keys_are_transposed(k_pages, v_pages);
  const AttentionShape shape{q.size(1), k_pages.size(1), q.size(2), k_pages.size(2), block_tables.size(1), window,
                             static_cast<float>(scale), static_cast<float>(softcap), transposed};
  const int64_t* position = positions.const_data_ptr<int64_t>();
  const auto tiles = query_tiles(sequences.const_data_ptr<int32_t>(), position, q.size(0));
  at::Tensor out = at::empty_like(q);
  Counter next;
  with_team(q.size(0) == 1, [&](const Member& member) {
    AttentionScratches scratch;
    attend_tiles({k_pages, v_pages}, q.const_data_ptr<float>(), q.size(1) * q.size(2), pages_of, position, tiles, shape,
                 next, scratch, member, out.data_ptr<float>());
  });
  return out;
}

at::Tensor rms_norm_rows(const at::Tensor& x, const at::Tensor& weight, double eps) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.dim() == 2 && weight.scalar_type() == at::kFloat &&
                  weight.is_contiguous() && weight.numel() == x.size(1),
              "rms_norm reads contiguous float32 rows, and as wide a weight");
  at::Tensor out = at::empty_like(x);
  for (int64_t r = 0; r < x.size(0); ++r)
    rms_norm(x.const_data_ptr<float>() + r * x.size(1), weight.const_data_ptr<float>(), static_cast<float>(eps), x.size(1),
             out.data_ptr<float>() + r * x.size(1));
  return out;
}

at::Tensor greedy(const at::Tensor& logits) {
  TORCH_CHECK(logits.scalar_type() == at::kFloat && logits.is_contiguous() && logits.dim() == 2 && logits.size(1) > 0,
              "greedy reads contiguous float32 rows");
  at::Tensor ids = at::empty({logits.size(0)}, at::kLong);
  greedy_rows(logits.const_data_ptr<float>(), logits.size(0), logits.size(1), ids.data_ptr<int64_t>());
  return ids;
}

at::Tensor draw(at::TensorList rows, const at::Tensor& draws) {
  TORCH_CHECK(draws.dim() == 2 && draws.size(0) == static_cast<int64_t>(rows.size()) && draws.size(1) == 5 &&
                  draws.scalar_type() == at::kDouble && draws.is_contiguous(),
              "expected contiguous float64 draws [", rows.size(), ", 5], got ", draws.sizes(), " of ", draws.scalar_type());
  std::vector<const float*> logits;
  std::vector<Draw> how;
  for (const at::Tensor& row : rows) {
    TORCH_CHECK(row.scalar_type() == at::kFloat && row.is_contiguous() && row.dim() == 1 && row.numel() > 0 &&
                    row.numel() == rows[0].numel(),
                "draw reads contiguous float32 rows of one length");
    const double* const of = draws.const_data_ptr<double>() + 5 * logits.size();
    how.push_back({static_cast<float>(of[0]), static_cast<int64_t>(of[1]), of[2], static_cast<float>(of[3]), of[4]});
    logits.push_back(row.const_data_ptr<float>());
  }
  at::Tensor ids = at::empty({draws.size(0)}, at::kLong);
  if (!rows.empty()) draw_rows(logits, rows[0].numel(), how, ids.data_ptr<int64_t>());
  return ids;
}

}  // namespace
}  // namespace polyhead

TORCH_LIBRARY(polyhead_cpu, library) {
  using namespace polyhead;
  library.class_<PackedLinear>("PackedLinear")
      .def(torch::init<const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                       const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, bool>())
      .def("num_bytes", &PackedLinear::num_bytes)
      .def("weight", &PackedLinear::weight)
      .def("forward", &packed_forward);
  library.class_<DecoderStack>("DecoderStack")
      .def(torch::init<int64_t, int64_t, int64_t, int64_t, double, int64_t>())
      .def("add_layer", &DecoderStack::add_layer)
      .def("num_bytes", &DecoderStack::num_bytes)
      .def("take_phase_seconds", &DecoderStack::take_phase_seconds)
      .def("forward", &DecoderStack::forward);
  library.def("runs_backward() -> bool", &runs_backward_on_unit);
  library.def("int8_linear_backward(Tensor g, Tensor weight, Tensor scale, Tensor? input_scale) -> Tensor");
  library.def("advise_huge_pages(Tensor(a!) tensor) -> ()", &advise);
  library.def("low_rank_add(Tensor(a!) y, Tensor x, Tensor arena, Tensor num_pages, Tensor pages, Tensor bias, "
              "int site, Tensor slots) -> ()", &low_rank_add);
  library.def("embedding_add(Tensor(a!) y, Tensor ids, Tensor arena, Tensor num_pages, Tensor pages, Tensor bias, "
              "int site, Tensor slots) -> ()", &embedding_add);
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", &rms_norm_rows);
  library.def("greedy(Tensor logits) -> Tensor", &greedy);
  library.def("draw(Tensor[] rows, Tensor draws) -> Tensor", &draw);
  library.def("paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_tables, Tensor sequences, "
              "Tensor positions, float scale, int window, float softcap, Tensor? key_offsets) -> Tensor", &paged_attention);
}

TORCH_LIBRARY_IMPL(polyhead_cpu, CPU, library) { library.impl("int8_linear_backward", &polyhead::int8_linear_backward); }
TORCH_LIBRARY_IMPL(polyhead_cpu, Meta, library) {
  library.impl("int8_linear_backward", &polyhead::int8_linear_backward_shape);
}
