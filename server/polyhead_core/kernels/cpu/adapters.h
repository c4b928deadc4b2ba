// Low-rank products of many adapters in one batch: y += B^T (A x) over the rank pages of each row's slot.
//
// Rows are sorted by slot, so that a page is read once for all rows of its adapter. Each row's sums are in an order of
// its own.
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
  std::vector<int64_t> group_of;  // of each row; -1: none

  SlotGroups(const AdapterTables& tables, int64_t first, int64_t last, const int32_t* slots, int64_t rows)
      : order(rows), group_of(rows, -1), first_(first) {
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return slots[a] < slots[b]; });
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t slot = slots[order[i]];
      if (slot < 0) continue;
      if (groups.empty() || groups.back().slot != slot) groups.push_back({slot, i, i});
      groups.back().end = i + 1;
      group_of[order[i]] = size() - 1;
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

inline bool acts(const SlotGroups& rows, const SitePart& part, int64_t group) {
  return rows.count(group, part.site) > 0 || rows.bias_unit(group, part.site) >= 0;
}

// Memory that is read next, asked for evenly over `steps` steps of other work: adapters lie anywhere, and are read once.
class Upcoming {
 public:
  Upcoming() = default;
  Upcoming(const void* data, int64_t bytes, int64_t steps)
      : next_(static_cast<const char*>(data)), lines_((bytes + steps * LINE - 1) / (steps * LINE)) {}

  void ask() {
    for (int64_t line = 0; line < lines_; ++line, next_ += LINE) __builtin_prefetch(next_, 0, READ_ONCE);
  }

 private:
  const char* next_ = nullptr;
  int64_t lines_ = 0;
};

// Rows of one adapter that are computed together: its weights are brought to float once for all of them.
constexpr int ROWS_AT_ONCE = DOTS / 2;

// h[q][r] = sum_i a[r, i] x[q][i] for the 8 ranks of a page, in the steps of shrink_steps<Q>(in).
template <int Q, typename A>
inline void shrink_rows(const A* a, const float* const* x, int64_t in, float* const* h, Upcoming& upcoming) {
  constexpr int R = DOTS / Q;
  for (int64_t rank = 0; rank < RANKS_PER_PAGE; rank += R, a += R * in) {
    float* to[Q];
    for (int q = 0; q < Q; ++q) to[q] = h[q] + rank;
    dots<R, Q>(a, in, x, in, to, [&] { upcoming.ask(); });
  }
}
template <int Q>
inline int64_t shrink_steps(int64_t in) {
  return std::max<int64_t>(1, in / (2 * WIDTH) * (RANKS_PER_PAGE * Q / DOTS));
}

// y[q][0..size) (+)= sum_r h[q][r] b[r], with b's rows `stride` apart, in the steps of expand_steps(size).
template <int Q, typename A>
inline void expand_rows(float* const* y, const float* const* h, const A* b, int64_t stride, int64_t size, bool accumulate,
                        Upcoming& upcoming) {
  int64_t o = 0;
  for (; o + WIDTH <= size; o += WIDTH) {
    upcoming.ask();
    Floats to[Q];
    for (int q = 0; q < Q; ++q) to[q] = accumulate ? load(y[q] + o) : splat(0.0f);
#pragma GCC unroll 8
    for (int64_t r = 0; r < RANKS_PER_PAGE; ++r) {
      const Floats weights = load(b + r * stride + o);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) to[q] = fma(splat(h[q][r]), weights, to[q]);
    }
    for (int q = 0; q < Q; ++q) store(y[q] + o, to[q]);
  }
  for (; o < size; ++o)
    for (int q = 0; q < Q; ++q) {
      if (!accumulate) y[q][o] = 0;
      for (int64_t r = 0; r < RANKS_PER_PAGE; ++r) y[q][o] = __builtin_fmaf(h[q][r], to_float(b[r * stride + o]), y[q][o]);
    }
}
inline int64_t expand_steps(int64_t size) { return std::max<int64_t>(1, size / WIDTH); }

