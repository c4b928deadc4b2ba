// Attention over paged keys and values, for prefill and decode rows alike.
//
// Pages are [num_blocks, G, block, D] to their readers; keys may lie transposed, [.., D, block] in memory, which is how
// this device's pool keeps them: the scores of a block are then one vector of keys, with no sum across a vector.
#pragma once

#include <optional>

#include "attention_tiles.h"
#include "attention_vectors.h"
#include "team.h"

namespace polyhead {

struct AttentionScratches {
  VectorScratch vectors;
  TileScratch unit;
};

// Attends on the tile unit where that can be, else on vectors.
class AttentionWorker {
 public:
  AttentionWorker(const LayerPages& pages, const AttentionShape& s, AttentionScratches& scratch, float* out)
      : on_unit_(attends_on_unit(pages, s)), scratch_(scratch), out_(out) {}

  template <typename K, typename Ahead>
  void attend(const AttentionItem& item, const K* keys, const K* values, const Ahead& ahead) {
#if defined(POLYHEAD_BFLOAT16_TILES)
    if constexpr (std::is_same_v<K, BFloat16>)
      if (on_unit_) {
        if (const int64_t rows = tile_rows(item); rows != unit_rows_) unit_.emplace(unit_rows_ = rows);
        attend_on_unit(item, keys, values, scratch_.unit, ahead, out_);
        return;
      }
#endif
    attend_on_vectors(item, keys, values, scratch_.vectors, ahead, out_);
  }

 private:
  const bool on_unit_;
  AttentionScratches& scratch_;
  float* const out_;
#if defined(POLYHEAD_BFLOAT16_TILES)
  std::optional<TileUnit> unit_;
  int64_t unit_rows_ = 0;
#endif
};

// Takes items from `next` until none is left.
inline void attend_tiles(const LayerPages& pages, const float* q, int64_t q_stride, const SequencePages& sequences,
                         const int64_t* positions, const std::vector<QueryTile>& tiles, const AttentionShape& s,
                         Counter& next, AttentionScratches& scratch, const Member& member, float* out) {
  const int64_t num_items = static_cast<int64_t>(tiles.size()) * s.kv_heads;
  const auto item_at = [&](int64_t index) {
    return AttentionItem(s, q, q_stride, positions, sequences, tiles[index / s.kv_heads], index % s.kv_heads);
  };
  pages.with_data([&](const auto* keys, const auto* values) {
    // Where there are tiles enough for all, a thread takes all heads of one: they lie side by side in the pages.
    const int64_t run = static_cast<int64_t>(tiles.size()) >= 4 * member.size ? s.kv_heads : 1;
    auto take = [&, left = int64_t{0}](int64_t last) mutable {
      if (left-- > 0) return last + 1;
      left = run - 1;
      return next.take() * run;
    };
    int64_t index = take(0);
    if (index >= num_items) return;
    AttentionWorker worker(pages, s, scratch, out);
    for (int64_t n = 0; n < PAGES_AHEAD; ++n)
      if (const auto* page = item_at(index).page_in_turn(keys, values, n)) prefetch(page, s.page() * pages.keys.element_size());
    while (index < num_items) {
      const int64_t following = take(index);
      const AttentionItem item = item_at(index), after = item_at(std::min(following, num_items - 1));
      worker.attend(item, keys, values, [&](int64_t n) {
        const auto* page = item.page_in_turn(keys, values, n);
        if (!page) page = after.page_in_turn(keys, values, n - 2 * item.num_blocks);
        return page ? page : keys;  // where nothing follows, any page will do
      });
      index = following;
    }
  });
}

}  // namespace polyhead
