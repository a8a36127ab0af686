// The two products over one tile with AMX, for up to 16 heads at once. K lies as AMX reads a left operand, V as it
// reads a right one; so the scores come out [token][head] and are transposed for the softmax. For the files of one
// instruction set only: all is local to the file that includes it.
#pragma once

#include <immintrin.h>

#include "attention/kernel/attend.h"
#include "attention/kernel/avx512.h"
#include "attention/kernel/scratch.h"

namespace neo {
namespace {

// Tile registers, which the intrinsics want as literals: 0 and 1 scores of 16 tokens each, 2 K, 3 queries, 4 weights,
// 5 V, 6 and 7 accumulated values.
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

// Four vectors to four: element 4 * lane + i of vector j becomes element j of lane `lane` of vector i.
inline void transpose_four(__m512 (&x)[4]) {
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1]));
  const __m512d b = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3]));
  const __m512d c = _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1]));
  const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(x[2], x[3]));
  x[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
  x[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  x[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
  x[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
}

// to[h][t] = from[t][h] for 16 tokens and four heads: rows of 16 floats to rows of kChunk.
inline void transpose_scores(const float* from, float* to) {
  __m512 rows[4];  // 128-bit lane i: token 4 * i + j
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const float* at = from + j * 16;
    __m512 row = _mm512_castps128_ps512(_mm_load_ps(at));
    row = _mm512_mask_broadcast_f32x4(row, 0x00f0, _mm_load_ps(at + 4 * 16));
    row = _mm512_mask_broadcast_f32x4(row, 0x0f00, _mm_load_ps(at + 8 * 16));
    rows[j] = _mm512_mask_broadcast_f32x4(row, 0xf000, _mm_load_ps(at + 12 * 16));
  }
  transpose_four(rows);
#pragma GCC unroll 4
  for (int h = 0; h < 4; ++h) _mm512_storeu_ps(to + h * kChunk, rows[h]);
}

template <int kHeadDim>
class AmxTiles {
 public:
  using Element = BF16;
  using Simd = Avx512;
  using Vec = __m512;
  static constexpr int kDim = kHeadDim;

  float* scores;  // [head][kChunk]
  float* maxima;  // [head]
  float* sums;    // [head][16], to be added up
  float* values;  // [head][kDim], weighted

  AmxTiles(void* memory, int group, int block_size) : group_(group), block_size_(block_size) {
    Scratch scratch(memory);
    const int heads = (group + 15) / 16 * 16;
    queries_ = scratch.take<BF16>(heads * kSteps * 32);
    scores = scratch.take<float>(heads * kChunk);
    weights_ = scratch.take<BF16>(heads * kChunk);
    maxima = scratch.take<float>(heads);
    sums = scratch.take<float>(heads * 16);
    values = scratch.take<float>(heads * kDim);
    token_scores_ = scratch.take<float>(32 * 16);
    last_values_ = scratch.take<BF16>(32 * kDim);
    for (int i = 0; i < heads * kSteps * 32; ++i) queries_[i] = BF16{};
    for (int i = 0; i < heads * kChunk; ++i) weights_[i] = BF16{};
    for (int i = 0; i < heads * kDim; ++i) values[i] = 0;
    configure(group < 16 ? group : 16);
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  void start_item(const BF16* queries) {
    for (int h = 0; h < group_; h += 4) pack_queries(h, group_ - 1, queries);
    for (int h = 0; h < group_; ++h) {
      maxima[h] = kLowest;
      Simd::store(sums + h * 16, Simd::zero());
      for (int d = 0; d < kDim; d += 16) Simd::store(values + h * kDim + d, Simd::zero());
    }
  }

  void rescale(int head, Vec factor) {
    Simd::store(sums + head * 16, Simd::mul(Simd::load(sums + head * 16), factor));
    float* v = values + head * kDim;
    for (int d = 0; d < kDim; d += 16) Simd::store(v + d, Simd::mul(Simd::load(v + d), factor));
  }

  void store_weights(int head, int token, Vec weights) {
    BF16* at = weights_ + head * kChunk + token;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), (__m256i)_mm512_cvtneps_pbh(weights));
  }

  // scores[h][t] = q[h] . k[t], and garbage for tokens past num_tokens.
  void score(const Chunk<BF16>& chunk) {
    finish_stores();
    for (int head = 0; head < group_; head += 16) {
      for (int token = 0; token < chunk.num_tokens; token += 32) {
        const int first = token / block_size_, second = (token + 16) / block_size_;
        const bool both = token + 16 < chunk.num_tokens;
        const int64_t at = token % block_size_ * kDim, second_at = (token + 16) % block_size_ * kDim;
        score_run(chunk.tiles[first] + at, chunk.ahead[first] + at,
                  both ? chunk.tiles[second] + second_at : chunk.tiles[first] + at,
                  both ? chunk.ahead[second] + second_at : chunk.ahead[first] + at, head, token);
      }
    }
  }

  // values[h][d] += sum over t of weights[h][t] * v[t][d]
  void accumulate(Chunk<BF16> chunk) {
    const BF16* v[kChunk / kSmallestBlock];
    const char* ahead[kChunk / kSmallestBlock];
    for (int i = 0; i < chunk.num_tiles; ++i) {
      v[i] = chunk.tiles[i] + block_size_ * kDim;
      ahead[i] = reinterpret_cast<const char*>(chunk.ahead[i] + block_size_ * kDim);
    }
    const int in_last = chunk.num_tokens - (chunk.num_tiles - 1) * block_size_;
    if (in_last < block_size_) v[chunk.num_tiles - 1] = zero_padded(v[chunk.num_tiles - 1], in_last);
    if (chunk.num_tokens % 32 != 0 && chunk.num_tokens % 32 <= 16) {
      for (int h = 0; h < group_; ++h) store_weights(h, chunk.num_tokens / 32 * 32 + 16, Simd::zero());
    }
    finish_stores();
    for (int head = 0; head < group_; head += 16) {
      int d = 0;
      for (; d + 32 <= kDim; d += 32) accumulate_run<2>(v, ahead, chunk.num_tiles, head, d);
      if (d < kDim) accumulate_run<1>(v, ahead, chunk.num_tiles, head, d);
    }
    finish_stores();
  }

 private:
  static constexpr int kSteps = (kDim + 31) / 32;

  // A step takes 32 dims. The last one of a dim that is no multiple of 32 begins before the one before it ends, with
  // zeros for the queries' dims that were already counted.
  static constexpr int step_dim(int step) { return step * 32 + 32 <= kDim ? step * 32 : kDim - 32; }

  void configure(int heads) {
    TileConfig config;
    config.set(0, 16, heads * 4);
    config.set(1, 16, heads * 4);
    config.set(2, 16, 64);
    config.set(3, 16, heads * 4);
    config.set(4, heads, block_size_ * 2);
    config.set(5, block_size_ / 2, 64);
    config.set(6, heads, 64);
    config.set(7, heads, 64);
    _tile_loadconfig(&config);
  }

  // The right operand of the scores, for each 16 heads [step][pair of dims][head][2]. Four heads at a time: `head` and
  // up to three more, of which those past `last` come out as copies of it.
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
      BF16* at = queries_ + (head / 16 * kSteps + step) * 16 * 32 + head % 16 * 2;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        float* to = reinterpret_cast<float*>(at + i * 32);
        _mm_store_ps(to, _mm512_castps512_ps128(rows[i]));
        _mm_store_ps(to + 4 * 16, _mm512_extractf32x4_ps(rows[i], 1));
        _mm_store_ps(to + 8 * 16, _mm512_extractf32x4_ps(rows[i], 2));
        _mm_store_ps(to + 12 * 16, _mm512_extractf32x4_ps(rows[i], 3));
      }
    }
  }

  // Scores of 16 tokens at `k` and 16 at `k2`, which may be the same.
  void score_run(const BF16* k, const BF16* ahead, const BF16* k2, const BF16* ahead2, int head, int token) {
    const BF16* queries = queries_ + head * kSteps * 32;
    _tile_zero(0);
    _tile_zero(1);
#pragma GCC unroll 8
    for (int step = 0; step < kSteps; ++step) {
      if (head == 0) {
        ask_for_keys(ahead, step);
        ask_for_keys(ahead2, step);
      }
      _tile_loadd(3, queries + step * 16 * 32, 64);
      _tile_loadd(2, k + step_dim(step), kDim * 2);
      _tile_dpbf16ps(0, 2, 3);
      _tile_loadd(2, k2 + step_dim(step), kDim * 2);
      _tile_dpbf16ps(1, 2, 3);
    }
    _tile_stored(0, token_scores_, 64);
    _tile_stored(1, token_scores_ + 16 * 16, 64);
    finish_stores();
    const int left = group_ - head, heads = left < 16 ? left : 16;
    for (int h = 0; h < heads; h += 4) {
      float* to = scores + (head + h) * kChunk + token;
      transpose_scores(token_scores_ + h, to);
      transpose_scores(token_scores_ + 16 * 16 + h, to + 16);
    }
  }

  // 16 of the lines of 16 tokens, or what is left of them.
  static void ask_for_keys(const BF16* ahead, int step) {
    const char* base = reinterpret_cast<const char*>(ahead);
#pragma GCC unroll 16
    for (int at = step * 16 * kCacheLine; at < (step + 1) * 16 * kCacheLine && at < 16 * kDim * 2; at += kCacheLine) {
      prefetch(base + at);
    }
  }

  // Accumulates kTiles * 16 dims, for 16 heads.
  template <int kTiles>
  void accumulate_run(const BF16* const* v, const char* const* ahead, int num_tiles, int head, int dim) {
    const long row_bytes = kDim * 4;  // of a pair of tokens' V, and of a head's values
    float* at = values + head * kDim + dim;
    _tile_loadd(6, at, row_bytes);
    if constexpr (kTiles == 2) _tile_loadd(7, at + 16, row_bytes);
    for (int i = 0; i < num_tiles; ++i) {
      if (head == 0) {
        const char* lines = ahead[i] + dim * block_size_ * 2;
        for (int line = 0; line < kTiles * block_size_ / 2; ++line) prefetch(lines + line * kCacheLine);
      }
      _tile_loadd(4, weights_ + head * kChunk + i * block_size_, kChunk * 2);
      _tile_loadd(5, v[i] + 2 * dim, row_bytes);
      _tile_dpbf16ps(6, 4, 5);
      if constexpr (kTiles == 2) {
        _tile_loadd(5, v[i] + 2 * dim + 32, row_bytes);
        _tile_dpbf16ps(7, 4, 5);
      }
    }
    _tile_stored(6, at, row_bytes);
    if constexpr (kTiles == 2) _tile_stored(7, at + 16, row_bytes);
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
  int block_size_;
  BF16* queries_;        // see pack_query
  BF16* weights_;        // [head][kChunk]
  float* token_scores_;  // [32 tokens][16 heads]
  BF16* last_values_;    // a block's V
};

}  // namespace
}  // namespace neo
