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

// Tile registers. Intrinsics want them as literals: 0, 1 scores of 16 tokens; 2 K; 3 queries; 4 weights; 5, 6 V; 7 and
// 0 accumulated values.
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

inline void transpose_16x16(const float* from, float* to, int to_stride) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_load_ps(from + 16 * i);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const auto lower = [](__m512 x, __m512 y) {
      return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    };
    const auto upper = [](__m512 x, __m512 y) {
      return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    };
    a[i] = lower(b[i], b[i + 2]);
    a[i + 1] = upper(b[i], b[i + 2]);
    a[i + 2] = lower(b[i + 1], b[i + 3]);
    a[i + 3] = upper(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // lanes of rows 4k + (0..3), column 4 * lane + i
    const __m512 low_even = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
    const __m512 low_odd = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
    const __m512 high_even = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
    const __m512 high_odd = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    _mm512_storeu_ps(to + i * to_stride, _mm512_shuffle_f32x4(low_even, high_even, 0x88));
    _mm512_storeu_ps(to + (i + 4) * to_stride, _mm512_shuffle_f32x4(low_odd, high_odd, 0x88));
    _mm512_storeu_ps(to + (i + 8) * to_stride, _mm512_shuffle_f32x4(low_even, high_even, 0xdd));
    _mm512_storeu_ps(to + (i + 12) * to_stride, _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd));
  }
}

template <int kHeadDim>
class AmxTiles {
 public:
  using Element = BF16;
  using Simd = Avx512;
  using Vec = __m512;
  static constexpr int kDim = kHeadDim;

  float* scores;  // [head][kMaxBlock]
  float* maxima;  // [head]
  float* sums;    // [head][16], to be added up
  float* values;  // [head][kDim], weighted

