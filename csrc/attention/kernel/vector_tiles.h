// The two products over one tile with vectors of floats (or with a dot product of element pairs): what all policies but
// AMX use. For the files of one instruction set only: all is local to the file that includes it.
//
// `Math` names the Element, the Simd and how elements are multiplied:
//   Query            what a query element is kept as; kQuerySize of them for a head
//   Keys             one step of K, kStep elements, ready to multiply; load_keys<kCount>(pointer)
//   dot(sum, keys, query)
//   Weight           what a softmax weight is kept as; store_weights(Weight*, Vec)
//   Values           kWidth dims of two tokens; load_values(...), PairWeight, pair_weight(Weight*), mix(sum, values, w)
#pragma once

#include "attention/kernel/attend.h"
#include "attention/kernel/scratch.h"

namespace neo {
namespace {

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// The largest divisor of `n` that is at most `limit`.
constexpr int divisor_up_to(int n, int limit) {
  int result = 1;
  for (int i = 1; i <= limit; ++i) {
    if (n % i == 0) result = i;
  }
  return result;
}

template <class MathType, int kHeadDim>
class VectorTiles {
 public:
  using Math = MathType;
  using Element = typename Math::Element;
  using Simd = typename Math::Simd;
  using Vec = typename Simd::Vec;
  static constexpr int kDim = kHeadDim;

  float* scores;  // [head][kMaxBlock]
  float* maxima;  // [head]
  float* sums;    // [head][kWidth], to be added up
  float* values;  // [head][kDim], weighted

  VectorTiles(void* memory, int group, int block_size) : group_(group), block_size_(block_size) {
    Scratch scratch(memory);
    const int heads = group + kMaxHeads - 1;  // the last heads' products may be padded
    queries_ = scratch.take<typename Math::Query>(heads * kQuerySize);
    scores = scratch.take<float>(heads * kMaxBlock);
    weights_ = scratch.take<typename Math::Weight>(heads * kMaxBlock);
    maxima = scratch.take<float>(heads);
    sums = scratch.take<float>(heads * kWidth);
    values = scratch.take<float>(heads * kDim);
    for (int i = 0; i < heads * kQuerySize; ++i) queries_[i] = typename Math::Query{};
    for (int i = 0; i < heads * kMaxBlock; ++i) weights_[i] = typename Math::Weight{};
    for (int i = 0; i < heads * kDim; ++i) values[i] = 0;
  }

  void start_item(const Element* queries) {
    for (int h = 0; h < group_; ++h) {
      Math::template pack_query<kDim>(queries_ + h * kQuerySize, queries + h * kDim);
      maxima[h] = kLowest;
      Simd::store(sums + h * kWidth, Simd::zero());
      for (int d = 0; d < kDim; d += kWidth) Simd::store(values + h * kDim + d, Simd::zero());
    }
  }

  void rescale(int head, Vec factor) {
    Simd::store(sums + head * kWidth, Simd::mul(Simd::load(sums + head * kWidth), factor));
    float* v = values + head * kDim;
    for (int d = 0; d < kDim; d += kWidth) Simd::store(v + d, Simd::mul(Simd::load(v + d), factor));
  }

  void store_weights(int head, int token, Vec weights) {
    Math::store_weights(weights_ + head * kMaxBlock + token, weights);
  }

  // scores[h][t] = q[h] . k[t], and garbage for tokens past num_tokens.
  void score(const Element* k, int num_tokens, Prefetch& prefetch) {
    for_head_runs(prefetch, [&](auto count, int head, auto& ahead) {
      constexpr int kHeads = decltype(count)::value;
      for (int t = 0; t < num_tokens; t += kWidth / kHeads) score_run<kHeads>(k, head, t, ahead);
    });
  }

  // values[h][d] += sum over t of weights[h][t] * v[t][d]
  void accumulate(const Element* v, int num_tokens, Prefetch& prefetch) {
    for_head_runs(prefetch, [&](auto count, int head, auto& ahead) {
      constexpr int kHeads = decltype(count)::value;
      constexpr int kVecs = divisor_up_to(kDim / kWidth, Simd::kAccumulators / kHeads);
      for (int d = 0; d < kDim; d += kVecs * kWidth) accumulate_run<kHeads, kVecs>(v, head, d, num_tokens, ahead);
    });
  }

