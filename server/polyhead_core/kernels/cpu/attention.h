// Attention over paged keys and values, for prefill and decode rows alike.
//
// Pages are [num_blocks, G, block, D] to their readers; keys may lie transposed, [.., D, block] in memory, which is how
// this device's pool keeps them: the scores of a block are then one vector of keys, with no sum across a vector.
#pragma once

#include <atomic>
#include <optional>

#include "attention_tiles.h"
#include "attention_vectors.h"

namespace polyhead {

struct AttentionScratches {
  AttentionScratch vectors;
  TileScratch unit;
};

// Takes items from `next` until none is left.
inline void attend_tiles(const LayerPages& pages, const float* q, int64_t q_stride, const int32_t* block_tables,
                         const int64_t* positions, const std::vector<QueryTile>& tiles, const AttentionShape& s,
                         std::atomic<int64_t>& next, AttentionScratches& scratch, float* out) {
  const int64_t num_items = static_cast<int64_t>(tiles.size()) * s.kv_heads;
  const auto take = [&]() -> std::optional<AttentionItem> {
    const int64_t index = next.fetch_add(1);
    if (index >= num_items) return std::nullopt;
    return AttentionItem(s, q, q_stride, positions, block_tables, tiles[index / s.kv_heads], index % s.kv_heads);
  };
  const bool on_unit = attends_on_unit(pages, s);
  std::optional<TileUnit> unit;
  int64_t unit_rows = 0;
  pages.with_data([&](const auto* keys, const auto* values) {
    std::optional<AttentionItem> item = take();
    for (int64_t n = 0; item && n < PAGES_AHEAD; ++n)
      prefetch(item->page_in_turn(keys, values, n), s.page() * pages.keys.element_size());
    while (item) {
      const std::optional<AttentionItem> following = take();
      const auto ahead = [&](int64_t n) {
        const auto* page = item->page_in_turn(keys, values, n);
        if (!page && following) page = following->page_in_turn(keys, values, n - 2 * item->num_blocks);
        return page ? page : keys;  // where nothing follows, any page will do
      };
#if defined(POLYHEAD_TILES)
      if constexpr (std::is_same_v<decltype(keys), const BFloat16*>)
        if (on_unit) {
          if (const int64_t rows = tile_rows(*item); rows != unit_rows) unit.emplace(unit_rows = rows);
          attend_on_unit(*item, keys, values, scratch.unit, ahead, out);
          item.reset();
          if (following) item.emplace(*following);
          continue;
        }
#endif
      attend(*item, keys, values, scratch.vectors, ahead, out);
      item.reset();
      if (following) item.emplace(*following);
    }
  });
}

}  // namespace polyhead