  AmxTiles(void* memory, int group, int block_size) : group_(group), block_size_(block_size) {
    Scratch scratch(memory);
    const int heads = (group + 15) / 16 * 16;
    queries_ = scratch.take<BF16>(heads * kSteps * 32);
    scores = scratch.take<float>(heads * kMaxBlock);
    weights_ = scratch.take<BF16>(heads * kMaxBlock);
    maxima = scratch.take<float>(heads);
    sums = scratch.take<float>(heads * 16);
    values = scratch.take<float>(heads * kDim);
    token_scores_ = scratch.take<float>(16 * 16);
    last_values_ = scratch.take<BF16>(kMaxBlock * kDim);
    for (int i = 0; i < heads * kSteps * 32; ++i) queries_[i] = BF16{};
    for (int i = 0; i < heads * kMaxBlock; ++i) weights_[i] = BF16{};
    for (int i = 0; i < heads * kDim; ++i) values[i] = 0;
    configure(group < 16 ? group : 16);
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  void start_item(const BF16* queries) {
    for (int h = 0; h < group_; ++h) {
      pack_query(h, queries + h * kDim);
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

  void store_weights(int head, int token, Vec weights) { Simd::store(weights_ + head * kMaxBlock + token, weights); }

  // scores[h][t] = q[h] . k[t], and garbage for tokens past num_tokens.
  void score(const BF16* k, int num_tokens, Prefetch& prefetch) {
    NoPrefetch none;
    finish_stores();
    for (int head = 0; head < group_; head += 16) {
      for (int token = 0; token < num_tokens; token += 16) {
        if (head == 0) {
          score_run(k + token * kDim, head, token, prefetch);
        } else {
          score_run(k + token * kDim, head, token, none);
        }
      }
    }
  }

  // values[h][d] += sum over t of weights[h][t] * v[t][d]
  void accumulate(const BF16* v, int num_tokens, Prefetch& prefetch) {
    if (num_tokens < block_size_) v = zero_padded(v, num_tokens);
    NoPrefetch none;
    finish_stores();
    accumulate_run(v, 0, prefetch);
    for (int head = 16; head < group_; head += 16) accumulate_run(v, head, none);
    finish_stores();
  }

 private:
  static constexpr int kSteps = (kDim + 31) / 32;

  // A step takes 32 dims. The last one of a dim that is no multiple of 32 begins before the one before it ends, with
  // zeros for the queries' dims that were already counted.
  static constexpr int step_dim(int step) { return step * 32 + 32 <= kDim ? step * 32 : kDim - 32; }

  void configure(int heads) {
    TileConfig config;
    config.set(1, 16, heads * 4);
    config.set(2, 16, 64);
    config.set(3, 16, heads * 4);
    config.set(4, heads, block_size_ * 2);
    config.set(5, block_size_ / 2, 64);
    config.set(6, block_size_ / 2, 64);
    config.set(7, heads, 64);
    config.set(0, heads, 64);
    _tile_loadconfig(&config);
  }

  // The right operand of the scores, for each 16 heads [step][pair of dims][head][2].
  void pack_query(int head, const BF16* query) {
    BF16* at = queries_ + head / 16 * kSteps * 16 * 32 + head % 16 * 2;
    for (int step = 0; step < kSteps; ++step) {
      for (int i = step * 32 - step_dim(step); i < 32; i += 2) {
        at[(step * 16 + i / 2) * 32] = query[step_dim(step) + i];
        at[(step * 16 + i / 2) * 32 + 1] = query[step_dim(step) + i + 1];
      }
    }
  }

  template <class Ahead>
  void score_run(const BF16* k, int head, int token, Ahead& ahead) {
    const BF16* queries = queries_ + head * kSteps * 32;
    _tile_zero(1);
#pragma GCC unroll 8
    for (int step = 0; step < kSteps; ++step) {
      ahead.template step<16>();
      _tile_loadd(2, k + step_dim(step), kDim * 2);
      _tile_loadd(3, queries + step * 16 * 32, 64);
      _tile_dpbf16ps(1, 2, 3);
    }
    _tile_stored(1, token_scores_, 64);
    finish_stores();
    transpose_16x16(token_scores_, scores + head * kMaxBlock + token, kMaxBlock);
  }

  template <class Ahead>
  void accumulate_run(const BF16* v, int head, Ahead& ahead) {
    const long value_stride = kDim * 4, pair_stride = kDim * 4;
    _tile_loadd(4, weights_ + head * kMaxBlock, kMaxBlock * 2);
    float* at = values + head * kDim;
    int d = 0;
#pragma GCC unroll 8
    for (; d + 32 <= kDim; d += 32) {
      advance(ahead);
      advance(ahead);
      _tile_loadd(7, at + d, value_stride);
      _tile_loadd(5, v + 2 * d, pair_stride);
      _tile_dpbf16ps(7, 4, 5);
      _tile_loadd(0, at + d + 16, value_stride);
      _tile_loadd(6, v + 2 * d + 32, pair_stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_stored(7, at + d, value_stride);
      _tile_stored(0, at + d + 16, value_stride);
    }
    if (d < kDim) {
      advance(ahead);
      _tile_loadd(7, at + d, value_stride);
      _tile_loadd(5, v + 2 * d, pair_stride);
      _tile_dpbf16ps(7, 4, 5);
      _tile_stored(7, at + d, value_stride);
    }
  }

  template <class Ahead>
  void advance(Ahead& ahead) {
    if (block_size_ == 16) {
      ahead.template step<8>();
    } else {
      ahead.template step<16>();
    }
  }

  // A copy of V in a block that is not full; what lies behind its tokens may not be a number. The weights there, too.
  const BF16* zero_padded(const BF16* v, int num_tokens) {
    const int pairs = (num_tokens + 1) / 2;
    for (int i = 0; i < pairs * kDim; i += 16) {
      _mm512_store_si512(last_values_ + 2 * i, _mm512_loadu_si512(v + 2 * i));
    }
    for (int i = pairs * kDim; i < block_size_ / 2 * kDim; i += 16) {
      _mm512_store_si512(last_values_ + 2 * i, _mm512_setzero_si512());
    }
    if (num_tokens <= 16) {
      for (int h = 0; h < group_; ++h) store_weights(h, 16, Simd::zero());
    }
    return last_values_;
  }

  int group_;
  int block_size_;
  BF16* queries_;        // see pack_query
  BF16* weights_;        // [head][kMaxBlock]
  float* token_scores_;  // [16 tokens][16 heads]
  BF16* last_values_;    // a block's V
};

}  // namespace
}  // namespace neo
