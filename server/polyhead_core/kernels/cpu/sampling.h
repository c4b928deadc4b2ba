// Of each row of logits one token, drawn by its own parameters: temperature, top_k, top_p, min_p. Nothing is sorted: what
// top_k and top_p keep is everything above a cut and the first of its equals, and the cut is found digit by digit among the
// few entries near the largest logit.
#pragma once

#include <limits>

#include "team.h"
#include "vector.h"

namespace polyhead {

struct Draw {
  float temperature;  // > 0
  int64_t top_k;      // 0: all
  double top_p;       // 1: all
  float min_p;        // 0: all
  double uniform;     // in [0, 1)
};

class Sampler {
 public:
  int64_t draw(const float* logits, int64_t size, const Draw& how) {
    x_ = logits, count_ = size, ids_known_ = false;
    largest_ = in_lanes(logits, size, logits[0], [](float a, float b) { return b > a ? b : a; });
    weigh(how.temperature);
    if (how.top_k > 0 && how.top_k < size) keep_first(static_cast<double>(how.top_k), 1.0f, [](int64_t) { return 1.0; });
    if (how.top_p < 1.0) {
      const double wanted = std::max(how.top_p * sum(weights_.data(), count_), std::numeric_limits<double>::min());
      keep_first(wanted, how.temperature, [this](int64_t i) { return static_cast<double>(weights_[i]); });
    }
    if (how.min_p > 0.0f) drop_below(how.min_p);
    const int64_t chosen = choose(how.uniform);
    return ids_known_ ? ids_[chosen] : chosen;
  }

 private:
  static constexpr int64_t BLOCK = 512;  // weights of one partial sum
  static constexpr int64_t PIECE = 128;  // entries that are passed over together where none is near

  // Entries with keys above `key` are kept, and the first `ties` of those with this one.
  struct Cut {
    uint32_t key;
    int64_t ties;
  };
  struct Bin {
    double amount;
    int64_t count;
  };

  // Ascends as the logit does; 0 and -0 are equal.
  static uint32_t key_of(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x + 0.0f);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  }

