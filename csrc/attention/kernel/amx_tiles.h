// Attention to a chunk with AMX, for 4, 8 or 16 heads at once. K lies as AMX reads a left operand, V as it reads a
// right one; so the scores come out [token][head], and the weights have to go in [head][token]. For the files of one
// instruction set only: all is local to the file that includes it.
#pragma once

#include <immintrin.h>

#include "attention/kernel/amx_softmax.h"
#include "attention/kernel/attend.h"
#include "attention/kernel/avx512.h"
#include "attention/kernel/line_queue.h"
#include "attention/kernel/scratch.h"

namespace neo {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int num_rows, int num_bytes) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    row_bytes[tile] = static_cast<uint16_t>(num_bytes);
  }
};

// Stores that tiles are loaded from must be done; the intrinsics do not say that they read memory.
inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

// Tile registers, which the intrinsics want as literals: 0 and 1 scores of 16 tokens each, 2 K, 3 queries, 4 weights,
// 5 V, 6 and 7 weighted values. A run is the heads that are attended to at once, padded with heads whose query is zero.
template <int kHeadDim, int kRun>
class AmxTiles {
 public:
  using Element = BF16;
  using Simd = Avx512;
  static constexpr int kDim = kHeadDim;

  // KV reaches the second cache a chunk and a half before its use, and the first cache half a chunk before it. Closer,
  // or further away, costs 3 to 10 percent.
  static constexpr int kTokensAhead = kChunk + 16;

  float* values;  // [head][kDim], weighted