// Calls run<Q>(first) for the numbers [begin, end), Q of them from `first` on.
template <typename Run>
inline void by_rows(int64_t begin, int64_t end, const Run& run) {
  for (; begin + ROWS_AT_ONCE <= end; begin += ROWS_AT_ONCE) run.template operator()<ROWS_AT_ONCE>(begin);
  for (; begin < end; ++begin) run.template operator()<1>(begin);
}

// What a step's adapters add to one layer's result: sum over pages of B^T (A x), and their biases.
template <typename A>
class Deltas {
 public:
  // x [rows, in]; values [rows, stride] take the results, or have them added to what they hold.
  Deltas(const A* arena, const SlotGroups& rows, const std::vector<SitePart>& parts, const float* x, int64_t in, float* values,
         int64_t stride, bool accumulate)
      : arena_(arena), rows_(rows), parts_(parts), x_(x), in_(in), values_(values), stride_(stride), accumulate_(accumulate),
        items_(items_of_thread()) {
    items_.clear();
    for (int64_t g = 0; g < rows.size(); ++g)
      for (const SitePart& part : parts) {
        if (!acts(rows, part, g)) continue;
        const SlotGroup& group = rows.groups[g];
        const int64_t columns = std::max(COLUMNS, 8 * in);
        for (int64_t begin = group.begin; begin < group.end; begin += ROWS)
          for (int64_t first = 0; first < part.width; first += columns)
            items_.push_back({g, &part, begin, std::min(begin + ROWS, group.end), first,
                              std::min(first + columns, part.width)});
      }
    empty_ = items_.empty();
  }

  bool empty() const { return empty_; }

  // Takes items from `counter` until none is left.
  void compute(Counter& counter) const {
    const int64_t count = items_.size();
    for (int64_t index = counter.take(), following; index < count; index = following) {
      following = counter.take();
      compute(items_[index], items_[std::min(following, count - 1)]);
    }
  }

  // y [rows, stride] += the values of one row.
  void add_to(float* y, int64_t row) const {
    for (const SitePart& part : parts_) {
      const float* from = of(row, part);
      if (!from) continue;
      float* to = y + row * stride_ + part.column;
      for (int64_t o = 0; o < part.width; ++o) to[o] += from[o];
    }
  }

  // What one row gets at its n-th part; nullptr: nothing.
  const float* of(int64_t row, size_t n) const { return of(row, parts_[n]); }

 private:
  // Of an item, at most: threads share what many rows of one adapter cost, and a wide site, each with an h of its own.
  static constexpr int64_t ROWS = 32, COLUMNS = 8192;

  // The rows order[begin..end) of a group, and the columns [first, last) of one site.
  struct Item {
    int64_t group;
    const SitePart* part;
    int64_t begin, end, first, last;
  };

  const float* of(int64_t row, const SitePart& part) const {
    const int64_t group = empty() ? -1 : rows_.group_of[row];
    return group >= 0 && acts(rows_, part, group) ? values_ + row * stride_ + part.column : nullptr;
  }

  static std::vector<Item>& items_of_thread() {
    static thread_local std::vector<Item> items;  // which keeps its memory
    return items;
  }

  int64_t count(const Item& item) const { return rows_.count(item.group, item.part->site); }
  const A* a_page(const Item& item, int64_t p) const { return arena_ + rows_.page(item.group, item.part->site, p)[0] * UNIT; }
  const A* b_page(const Item& item, int64_t p) const {
    return arena_ + rows_.page(item.group, item.part->site, p)[1] * UNIT + item.first;
  }
  float* place(const Item& item, int64_t i) const {
    return values_ + rows_.order[i] * stride_ + item.part->column + item.first;
  }

