// Low-rank products of many adapters in one batch: y += B^T (A x) over the rank pages of each row's slot.
//
// Rows are sorted by slot, so that a page is read once for all rows of its adapter. Two halves with a barrier between
// them: `shrink` makes h = A x, `expand` adds B^T h to a range of columns. Each row's sums are in an order of its own.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "team.h"
#include "vector.h"

namespace polyhead {

constexpr int64_t RANKS_PER_PAGE = 8;
constexpr int64_t UNIT = 64;

// tables.py:AdapterTables.
struct AdapterTables {
  at::Tensor arena, num_pages, pages, bias;

  AdapterTables(const at::Tensor& arena_, const at::Tensor& num_pages_, const at::Tensor& pages_, const at::Tensor& bias_)
      : arena(arena_), num_pages(num_pages_), pages(pages_), bias(bias_) {
    TORCH_CHECK(arena.scalar_type() == at::kFloat || arena.scalar_type() == at::kBFloat16,
                "the arena must be float32 or bfloat16");
    for (const at::Tensor& table : {num_pages, pages, bias})
      TORCH_CHECK(table.scalar_type() == at::kInt && table.is_contiguous(), "page tables must be contiguous int32");
  }

  int64_t num_sites() const { return num_pages.size(1); }
  int64_t count(int64_t slot, int64_t site) const {
    return num_pages.const_data_ptr<int32_t>()[slot * num_pages.size(1) + site];
  }
  const int32_t* page(int64_t slot, int64_t site, int64_t p) const {
    return pages.const_data_ptr<int32_t>() + ((slot * num_pages.size(1) + site) * pages.size(2) + p) * 2;
  }
  int64_t bias_unit(int64_t slot, int64_t site) const {
    return bias.const_data_ptr<int32_t>()[slot * num_pages.size(1) + site];
  }

  template <typename F>
  void with_arena(const F& run) const {
    if (arena.scalar_type() == at::kFloat) run(arena.const_data_ptr<float>());
    else run(arena.const_data_ptr<BFloat16>());
  }
};

// The rows of one slot: order[begin..end).
struct SlotGroup {
  int64_t slot, begin, end;
};

// Rows sorted by slot, and what the groups have at the sites [first, last), site after site: the tables hold it slot after
// slot, where the groups of one site lie far apart.
class SlotGroups {
 public:
  std::vector<int64_t> order;
  std::vector<SlotGroup> groups;  // without slot -1

  SlotGroups(const AdapterTables& tables, int64_t first, int64_t last, const int32_t* slots, int64_t rows)
      : order(rows), first_(first) {
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return slots[a] < slots[b]; });
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t slot = slots[order[i]];
      if (slot < 0) continue;
      if (groups.empty() || groups.back().slot != slot) groups.push_back({slot, i, i});
      groups.back().end = i + 1;
    }
    counts_.resize((last - first) * size()), biases_.resize(counts_.size());
    for (int64_t g = 0; g < size(); ++g)
      for (int64_t site = first; site < last; ++site) {
        counts_[at(g, site)] = static_cast<int32_t>(tables.count(groups[g].slot, site));
        biases_[at(g, site)] = static_cast<int32_t>(tables.bias_unit(groups[g].slot, site));
        most_pages_ = std::max<int64_t>(most_pages_, counts_[at(g, site)]);
      }
    units_.resize(counts_.size() * most_pages_ * 2);
    for (int64_t g = 0; g < size(); ++g)
      for (int64_t site = first; site < last; ++site)
        std::copy_n(tables.page(groups[g].slot, site, 0), 2 * counts_[at(g, site)],
                    units_.data() + at(g, site) * most_pages_ * 2);
  }

  int64_t size() const { return groups.size(); }
  int64_t most_pages() const { return most_pages_; }
  int64_t count(int64_t group, int64_t site) const { return counts_[at(group, site)]; }
  int64_t bias_unit(int64_t group, int64_t site) const { return biases_[at(group, site)]; }
  const int32_t* page(int64_t group, int64_t site, int64_t p) const {
    return units_.data() + (at(group, site) * most_pages_ + p) * 2;
  }

 private:
  int64_t at(int64_t group, int64_t site) const { return (site - first_) * size() + group; }

  int64_t first_, most_pages_ = 0;
  std::vector<int32_t> counts_, biases_, units_;
};

