// Products in float: elements are converted as they are loaded. For the files of one instruction set only: all is local
// to the file that includes it.
#pragma once

#include "attention/kernel/elements.h"

namespace neo {
namespace {

// 2^x, relative error 1e-7; 0 for x below -126.5. Polynomial: weighted least squares towards the smallest largest
// error.
template <class Simd>
typename Simd::Vec exp2_by_polynomial(typename Simd::Vec x) {
  x = Simd::max(x, Simd::broadcast(-127.0f));
  const typename Simd::Vec whole = Simd::round(x);
  const typename Simd::Vec part = Simd::sub(x, whole);
  constexpr float kCoefficients[] = {0.00132647f, 0.00967151f, 0.0555073f, 0.2402224f, 0.693147f, 1.0f};
  typename Simd::Vec result = Simd::broadcast(kCoefficients[0]);
  for (int i = 1; i < 6; ++i) result = Simd::fma(result, part, Simd::broadcast(kCoefficients[i]));
  return Simd::times_power_of_two(result, whole);
}

// `x` in a register: else the compiler loads it again at each use, and the loads set the pace, not the products.
template <class Vec>
Vec held(Vec x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#endif
  return x;
}

template <class SimdType, class ElementType>
struct FloatMath {
  using Simd = SimdType;
  using Element = ElementType;
  using Vec = typename Simd::Vec;
  using Query = float;
  using Weight = float;
  static constexpr int kStep = 2 * Simd::kWidth;

  // Conversion from fp16 takes neighbours: to part even and odd ones is more work, which only V needs.
  static constexpr bool kConvertsInOrder = kIsF16<Element>;

  // Keys of bf16 come as (even ones, odd ones), others one half after the other; the query is packed alike to match.
  struct Pair {
    Vec first, second;
  };
  using Keys = Pair;
  using Values = Pair;

  template <int kCount>
  static Pair load_keys(const Element* at) {
    Pair pair;
    if constexpr (kConvertsInOrder) {
      Simd::template load_halves<kCount>(at, pair.first, pair.second);
    } else {
      Simd::template load_pair<kCount>(at, pair.first, pair.second);
    }
    return pair;
  }

  template <int kDim>
  static void pack_query(Query* packed, const Element* query) {
    constexpr int kDone = kDim / kStep * kStep;
    for (int d = 0; d < kDone; d += kStep) store(packed + d, load_keys<kStep>(query + d));
    if constexpr (kDone < kDim) store(packed + kDone, load_keys<kDim - kDone>(query + kDone));
  }

  // Adds to sums[i] what the lanes of keys[i] and the query contribute to their dot product.
  template <int kCount>
  static void dots(Vec* sums, const Pair* keys, const Query* query) {
    const Vec first = load_for<kCount>(query);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) sums[i] = Simd::fma(keys[i].first, first, sums[i]);
    const Vec second = load_for<kCount>(query + Simd::kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) sums[i] = Simd::fma(keys[i].second, second, sums[i]);
  }

  static void store_weights(Weight* at, Vec weights) { Simd::store(at, weights); }

  // Dims [dim, dim + kWidth) of the token at `v` and, if `whole`, the one after it.
  template <int kDim>
  static Pair load_values(const Element* v, int dim, bool whole) {
    if constexpr (kPairedV<Element>) {
      Pair pair;
      Simd::template load_pair<kStep>(v + 2 * dim, pair.first, pair.second);
      return pair;
    } else {
      return {Simd::load(v + dim), whole ? Simd::load(v + dim + kDim) : Simd::zero()};
    }
  }

  // Adds to sums[i] the values[i] of two tokens times the tokens' weights.
  template <int kCount>
  static void mix(Vec* sums, const Pair* values, const Weight* weights) {
    const Vec first = Simd::broadcast(weights[0]);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) sums[i] = Simd::fma(values[i].first, first, sums[i]);
    const Vec second = Simd::broadcast(weights[1]);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) sums[i] = Simd::fma(values[i].second, second, sums[i]);
  }

 private:
  template <int kUses>
  static Vec load_for(const float* at) {
    return kUses > 1 ? held(Simd::load(at)) : Simd::load(at);
  }
  static void store(Query* at, const Pair& pair) {
    Simd::store(at, pair.first);
    Simd::store(at + Simd::kWidth, pair.second);
  }
};

}  // namespace
}  // namespace neo