  // Each page asks for the one that is read after it.
  void compute(const Item& item, const Item& following) const {
    static thread_local Buffer<float> h, sums;  // [row, rank], [row, column]
    const int64_t pages = count(item), ranks = pages * RANKS_PER_PAGE, width = item.part->width, size = item.last - item.first;
    grow(h, ROWS * ranks);
    if (accumulate_) grow(sums, ROWS * size);
    const auto result = [&](int64_t i) { return accumulate_ ? sums.data() + (i - item.begin) * size : place(item, i); };
    const auto h_of = [&](int64_t i, int64_t p) { return h.data() + (i - item.begin) * ranks + p * RANKS_PER_PAGE; };
    const int64_t a_bytes = RANKS_PER_PAGE * in_ * sizeof(A);
    const int64_t b_bytes = (size == width ? RANKS_PER_PAGE : 1) * size * sizeof(A);
    for (int64_t p = 0; p < pages; ++p) {
      by_rows(item.begin, item.end, [&]<int Q>(int64_t first) {
        const float* x[Q];
        float* to[Q];
        for (int q = 0; q < Q; ++q) x[q] = x_ + rows_.order[first + q] * in_, to[q] = h_of(first + q, p);
        Upcoming upcoming;
        if (first == item.begin)
          upcoming = p + 1 < pages ? Upcoming(a_page(item, p + 1), a_bytes, shrink_steps<Q>(in_))
                                   : Upcoming(b_page(item, 0), b_bytes, shrink_steps<Q>(in_));
        shrink_rows<Q>(a_page(item, p), x, in_, to, upcoming);
      });
    }
    for (int64_t p = 0; p < pages; ++p) {
      by_rows(item.begin, item.end, [&]<int Q>(int64_t first) {
        const float* from[Q];
        float* to[Q];
        for (int q = 0; q < Q; ++q) from[q] = h_of(first + q, p), to[q] = result(first + q);
        Upcoming upcoming;
        if (first == item.begin && p + 1 < pages) upcoming = Upcoming(b_page(item, p + 1), b_bytes, expand_steps(size));
        else if (first == item.begin && count(following)) upcoming = Upcoming(a_page(following, 0), a_bytes, expand_steps(size));
        expand_rows<Q>(to, from, b_page(item, p), width, size, p > 0, upcoming);
      });
    }
    if (const int64_t unit = rows_.bias_unit(item.group, item.part->site); unit >= 0) {
      const A* bias = arena_ + unit * UNIT + item.first;
      for (int64_t i = item.begin; i < item.end; ++i) {
        float* to = result(i);
        for (int64_t o = 0; o < size; ++o) to[o] = (pages ? to[o] : 0.0f) + to_float(bias[o]);
      }
    }
    // As one sum, as where it is added to a result that comes later: both ways give the same bits.
    for (int64_t i = item.begin; accumulate_ && i < item.end; ++i) {
      float *to = place(item, i), *from = result(i);
      for (int64_t o = 0; o < size; ++o) to[o] += from[o];
    }
  }

  const A* arena_;
  const SlotGroups& rows_;
  const std::vector<SitePart>& parts_;
  const float* x_;
  int64_t in_;
  float* values_;
  int64_t stride_;
  bool accumulate_;
  std::vector<Item>& items_;  // this thread's, until its next Deltas
  bool empty_;
};

// y [rows, out] += the products of one site; x [rows, in].
inline void low_rank_add_rows(const AdapterTables& tables, int64_t site, const int32_t* slots, const float* x, int64_t rows,
                              int64_t in, float* y, int64_t out) {
  const SlotGroups groups(tables, site, site + 1, slots, rows);
  const std::vector<SitePart> parts{{site, 0, out}};
  Counter counter;
  tables.with_arena([&](const auto* arena) {
    with_team(rows * (in + out) < (1 << 13), [&](const Member&) {
      Deltas(arena, groups, parts, x, in, y, out, true).compute(counter);
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
        Upcoming none;
        const float* from = h;
        float* const to = y + t * out;
        expand_rows<1>(&to, &from, arena + units[1] * UNIT, out, out, true, none);
      }
    }
  });
}

}  // namespace polyhead