// A site whose outputs are the columns [column, column + width) of a layer's result.
struct SitePart {
  int64_t site, column, width;
};

// h of the sites that read one input: [row, part, page * RANKS_PER_PAGE].
struct Shrunk {
  int64_t parts = 0, ranks = 0;
  Buffer<float> values;

  void resize(int64_t rows, int64_t parts_, int64_t max_pages) {
    parts = parts_, ranks = max_pages * RANKS_PER_PAGE;
    grow(values, rows * parts * ranks);
  }
  float* at(int64_t row, int64_t part, int64_t page) {
    return values.data() + (row * parts + part) * ranks + page * RANKS_PER_PAGE;
  }
};

inline bool acts(const SlotGroups& rows, const std::vector<SitePart>& parts) {
  for (const SitePart& part : parts)
    for (int64_t g = 0; g < rows.size(); ++g)
      if (rows.count(g, part.site) > 0 || rows.bias_unit(g, part.site) >= 0) return true;
  return false;
}

constexpr int64_t BIAS = -1;  // in place of a page

// One page of one site, for the rows of its slot.
template <typename A>
struct PageItem {
  const A* data;
  const SlotGroup* group;
  int64_t part, page;
};

// h[r] = sum_i a[r, i] x[i] for the 8 ranks of a page. Asks meanwhile, line by line, for a page at `next`: adapters lie
// anywhere, and are read once.
template <typename A>
inline void shrink_row(const A* a, const A* next, const float* x, int64_t in, float* h) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  constexpr int R = 8;
#else
  constexpr int R = 4;  // as many sums as there are registers for
#endif
  for (int64_t rank = 0; rank < RANKS_PER_PAGE; rank += R, a += R * in, next += R * in)
    dots<R>(a, in, x, in, h + rank, next);
}

// x [rows, in]; this member's share of h.
template <typename A>
void shrink(const A* arena, const SlotGroups& rows, const std::vector<SitePart>& parts, const float* x, int64_t in, Shrunk& h,
            const Member& member) {
  static thread_local std::vector<PageItem<A>> items;  // which keeps its memory
  items.clear();
  int64_t index = 0;
  for (int64_t g = 0; g < rows.size(); ++g)
    for (int64_t part = 0; part < static_cast<int64_t>(parts.size()); ++part) {
      const int64_t site = parts[part].site, count = rows.count(g, site);
      for (int64_t page = 0; page < count; ++page)
        if (index++ % member.size == member.rank)
          items.push_back({arena + rows.page(g, site, page)[0] * UNIT, &rows.groups[g], part, page});
    }
  for (size_t n = 0; n < items.size(); ++n) {
    const PageItem<A>& item = items[n];
    const A* next = items[std::min(n + 1, items.size() - 1)].data;
    for (int64_t i = item.group->begin; i < item.group->end; ++i, next = item.data) {
      const int64_t row = rows.order[i];
      shrink_row(item.data, next, x + row * in, in, h.at(row, item.part, item.page));
    }
  }
}

// y[0..size) += sum_r h[r] b[r], with b's rows `stride` apart. Asks meanwhile for as much at `next`, rows `next_stride` apart.
template <typename A>
inline void expand_row(float* y, const float* h, const A* b, int64_t stride, int64_t size, const A* next, int64_t next_stride) {
  int64_t o = 0;
  for (; o + WIDTH <= size; o += WIDTH) {
    Floats to = load(y + o);
#pragma GCC unroll 8
    for (int64_t r = 0; r < RANKS_PER_PAGE; ++r) {
      if (o * sizeof(A) % LINE == 0) __builtin_prefetch(next + r * next_stride + o, 0, 2);
      to = fma(splat(h[r]), load(b + r * stride + o), to);
    }
    store(y + o, to);
  }
  for (; o < size; ++o)
    for (int64_t r = 0; r < RANKS_PER_PAGE; ++r) y[o] = __builtin_fmaf(h[r], to_float(b[r * stride + o]), y[o]);
}

