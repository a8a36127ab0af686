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

template <class SimdType, class ElementType>
struct FloatMath {
  using Simd = SimdType;
  using Element = ElementType;
  using Vec = typename Simd::Vec;
  using Query = float;
  using Weight = float;
  static constexpr int kStep = 2 * Simd::kWidth;

  // Two-byte elements come as (even ones, odd ones), which the query is packed alike to match.
  struct Pair {
    Vec first, second;
  };
  using Keys = Pair;
  using Values = Pair;

  template <int kCount>
  static Pair load_keys(const Element* at) {
    Pair pair;
    Simd::template load_pair<kCount>(at, pair.first, pair.second);
    return pair;
  }

  template <int kDim>
  static void pack_query(Query* packed, const Element* query) {
    constexpr int kDone = kDim / kStep * kStep;
    for (int d = 0; d < kDone; d += kStep) store(packed + d, load_keys<kStep>(query + d));
    if constexpr (kDone < kDim) store(packed + kDone, load_keys<kDim - kDone>(query + kDone));
  }

  static Pair load_query(const Query* at) { return {Simd::load(at), Simd::load(at + Simd::kWidth)}; }

  static Vec dot(Vec sum, const Pair& keys, const Pair& query) {
    return Simd::fma(keys.second, query.second, Simd::fma(keys.first, query.first, sum));
  }

  static void store_weights(Weight* at, Vec weights) { Simd::store(at, weights); }

  // Dims [dim, dim + kWidth) of tokens `token` and, if `whole`, the one after it.
  template <int kDim>
  static Pair load_values(const Element* v, int token, int dim, bool whole) {
    if constexpr (kPairedV<Element>) {
      return load_keys<kStep>(v + token * kDim + 2 * dim);
    } else {
      const Element* at = v + token * kDim + dim;
      return {Simd::load(at), whole ? Simd::load(at + kDim) : Simd::zero()};
    }
  }

  // Of two tokens.
  static Pair load_weights(const Weight* at) { return {Simd::broadcast(at[0]), Simd::broadcast(at[1])}; }

  static Vec mix(Vec sum, const Pair& values, const Pair& weights) {
    return Simd::fma(values.second, weights.second, Simd::fma(values.first, weights.first, sum));
  }

 private:
  static void store(Query* at, const Pair& pair) {
    Simd::store(at, pair.first);
    Simd::store(at + Simd::kWidth, pair.second);
  }
};

}  // namespace
}  // namespace neo
