// Decode attention over one share: online softmax, one pass over K and V, written once for all instruction sets.
// `Tiles` supplies the two products over one (block, kv head) tile and the vectors that the softmax uses. For the files
// of one instruction set only: all is local to the file that includes it.
#pragma once

#include "attention/kernel/elements.h"
#include "attention/kernel/stream.h"
#include "attention/share.h"

namespace neo {
namespace {

constexpr int kMaxBlock = 32;
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.69314718f;
constexpr float kLowest = -3.0e38f;  // below any score; not infinity, so that differences stay numbers

// Writes the newest token's K and V, which came with the lap, to its place in the tile. Its pair partner is zeroed: the
// products read pairs, and what an unwritten place holds may not be a number.
template <class Element, int kDim>
void append_token(const Element* key, const Element* value, Element* tile, int block_size, int token) {
  Element* k = tile + token * kDim;
  Element* v = tile + block_size * kDim;
  for (int d = 0; d < kDim; ++d) k[d] = key[d];
  if constexpr (kPairedV<Element>) {
    Element* pairs = v + token / 2 * 2 * kDim;
    for (int d = 0; d < kDim; ++d) {
      pairs[2 * d + token % 2] = value[d];
      if (token % 2 == 0) pairs[2 * d + 1] = Element{};
    }
  } else {
    for (int d = 0; d < kDim; ++d) v[token * kDim + d] = value[d];
  }
}

// Scores [head][token] of one tile into weights; running maximum and sum of each head follow, and the accumulated
// values are rescaled where the maximum grew. Scores are turned into log2 units by `scale`.
template <class Tiles>
void online_softmax(Tiles& tiles, int num_heads, int num_tokens, float scale) {
  using Simd = typename Tiles::Simd;
  using Vec = typename Simd::Vec;
  constexpr int kWidth = Simd::kWidth;
  const int padded = (num_tokens + kWidth - 1) / kWidth * kWidth;
  for (int h = 0; h < num_heads; ++h) {
    float* scores = tiles.scores + h * kMaxBlock;
    for (int t = num_tokens; t < padded; ++t) scores[t] = kLowest;
    const Vec factor = Simd::broadcast(scale);
    Vec highest = Simd::broadcast(kLowest);
    for (int t = 0; t < num_tokens; t += kWidth) {
      const Vec s = Simd::max(Simd::mul(Simd::load(scores + t), factor), Simd::broadcast(kLowest));
      Simd::store(scores + t, s);
      highest = Simd::max(highest, s);
    }
    const float tile_max = Simd::reduce_max(highest);
    if (tile_max > tiles.maxima[h]) {
      const Vec shrink = Simd::exp2(Simd::broadcast(tiles.maxima[h] - tile_max));
      tiles.maxima[h] = tile_max;
      tiles.rescale(h, shrink);
    }
    const Vec max = Simd::broadcast(tiles.maxima[h]);
    Vec sum = Simd::load(tiles.sums + h * kWidth);
    for (int t = 0; t < num_tokens; t += kWidth) {
      const Vec weight = Simd::exp2(Simd::sub(Simd::load(scores + t), max));
      sum = Simd::add(sum, weight);
      tiles.store_weights(h, t, weight);
    }
    Simd::store(tiles.sums + h * kWidth, sum);
  }
}

// Output and log-sum-exp of a finished item, or its partial result.
template <class Tiles>
void finish_item(const Tiles& tiles, const Share& share, const Item& item) {
  using Simd = typename Tiles::Simd;
  using Element = typename Tiles::Element;
  constexpr int kDim = Tiles::kDim;
  const Geometry& g = share.lap->geometry;
  const int group = g.num_query_heads / g.num_kv_heads;
  float* slot = item.partial < 0 ? nullptr : share.partials + item.partial * partial_floats(g);
  for (int h = 0; h < group; ++h) {
    const float* values = tiles.values + h * kDim;
    const float sum = Simd::reduce_add(Simd::load(tiles.sums + h * Simd::kWidth));
    if (slot) {
      for (int d = 0; d < kDim; d += Simd::kWidth) Simd::store(slot + h * kDim + d, Simd::load(values + d));
      slot[group * kDim + h] = tiles.maxima[h];
      slot[group * kDim + group + h] = sum;
      continue;
    }
    const int64_t query_head = static_cast<int64_t>(item.row) * g.num_query_heads + item.kv_head * group + h;
    Element* out = static_cast<Element*>(share.memory->out) + query_head * kDim;
    const typename Simd::Vec factor = Simd::broadcast(1.0f / sum);
    for (int d = 0; d < kDim; d += Simd::kWidth) Simd::store(out + d, Simd::mul(Simd::load(values + d), factor));
    if (share.memory->lse) share.memory->lse[query_head] = (tiles.maxima[h] + __builtin_log2f(sum)) * kLn2;
  }
}

template <class Tiles>
void attend(const Share& share) {
  using Element = typename Tiles::Element;
  constexpr int kDim = Tiles::kDim;
  const LapShape& lap = *share.lap;
  const Geometry& g = lap.geometry;
  const int group = g.num_query_heads / g.num_kv_heads;
  const int64_t tile_elements = 2LL * g.block_size * kDim;

  Tiles tiles(share.scratch, group, g.block_size);
  TileWalk walk(share, tile_elements * sizeof(Element));
  Prefetch prefetch(share, tile_elements * sizeof(Element));
  for (const Item* item = share.items; item != share.items + share.num_items; ++item) {
    const int64_t row_heads = g.num_query_heads + 2LL * g.num_kv_heads;
    const Element* row = static_cast<const Element*>(share.memory->qkv) + item->row * row_heads * kDim;
    tiles.start_item(row + static_cast<int64_t>(item->kv_head) * group * kDim);
    for (int token = item->first_token; token < item->stop_token; token += g.block_size) {
      const int left = item->stop_token - token;
      const int num_tokens = left < g.block_size ? left : g.block_size;
      Element* tile = reinterpret_cast<Element*>(const_cast<char*>(walk.next()));
      if (left <= g.block_size && item->stop_token == lap.lengths[item->row]) {
        const Element* key = row + (g.num_query_heads + item->kv_head) * static_cast<int64_t>(kDim);
        append_token<Element, kDim>(key, key + static_cast<int64_t>(g.num_kv_heads) * kDim, tile, g.block_size,
                                    num_tokens - 1);
      }
      prefetch.start_tile();
      tiles.score(tile, num_tokens, prefetch);
      online_softmax(tiles, group, num_tokens, lap.scale * kLog2E);
      tiles.accumulate(tile + g.block_size * kDim, num_tokens, prefetch);
      prefetch.finish_tile();
    }
    finish_item(tiles, share, *item);
  }
}

}  // namespace
}  // namespace neo