// Adds to the columns [first, last) of y [rows, y_stride].
template <typename A>
void expand(const A* arena, const SlotGroups& rows, const std::vector<SitePart>& parts, Shrunk& h, float* y, int64_t y_stride,
            int64_t first, int64_t last) {
  static thread_local std::vector<PageItem<A>> items;  // which keeps its memory
  items.clear();
  for (int64_t g = 0; g < rows.size(); ++g)
    for (int64_t part = 0; part < static_cast<int64_t>(parts.size()); ++part) {
      const SlotGroup& group = rows.groups[g];
      const SitePart& at = parts[part];
      const int64_t begin = std::max(first, at.column), end = std::min(last, at.column + at.width);
      if (begin >= end) continue;
      const int64_t count = rows.count(g, at.site);
      for (int64_t page = 0; page < count; ++page)
        items.push_back({arena + rows.page(g, at.site, page)[1] * UNIT + begin - at.column, &group, part, page});
      if (const int64_t unit = rows.bias_unit(g, at.site); unit >= 0)
        items.push_back({arena + unit * UNIT + begin - at.column, &group, part, BIAS});
    }
  for (size_t n = 0; n < items.size(); ++n) {
    const PageItem<A>&item = items[n], &following = items[std::min(n + 1, items.size() - 1)];
    const SitePart& at = parts[item.part];
    const int64_t begin = std::max(first, at.column), size = std::min(last, at.column + at.width) - begin;
    for (int64_t i = item.group->begin; i < item.group->end; ++i) {
      const int64_t row = rows.order[i];
      float* to = y + row * y_stride + begin;
      if (item.page != BIAS)
        expand_row(to, h.at(row, item.part, item.page), item.data, at.width, size, following.data, parts[following.part].width);
      else
        for (int64_t o = 0; o < size; ++o) to[o] += to_float(item.data[o]);
    }
  }
}

// y [rows, out] += the products of one site; x [rows, in].
inline void low_rank_add_rows(const AdapterTables& tables, int64_t site, const int32_t* slots, const float* x, int64_t rows,
                              int64_t in, float* y, int64_t out) {
  const SlotGroups groups(tables, site, site + 1, slots, rows);
  const std::vector<SitePart> parts{{site, 0, out}};
  if (!acts(groups, parts)) return;
  Shrunk h;
  h.resize(rows, 1, groups.most_pages());
  tables.with_arena([&](const auto* arena) {
    with_team(rows * (in + out) < (1 << 13), [&](const Member& member) {
      shrink(arena, groups, parts, x, in, h, member);
      member.wait();
      const auto [first, last] = member.share(out, WIDTH);
      expand(arena, groups, parts, h, y, out, first, last);
    });
  });
}

// y[t] += B^T A[token[t]] at the embedding site, whose A pages are [vocab, 8].
inline void embedding_add_rows(const AdapterTables& tables, int64_t site, const int32_t* slots, const int64_t* ids,
                               int64_t rows, float* y, int64_t out) {
  tables.with_arena([&]<typename A>(const A* arena) {
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t slot = slots[t], count = slot < 0 ? 0 : tables.count(slot, site);
      for (int64_t p = 0; p < count; ++p) {
        const int32_t* units = tables.page(slot, site, p);
        float h[RANKS_PER_PAGE];
        for (int64_t r = 0; r < RANKS_PER_PAGE; ++r) h[r] = to_float(arena[units[0] * UNIT + ids[t] * RANKS_PER_PAGE + r]);
        const A* b = arena + units[1] * UNIT;
        expand_row(y + t * out, h, b, out, out, b, out);
      }
    }
  });
}

}  // namespace polyhead