  AmxTiles(void* memory, int group, int block_size) : group_(group), block_size_(block_size) {
    Scratch scratch(memory);
    const int runs = (group + kRun - 1) / kRun;
    padded_group_ = runs * kRun;
    queries_ = scratch.take<BF16>(padded_group_ * kSteps * 32);
    scores_ = scratch.take<float>(kRun * kChunk);
    weights_ = scratch.take<BF16>(kRun * kChunk);
    softmaxes_ = scratch.take<Softmax>(runs);
    values = scratch.take<float>(padded_group_ * kDim);
    last_values_ = scratch.take<BF16>(block_size * kDim);
    for (int i = 0; i < padded_group_ * kSteps * 32; ++i) queries_[i] = BF16{};
    configure(group < kRun ? group : kRun);
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  void start_item(const BF16* queries) {
    for (int h = 0; h < group_; h += 4) pack_queries(h, group_ - 1, queries);
    for (int run = 0; run < padded_group_ / kRun; ++run) softmaxes_[run].start();
    for (int i = 0; i < padded_group_ * kDim; i += 16) Simd::store(values + i, Simd::zero());
  }

  float maximum(int head) const { return softmaxes_[head / kRun].maximum(head % kRun); }
  float sum(int head) const { return softmaxes_[head / kRun].sum(head % kRun); }

  void attend(const Chunk<BF16>& chunk, float scale) {
    plan_asking(chunk);
    const BF16* v[kChunk / kSmallestBlock];
    for (int i = 0; i < chunk.num_tiles; ++i) v[i] = chunk.tiles[i] + block_size_ * kDim;
    const int in_last = chunk.num_tokens - (chunk.num_tiles - 1) * block_size_;
    if (in_last < block_size_) v[chunk.num_tiles - 1] = zero_padded(v[chunk.num_tiles - 1], in_last);
    for (int head = 0; head < group_; head += kRun) {
      finish_stores();
      for (int token = 0; token < chunk.num_tokens; token += 32) score(chunk, head, token);
      finish_stores();
      softmaxes_[head / kRun].weigh(scores_, chunk.num_tokens, scale, values + head * kDim, kDim, weights_,
                                    [this](auto lines) { ask<lines.value>(); });
      finish_stores();
      int d = 0;
      for (; d + 32 <= kDim; d += 32) accumulate<2>(v, chunk.num_tiles, head, d);
      if (d < kDim) accumulate<1>(v, chunk.num_tiles, head, d);
    }
    finish_stores();
    while (!near_.empty() || !ahead_.empty()) ask<kLines>();
  }

 private:
  using Softmax = AmxSoftmax<kRun>;

  // Asked for at once, between other work. A tile's K, or V, is a multiple of this.
  static constexpr int kLines = 8;
  static constexpr int kSteps = (kDim + 31) / 32;

  // A step takes 32 dims. The last one of a dim that is no multiple of 32 begins before the one before it ends, with
  // zeros for the queries' dims that were already counted.
  static constexpr int step_dim(int step) { return step * 32 + 32 <= kDim ? step * 32 : kDim - 32; }

  // Near are the chunk's V, then the K of the chunk behind it: what is used half a chunk later.
  void plan_asking(const Chunk<BF16>& chunk) {
    const int half = block_size_ * kDim;
    const int num_full = chunk.num_tokens / block_size_;
    near_.clear();
    ahead_.clear();
    for (int i = 0; i < num_full; ++i) near_.add(chunk.tiles[i] + half, half * sizeof(BF16));
    for (int i = 0; i < chunk.num_tiles; ++i) {
      if (chunk.near[i]) near_.add(chunk.near[i], half * sizeof(BF16));
      if (chunk.ahead[i] != chunk.tiles[i]) ahead_.add(chunk.ahead[i], 2 * half * sizeof(BF16));
    }
  }

  template <int kCount>
  void ask() {
#pragma GCC unroll 2
    for (int i = 0; i < kCount; i += kLines) {
      near_.template take<kLines>(prefetch);
      ahead_.template take<kLines>(prefetch_far);
    }
  }

  void configure(int heads) {
    TileConfig config;
    config.set(0, 16, kRun * 4);
    config.set(1, 16, kRun * 4);
    config.set(2, 16, 64);
    config.set(3, 16, kRun * 4);
    config.set(4, heads, block_size_ * 2);
    config.set(5, block_size_ / 2, 64);
    config.set(6, heads, 64);
    config.set(7, heads, 64);
    _tile_loadconfig(&config);
  }

  // The right operand of the scores, for each run [step][pair of dims][kRun][2]. Four heads at a time: `head` and up to
  // three more, of which those past `last` come out as copies of it.
  void pack_queries(int head, int last, const BF16* queries) {
    for (int step = 0; step < kSteps; ++step) {
      const __mmask16 fresh = static_cast<__mmask16>(0xffff << (step * 32 - step_dim(step)) / 2);
      __m512 rows[4];  // of pairs of dims
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int row = head + i < last ? head + i : last;
        rows[i] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(fresh, queries + row * kDim + step_dim(step)));
      }
      transpose_four(rows);
      float* at = reinterpret_cast<float*>(queries_) + (head / kRun * kSteps + step) * 16 * kRun + head % kRun;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        float* to = at + i * kRun;
        _mm_store_ps(to, _mm512_castps512_ps128(rows[i]));
        _mm_store_ps(to + 4 * kRun, _mm512_extractf32x4_ps(rows[i], 1));
        _mm_store_ps(to + 8 * kRun, _mm512_extractf32x4_ps(rows[i], 2));
        _mm_store_ps(to + 12 * kRun, _mm512_extractf32x4_ps(rows[i], 3));
      }
    }
  }

  // Scores of 32 tokens from `token` on; garbage for those past the chunk's.
  void score(const Chunk<BF16>& chunk, int head, int token) {
    const BF16* k = chunk.tiles[token / block_size_] + token % block_size_ * kDim;
    const int second = token + 16;
    const BF16* k2 = second < chunk.num_tokens ? chunk.tiles[second / block_size_] + second % block_size_ * kDim : k;
    const BF16* queries = queries_ + head * kSteps * 32;
    _tile_zero(0);
    _tile_zero(1);
#pragma GCC unroll 8
    for (int step = 0; step < kSteps; ++step) {
      ask<kLines>();
      _tile_loadd(3, queries + step * 32 * kRun, kRun * 4);
      _tile_loadd(2, k + step_dim(step), kDim * 2);
      _tile_dpbf16ps(0, 2, 3);
      ask<kLines>();
      _tile_loadd(2, k2 + step_dim(step), kDim * 2);
      _tile_dpbf16ps(1, 2, 3);
    }
    _tile_stored(0, scores_ + token * kRun, kRun * 4);
    _tile_stored(1, scores_ + second * kRun, kRun * 4);
  }

  // values[h][d] += sum over t of weights[h][t] * v[t][d], for kTiles * 16 dims.
  template <int kTiles>
  void accumulate(const BF16* const* v, int num_tiles, int head, int dim) {
    constexpr long kRowBytes = kDim * 4;  // of a pair of tokens' V, and of a head's values
    float* at = values + head * kDim + dim;
    _tile_loadd(6, at, kRowBytes);
    if constexpr (kTiles == 2) _tile_loadd(7, at + 16, kRowBytes);
    for (int i = 0; i < num_tiles; ++i) {
      for (int token = 0; token < block_size_; token += 16) ask<kTiles * kLines>();
      _tile_loadd(4, weights_ + i * block_size_, kChunk * 2);
      _tile_loadd(5, v[i] + 2 * dim, kRowBytes);
      _tile_dpbf16ps(6, 4, 5);
      if constexpr (kTiles == 2) {
        _tile_loadd(5, v[i] + 2 * dim + 32, kRowBytes);
        _tile_dpbf16ps(7, 4, 5);
      }
    }
    _tile_stored(6, at, kRowBytes);
    if constexpr (kTiles == 2) _tile_stored(7, at + 16, kRowBytes);
  }

  // A copy of V in a block that is not full; what lies behind its tokens may not be a number.
  const BF16* zero_padded(const BF16* v, int num_tokens) {
    const int pairs = (num_tokens + 1) / 2;
    for (int i = 0; i < pairs * kDim; i += 16) {
      _mm512_store_si512(last_values_ + 2 * i, _mm512_loadu_si512(v + 2 * i));
    }
    for (int i = pairs * kDim; i < block_size_ / 2 * kDim; i += 16) {
      _mm512_store_si512(last_values_ + 2 * i, _mm512_setzero_si512());
    }
    return last_values_;
  }

  int group_;
  int padded_group_;
  int block_size_;
  BF16* queries_;       // see pack_queries
  float* scores_;       // [token][kRun]
  BF16* weights_;       // [kRun][kChunk]
  Softmax* softmaxes_;  // of each run
  BF16* last_values_;   // a block's V
  LineQueue<2 * kChunk / kSmallestBlock> near_;
  LineQueue<kChunk / kSmallestBlock> ahead_;
};

}  // namespace
}  // namespace neo
