// Online softmax over scores as AMX leaves them, [token][head], into weights as it takes them, [head][token]. For the
// files of one instruction set only: all is local to the file that includes it.
#pragma once

#include <immintrin.h>

#include "attention/kernel/attend.h"
#include "attention/kernel/avx512.h"

namespace neo {
namespace {

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

// 2^x for weights that become bf16: relative error 3e-6, and 2^-126 for all below.
inline __m512 exp2_for_bf16(__m512 x) {
  constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
  const __m512 part = _mm512_reduce_ps(x, kDown);
  constexpr float kCoefficients[] = {0.0135341673f, 0.0520114623f, 0.241442755f, 0.693003835f, 1.00000259f};
  __m512 result = _mm512_set1_ps(kCoefficients[0]);
  for (int i = 1; i < 5; ++i) result = _mm512_fmadd_ps(result, part, _mm512_set1_ps(kCoefficients[i]));
  return _mm512_scalef_ps(result, x);
}

template <int kCount>
struct Lines {
  static constexpr int value = kCount;
};

// The running maxima and sums of kRun heads: 4, 8 or 16. A vector holds two or four tokens of as many heads as it has
// room for, so that no lane is idle.
template <int kRun>
class alignas(64) AmxSoftmax {
 public:
  void start() {
    for (int part = 0; part < kParts; ++part) {
      Avx512::store(references_[part], Avx512::broadcast(kLowest));
      Avx512::store(sums_[part], Avx512::zero());
    }
  }

  // What the weights are relative to: no more than 2^kSlack below the largest score.
  float maximum(int head) const { return references_[head / kHeads][head % kHeads]; }
  float sum(int head) const {
    float total = 0;
    for (int lane = head % kHeads; lane < 16; lane += kHeads) total += sums_[head / kHeads][lane];
    return total;
  }

  // Scores [token][kRun], to be multiplied by `scale` into log2 units, into weights [kRun][kChunk]; `values`
  // [kRun][dim] are rescaled where a head's maximum grew. `ask(Lines<n>)` is called now and then.
  template <class Ask>
  void weigh(float* scores, int num_tokens, float scale, float* values, int dim, BF16* weights, Ask ask) {
    const int padded = (num_tokens + 31) / 32 * 32;
    for (int i = num_tokens * kRun; i < padded * kRun; i += 4) _mm_store_ps(scores + i, _mm_set1_ps(kLowest));
    const Vec factor = Avx512::broadcast(scale);
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      const float* own = scores + part * kHeads;
      const Vec high = Avx512::max(Avx512::mul(highest(own, padded, ask), factor), Avx512::broadcast(kLowest));
      Vec reference = Avx512::load(references_[part]);
      if (_mm512_cmp_ps_mask(high, Avx512::add(reference, Avx512::broadcast(kSlack)), _CMP_GT_OQ)) {
        reference = rescale(part, Avx512::max(reference, high), values + part * kHeads * dim, dim);
      }
      for (int token = 0; token < padded; token += 32) {
        weigh_32(part, own + token * kRun, factor, reference, weights + part * kHeads * kChunk + token, ask);
      }
    }
  }

 private:
  using Vec = __m512;
  static constexpr int kHeads = kRun < 8 ? kRun : 8;  // of one vector
  static constexpr int kParts = kRun / kHeads;
  static constexpr int kVecs = kHeads;             // that hold the scores of kHeads heads for 32 tokens, in pairs
  static constexpr int kNext = 8 / kHeads * kRun;  // floats from one vector's scores to the next one's

  // Maxima are not followed for so small a growth, in log2 units: weights up to 2^8 are as good.
  static constexpr float kSlack = 8;