 private:
  static constexpr int kWidth = Simd::kWidth;
  static constexpr int kMaxHeads = 4;
  static constexpr int kStep = Math::kStep;
  static constexpr int kSteps = (kDim + kStep - 1) / kStep;
  static constexpr int kQuerySize = kSteps * kStep;

  // Heads share each load of K and V in runs of 4, 2 or 1. Only the first run over a tile reads it from memory.
  template <class Body>
  void for_head_runs(Prefetch& prefetch, Body body) {
    NoPrefetch none;
    const auto run = [&](auto& ahead, int head) {
      const int left = group_ - head;
      if (left >= 3) {
        body(Count<4>(), head, ahead);
        return 4;
      }
      if (left == 2) {
        body(Count<2>(), head, ahead);
        return 2;
      }
      body(Count<1>(), head, ahead);
      return 1;
    };
    int head = run(prefetch, 0);
    while (head < group_) head += run(none, head);
  }

  // kWidth scores: of kHeads heads with kWidth / kHeads tokens each.
  template <int kHeads, class Ahead>
  void score_run(const Element* k, int head, int token, Ahead& ahead) {
    Vec dots[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) dots[i] = Simd::zero();
    const Element* keys = k + token * kDim;
    const typename Math::Query* queries = queries_ + head * kQuerySize;
    for (int step = 0; step < kDim / kStep; ++step) {
      score_step<kHeads, kStep>(dots, keys + step * kStep, queries + step * kStep, step, ahead);
    }
    if constexpr (kDim % kStep != 0) {
      constexpr int kDone = kDim / kStep * kStep;
      score_step<kHeads, kDim - kDone>(dots, keys + kDone, queries + kDone, kDim / kStep, ahead);
    }
    Simd::template store_sums<kHeads>(dots, scores + head * kMaxBlock + token, kMaxBlock);
  }

  template <int kHeads, int kCount, class Ahead>
  void score_step(Vec* dots, const Element* keys, const typename Math::Query* queries, int step, Ahead& ahead) {
    constexpr int kTokens = kWidth / kHeads;
    constexpr int kBytes = kTokens * kStep * static_cast<int>(sizeof(Element));
    if constexpr (kBytes >= kCacheLine) {
      ahead.template step<kBytes / kCacheLine>();
    } else if (step % (kCacheLine / kBytes) == 0) {
      ahead.template step<1>();
    }
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      const auto key = Math::template load_keys<kCount>(keys + t * kDim);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        dots[h * kTokens + t] = Math::dot(dots[h * kTokens + t], key, queries + h * kQuerySize);
      }
    }
  }

  template <int kHeads, int kVecs, class Ahead>
  void accumulate_run(const Element* v, int head, int dim, int num_tokens, Ahead& ahead) {
    constexpr int kPairBytes = 2 * kVecs * kWidth * static_cast<int>(sizeof(Element));
    Vec mixed[kHeads][kVecs];
    float* at = values + head * kDim + dim;
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 16
      for (int i = 0; i < kVecs; ++i) mixed[h][i] = Simd::load(at + h * kDim + i * kWidth);
    }
    const typename Math::Weight* weights = weights_ + head * kMaxBlock;
    for (int t = 0; t < num_tokens; t += 2) {
      if constexpr (kPairBytes >= kCacheLine) {
        ahead.template step<kPairBytes / kCacheLine>();
      } else if (t % (2 * kCacheLine / kPairBytes) == 0) {
        ahead.template step<1>();
      }
      const bool whole = t + 1 < num_tokens;
#pragma GCC unroll 16
      for (int i = 0; i < kVecs; ++i) {
        const auto pair = Math::template load_values<kDim>(v, t, dim + i * kWidth, whole);
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h) {
          mixed[h][i] = Math::mix(mixed[h][i], pair, weights + h * kMaxBlock + t);
        }
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 16
      for (int i = 0; i < kVecs; ++i) Simd::store(at + h * kDim + i * kWidth, mixed[h][i]);
    }
  }

  int group_;
  int block_size_;
  typename Math::Query* queries_;   // [head][kQuerySize]
  typename Math::Weight* weights_;  // [head][kMaxBlock]
};

}  // namespace
}  // namespace neo
