// AVX2 with FMA and F16C.
#include <immintrin.h>

#include "attention/kernel/dispatch.h"
#include "base/cpu.h"

namespace neo {
namespace {

struct Avx2 {
  static constexpr int kWidth = 8;
  static constexpr int kAccumulators = 8;
  static constexpr int kMaxHeads = 4;
  static constexpr bool kAsksIntoBothCaches = false;
  using Vec = __m256;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec broadcast(float x) { return _mm256_set1_ps(x); }
  static Vec load(const float* at) { return _mm256_loadu_ps(at); }
  static void store(float* at, Vec x) { _mm256_storeu_ps(at, x); }
  static void store(BF16* at, Vec x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm256_castsi256_si128(packed));
  }
  static void store(F16* at, Vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static float reduce_add(Vec x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static float reduce_max(Vec x) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  static Vec round(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Vec times_power_of_two(Vec x, Vec exponent) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
  }
  static Vec exp2(Vec x) { return exp2_by_polynomial<Avx2>(x); }

  template <int kCount>
  static void load_pair(const BF16* at, Vec& even, Vec& odd) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }
  template <int kCount>
  static void load_pair(const F16* at, Vec& even, Vec& odd) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    const __m256i low = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff));
    const __m256i high = _mm256_srli_epi32(pairs, 16);
    const __m256i split = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
    even = _mm256_cvtph_ps(_mm256_castsi256_si128(split));
    odd = _mm256_cvtph_ps(_mm256_extracti128_si256(split, 1));
  }
  template <int kCount>
  static void load_halves(const F16* at, Vec& first, Vec& second) {
    first = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    second = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + kWidth)));
  }
  template <int kCount>
  static void load_pair(const float* at, Vec& first, Vec& second) {
    first = load(at);
    second = load(at + kWidth);
  }

  // dots[head][token], a score each once its lanes are added up. Inlined with all that it calls: else the dots lie in
  // memory, where each prefetch, which might read them, wants the latest.
  template <int kHeads>
  [[gnu::always_inline]] static void store_sums(const Vec* dots, float* at, int stride) {
    const Vec a = add_quarters(add_halves(dots[0], dots[1]), add_halves(dots[2], dots[3]));
    const Vec b = add_quarters(add_halves(dots[4], dots[5]), add_halves(dots[6], dots[7]));
    const Vec sums = _mm256_add_ps(_mm256_blend_ps(a, b, 0xf0), _mm256_permute2f128_ps(a, b, 0x21));
    const __m128 low = _mm256_castps256_ps128(sums), high = _mm256_extractf128_ps(sums, 1);
    if constexpr (kHeads == 1) {
      store(at, sums);
    } else if constexpr (kHeads == 2) {
      _mm_storeu_ps(at, low);
      _mm_storeu_ps(at + stride, high);
    } else {
      static_assert(kHeads == 4);
      _mm_storel_pi(reinterpret_cast<__m64*>(at), low);
      _mm_storeh_pi(reinterpret_cast<__m64*>(at + stride), low);
      _mm_storel_pi(reinterpret_cast<__m64*>(at + 2 * stride), high);
      _mm_storeh_pi(reinterpret_cast<__m64*>(at + 3 * stride), high);
    }
  }

 private:
  // Each 128-bit lane: two sums of two floats of `a`, then two of `b`.
  [[gnu::always_inline]] static Vec add_halves(Vec a, Vec b) {
    return _mm256_add_ps(_mm256_blend_ps(a, b, 0xcc), _mm256_shuffle_ps(a, b, 0x4e));
  }
  // Each 128-bit lane: the sums of the two pairs of `a`, then of `b`.
  [[gnu::always_inline]] static Vec add_quarters(Vec a, Vec b) {
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
  }
};

}  // namespace

const Policy kAvx2Policy = {"avx2", cpu_has_avx2, find_vector_tiles<Avx2>};

}  // namespace neo