  // Of 16 tokens, those of a half that begin at `at` and their likes of the other half.
  static Vec load_scores(const float* at) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_load_ps(at)), _mm256_load_ps(at + 8 * kRun), 1);
  }

  // The largest score of each head, in all its lanes.
  template <class Ask>
  static Vec highest(const float* scores, int num_tokens, Ask ask) {
    Vec most[4];
#pragma GCC unroll 4
    for (Vec& x : most) x = Avx512::broadcast(kLowest);
    for (int token = 0; token < num_tokens; token += 16) {
#pragma GCC unroll 8
      for (int i = 0; i < kVecs; ++i) {
        most[i % 4] = Avx512::max(most[i % 4], load_scores(scores + token * kRun + i * kNext));
      }
      ask(Lines<8>());
    }
    Vec x = Avx512::max(Avx512::max(most[0], most[1]), Avx512::max(most[2], most[3]));
    x = Avx512::max(x, _mm512_shuffle_f32x4(x, x, 0x4e));
    if constexpr (kHeads == 4) x = Avx512::max(x, _mm512_shuffle_f32x4(x, x, 0xb1));
    return x;
  }

  // Rare, and so kept out of the way.
  __attribute__((noinline)) Vec rescale(int part, Vec reference, float* values, int dim) {
    const Vec factor = Avx512::exp2(Avx512::sub(Avx512::load(references_[part]), reference));
    Avx512::store(references_[part], reference);
    Avx512::store(sums_[part], Avx512::mul(Avx512::load(sums_[part]), factor));
    float factors[16];
    Avx512::store(factors, factor);
    for (int head = 0; head < kHeads; ++head) {
      float* row = values + head * dim;
      for (int d = 0; d < dim; d += 16) {
        Avx512::store(row + d, Avx512::mul(Avx512::load(row + d), Avx512::broadcast(factors[head])));
      }
    }
    return reference;
  }

  template <class Ask>
  void weigh_32(int part, const float* scores, Vec factor, Vec reference, BF16* to, Ask ask) {
    const auto weight = [&](const float* at) {
      Vec product = Avx512::mul(load_scores(at), factor);
      __asm__(""
              : "+v"(product));  // rounded as the maximum was: fused, the largest of huge scores would be off by much
      return exp2_for_bf16(Avx512::sub(product, reference));
    };
    Vec first_sum = Avx512::load(sums_[part]), second_sum = Avx512::zero();
    __m512i pairs[kVecs];  // 128-bit lane i: of tokens 8 * i and up
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) {
      const Vec first = weight(scores + i * kNext), second = weight(scores + 16 * kRun + i * kNext);
      first_sum = Avx512::add(first_sum, first);
      second_sum = Avx512::add(second_sum, second);
      pairs[i] = (__m512i)_mm512_cvtne2ps_pbh(second, first);
      ask(Lines<64 / kVecs>());
    }
    Avx512::store(sums_[part], Avx512::add(first_sum, second_sum));
    store_by_head(pairs, to);
  }

  static void store_by_head(const __m512i (&pairs)[4], BF16* to) {
    const __m128i heads_first = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    __m512 rows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm512_castsi512_ps(_mm512_shuffle_epi8(pairs[i], _mm512_broadcast_i32x4(heads_first)));
    }
    store_four(rows, to);
  }
  static void store_by_head(const __m512i (&pairs)[8], BF16* to) {
    __m512 low[4], high[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      low[i] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(pairs[2 * i], pairs[2 * i + 1]));
      high[i] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(pairs[2 * i], pairs[2 * i + 1]));
    }
    store_four(low, to);
    store_four(high, to + 4 * kChunk);
  }
  // Four heads' weights, which come by pair of tokens.
  static void store_four(__m512 (&rows)[4], BF16* to) {
    transpose_four(rows);
#pragma GCC unroll 4
    for (int head = 0; head < 4; ++head) _mm512_storeu_ps(to + head * kChunk, rows[head]);
  }

  float references_[kParts][16];  // by lane, as the scores; in log2 units
  float sums_[kParts][16];        // by lane, to be added up
};

}  // namespace
}  // namespace neo