  static double sum(const float* x, int64_t size) {
    constexpr int64_t LANES = 16;
    double lanes[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
      for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += static_cast<double>(x[i + lane]);
    double total = 0;
    for (double lane : lanes) total += lane;
    for (; i < size; ++i) total += static_cast<double>(x[i]);
    return total;
  }

  // exp((x - largest) / temperature), and 0 below exp(-87).
  void weigh(float temperature) {
    grow(weights_, count_);
    const float* const x = x_;
    const float largest = largest_;
    float* const to = weights_.data();
    for (int64_t i = 0; i < count_; ++i) {
      const float exponent = (x[i] - largest) / temperature, weight = exp_nonpositive(exponent);
      to[i] = exponent < -87.0f ? 0.0f : weight;
    }
  }

  void drop_below(float least) {
    float* const weights = weights_.data();
    for (int64_t i = 0; i < count_; ++i) weights[i] = weights[i] >= least ? weights[i] : 0.0f;
  }

  // Keeps an entry, in the order of falling logits and then of rising ids, while the amounts before it are below `wanted`.
  // Entries near the largest logit, on the scale of what makes a difference, are looked at first.
  template <typename Amount>
  void keep_first(double wanted, float scale, const Amount& amount) {
    for (float distance : {5.0f, 10.0f, 20.0f}) {
      if (near(largest_ - distance * scale, amount) >= wanted) return keep(cut_at(wanted, amount));
    }
    near(-INFINITY, amount);
    keep(cut_at(wanted, amount));
  }

  // The entries of at least `least` and the sum of their amounts.
  template <typename Amount>
  double near(float least, const Amount& amount) {
    grow(near_, count_);
    int32_t* const to = near_.data();
    const float* const x = x_;
    int64_t found = 0;
    for (int64_t begin = 0; begin < count_; begin += PIECE) {
      const int64_t end = std::min(begin + PIECE, count_);
      int32_t any = 0;
      for (int64_t i = begin; i < end; ++i) any |= x[i] >= least;
      if (any == 0) continue;
      for (int64_t i = begin; i < end; ++i) {
        to[found] = static_cast<int32_t>(i);
        found += x[i] >= least;
      }
    }
    num_near_ = found;
    double total = 0;
    for (int64_t j = 0; j < found; ++j) total += amount(to[j]);
    return total;
  }

  template <typename Amount>
  Cut cut_at(double wanted, const Amount& amount) {
    uint32_t prefix = 0, known = 0;
    double before = 0;
    Bin last{};
    for (const auto& [shift, bits] : {std::pair{21, 11}, {10, 11}, {0, 10}}) {
      const uint32_t digit = (1u << bits) - 1;
      bins_.assign(digit + 1, Bin{});
      for (int64_t j = 0; j < num_near_; ++j) {
        const uint32_t key = key_of(x_[near_[j]]);
        if ((key & known) != prefix) continue;
        Bin& bin = bins_[key >> shift & digit];
        bin.amount += amount(near_[j]);
        ++bin.count;
      }
      uint32_t at = digit;
      // Where rounding leaves some of it wanting, the last one: all are kept.
      for (; at > 0 && before + bins_[at].amount < wanted; --at) before += bins_[at].amount;
      last = bins_[at];
      prefix |= at << shift;
      known |= digit << shift;
    }
    const double each = last.amount / static_cast<double>(last.count);
    const bool met = last.count > 0 && before + last.amount >= wanted;
    return {prefix, met ? static_cast<int64_t>(std::ceil((wanted - before) / each)) : last.count};
  }

  void keep(Cut cut) {
    grow(ids_, num_near_);
    grow(kept_, num_near_);
    int64_t count = 0;
    for (int64_t j = 0; j < num_near_; ++j) {
      const int32_t i = near_[j];
      const float x = x_[i];
      const uint32_t key = key_of(x);
      if (key < cut.key || (key == cut.key && cut.ties-- <= 0)) continue;
      // Never behind what is still to be read.
      ids_[count] = ids_known_ ? ids_[i] : i;
      kept_[count] = x;
      weights_[count++] = weights_[i];
    }
    x_ = kept_.data(), count_ = count, ids_known_ = true;
  }

  // The first entry with whose weight the sum exceeds `uniform` times all.
  int64_t choose(double uniform) {
    double total = 0;
    sums_.clear();
    for (int64_t begin = 0; begin < count_; begin += BLOCK) {
      sums_.push_back(sum(weights_.data() + begin, std::min(BLOCK, count_ - begin)));
      total += sums_.back();
    }
    // Below the total, which the sums reach.
    const double target = std::min(uniform * total, std::nextafter(total, 0.0));
    double before = 0;
    int64_t block = 0;
    while (before + sums_[block] <= target) before += sums_[block++];
    const int64_t end = std::min((block + 1) * BLOCK, count_);
    int64_t chosen = block * BLOCK;
    for (int64_t i = chosen; i < end; ++i) {
      if (weights_[i] == 0.0f) continue;
      chosen = i;
      before += static_cast<double>(weights_[i]);
      if (before > target) break;
    }
    return chosen;
  }

  const float* x_ = nullptr;
  float largest_ = 0;
  int64_t count_ = 0, num_near_ = 0;
  bool ids_known_ = false;  // else an entry's place is its id
  Buffer<float> weights_, kept_;
  Buffer<int32_t> ids_, near_;
  std::vector<Bin> bins_;
  std::vector<double> sums_;
};

inline void draw_rows(const std::vector<const float*>& rows, int64_t size, const std::vector<Draw>& how, int64_t* out) {
  const auto count = static_cast<int64_t>(rows.size());
  Counter next;
  with_team(count == 1, [&](const Member&) {
    thread_local Sampler sampler;
    for (int64_t r = next.take(); r < count; r = next.take()) out[r] = sampler.draw(rows[r], size, how[r]);
  });
}

}  // namespace polyhead
