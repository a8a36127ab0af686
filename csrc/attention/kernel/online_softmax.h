// Softmax over scores that lie by head. For the files of one instruction set only: all is local to the file that
// includes it.
#pragma once

#include "attention/kernel/attend.h"

namespace neo {
namespace {

// Scores [head][token] of one chunk into weights; running maximum and sum of each head follow, and the accumulated
// values are rescaled where the maximum grew. Scores are turned into log2 units by `scale`.
template <class Tiles>
void online_softmax(Tiles& tiles, int num_heads, int num_tokens, float scale) {
  using Simd = typename Tiles::Simd;
  using Vec = typename Simd::Vec;
  constexpr int kWidth = Simd::kWidth;
  const int padded = (num_tokens + kWidth - 1) / kWidth * kWidth;
  for (int h = 0; h < num_heads; ++h) {
    float* scores = tiles.scores + h * kChunk;
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

}  // namespace
}  // namespace neo
