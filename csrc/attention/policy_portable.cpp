// Standard vectors of the compiler, four floats wide: right on any machine.
#include "attention/kernel/dispatch.h"

namespace neo {
namespace {

struct FourFloats {
  static constexpr int kWidth = 4;
  static constexpr int kAccumulators = 8;
  static constexpr int kMaxHeads = 4;
  static constexpr bool kAsksIntoBothCaches = false;
  typedef float Vec __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));

  static Vec zero() { return Vec{}; }
  static Vec broadcast(float x) { return Vec{x, x, x, x}; }
  static Vec load(const float* at) { return Vec{at[0], at[1], at[2], at[3]}; }
  static void store(float* at, Vec x) {
    for (int i = 0; i < kWidth; ++i) at[i] = x[i];
  }
  static void store(BF16* at, Vec x) {
    for (int i = 0; i < kWidth; ++i) {
      const uint32_t bits = __builtin_bit_cast(uint32_t, static_cast<float>(x[i]));
      at[i].bits = x[i] == x[i] ? static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : 0x7fc0;
    }
  }
  static void store(F16* at, Vec x) {
    for (int i = 0; i < kWidth; ++i) at[i].bits = __builtin_bit_cast(uint16_t, static_cast<_Float16>(x[i]));
  }
  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec sub(Vec a, Vec b) { return a - b; }
  static Vec mul(Vec a, Vec b) { return a * b; }
  static Vec max(Vec a, Vec b) { return a > b ? a : b; }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static float reduce_add(Vec x) { return (x[0] + x[1]) + (x[2] + x[3]); }
  static float reduce_max(Vec x) {
    float result = x[0];
    for (int i = 1; i < kWidth; ++i) result = x[i] > result ? static_cast<float>(x[i]) : result;
    return result;
  }
  static Vec round(Vec x) {
    const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: what is below one falls off the mantissa
    return (x + magic) - magic;
  }
  static Vec times_power_of_two(Vec x, Vec exponent) {
    return x * __builtin_bit_cast(Vec, (__builtin_convertvector(exponent, Ints) + 127) << 23);
  }
  static Vec exp2(Vec x) { return exp2_by_polynomial<FourFloats>(x); }

  static float widen(BF16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }
  static float widen(F16 x) { return static_cast<float>(__builtin_bit_cast(_Float16, x.bits)); }

  template <int kCount, class Element>
  static void load_pair(const Element* at, Vec& even, Vec& odd) {
    for (int i = 0; i < kWidth; ++i) {
      even[i] = widen(at[2 * i]);
      odd[i] = widen(at[2 * i + 1]);
    }
  }
  template <int kCount>
  static void load_halves(const F16* at, Vec& first, Vec& second) {
    for (int i = 0; i < kWidth; ++i) {
      first[i] = widen(at[i]);
      second[i] = widen(at[kWidth + i]);
    }
  }
  template <int kCount>
  static void load_pair(const float* at, Vec& first, Vec& second) {
    first = load(at);
    second = load(at + kWidth);
  }

  template <int kHeads>
  static void store_sums(const Vec* dots, float* at, int stride) {
    constexpr int kTokens = kWidth / kHeads;
    for (int i = 0; i < kWidth; ++i) at[i / kTokens * stride + i % kTokens] = reduce_add(dots[i]);
  }
};

bool runs_here() { return true; }

}  // namespace

const Policy kPortablePolicy = {"portable", runs_here, find_vector_tiles<FourFloats>};

}  // namespace neo
