// Sixteen floats. For the files of one instruction set only: all is local to the file that includes it.
#pragma once

#include <immintrin.h>

#include "attention/kernel/elements.h"
#include "attention/kernel/float_math.h"

namespace neo {
namespace {

struct Avx512 {
  static constexpr int kWidth = 16;
  static constexpr int kAccumulators = 20;
  static constexpr int kMaxHeads = 8;
  static constexpr bool kAsksIntoBothCaches = true;
  using Vec = __m512;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec broadcast(float x) { return _mm512_set1_ps(x); }
  static Vec load(const float* at) { return _mm512_loadu_ps(at); }
  static void store(float* at, Vec x) { _mm512_storeu_ps(at, x); }
  static void store(BF16* at, Vec x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
  }
  static void store(F16* at, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static float reduce_add(Vec x) { return _mm512_reduce_add_ps(x); }
  static float reduce_max(Vec x) { return _mm512_reduce_max_ps(x); }
  static Vec round(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Vec times_power_of_two(Vec x, Vec exponent) {
    const __mmask16 normal = _mm512_cmp_ps_mask(exponent, _mm512_set1_ps(-127.0f), _CMP_GT_OQ);
    return _mm512_maskz_scalef_ps(normal, x, exponent);
  }
  static Vec exp2(Vec x) { return exp2_by_polynomial<Avx512>(x); }

  template <int kCount>
  static void load_pair(const BF16* at, Vec& even, Vec& odd) {
    const __m512i pairs = load_elements<kCount>(at);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  template <int kCount>
  static void load_pair(const F16* at, Vec& even, Vec& odd) {
    alignas(64) static constexpr uint16_t kEvenThenOdd[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                                              22, 24, 26, 28, 30, 1,  3,  5,  7,  9,  11,
                                                              13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    const __m512i split = _mm512_permutexvar_epi16(_mm512_load_si512(kEvenThenOdd), load_elements<kCount>(at));
    even = _mm512_cvtph_ps(_mm512_castsi512_si256(split));
    odd = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(split, 1));
  }
  template <int kCount>
  static void load_halves(const F16* at, Vec& first, Vec& second) {
    first = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    second = zero();
    if constexpr (kCount > kWidth) {
      second = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + kWidth)));
    }
  }
  template <int kCount>
  static void load_pair(const float* at, Vec& first, Vec& second) {
    first = load(at);
    second = kCount > kWidth ? load(at + kWidth) : zero();
  }

  // 32 two-byte elements, or `kCount` and zeros.
  template <int kCount, class Element>
  static __m512i load_elements(const Element* at) {
    if constexpr (kCount == 32) return _mm512_loadu_si512(at);
    return _mm512_maskz_loadu_epi16((1u << (kCount % 32)) - 1, at);
  }

  // dots[head][token], a score each once its lanes are added up. Inlined with all that it calls: else the dots lie in
  // memory, where each prefetch, which might read them, wants the latest.
  template <int kHeads>
  [[gnu::always_inline]] static void store_sums(const Vec* dots, float* at, int stride) {
    const Vec low = add_halves(add_quarters(dots), add_quarters(dots + 4));
    const Vec high = add_halves(add_quarters(dots + 8), add_quarters(dots + 12));
    const Vec sums = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
    if constexpr (kHeads == 1) {
      store(at, sums);
    } else if constexpr (kHeads == 2) {
      _mm256_storeu_ps(at, _mm512_castps512_ps256(sums));
      _mm256_storeu_ps(at + stride, _mm512_extractf32x8_ps(sums, 1));
    } else if constexpr (kHeads == 4) {
      _mm_storeu_ps(at, _mm512_castps512_ps128(sums));
      _mm_storeu_ps(at + stride, _mm512_extractf32x4_ps(sums, 1));
      _mm_storeu_ps(at + 2 * stride, _mm512_extractf32x4_ps(sums, 2));
      _mm_storeu_ps(at + 3 * stride, _mm512_extractf32x4_ps(sums, 3));
    } else {
      static_assert(kHeads == 8);
      store_two_heads(_mm512_castps512_ps128(sums), at, stride);
      store_two_heads(_mm512_extractf32x4_ps(sums, 1), at + 2 * stride, stride);
      store_two_heads(_mm512_extractf32x4_ps(sums, 2), at + 4 * stride, stride);
      store_two_heads(_mm512_extractf32x4_ps(sums, 3), at + 6 * stride, stride);
    }
  }

 private:
  // Two tokens' scores of two heads.
  [[gnu::always_inline]] static void store_two_heads(__m128 scores, float* at, int stride) {
    _mm_storel_pi(reinterpret_cast<__m64*>(at), scores);
    _mm_storeh_pi(reinterpret_cast<__m64*>(at + stride), scores);
  }
  // Each 128-bit lane: the lane's sum of each of four vectors.
  [[gnu::always_inline]] static Vec add_quarters(const Vec* x) {
    const Vec a = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const Vec b = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
    return _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  }
  // Two lanes of `a`, its lanes added to half as many, then two of `b`.
  [[gnu::always_inline]] static Vec add_halves(Vec a, Vec b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
};

}  // namespace
}  // namespace neo
