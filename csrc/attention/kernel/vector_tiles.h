// The two products over one tile with vectors of floats: what all policies but AMX use. For the files of one
// instruction set only: all is local to the file that includes it.
//
// `Math` names the Element, the Simd and how elements are multiplied:
//   Query            what a query element is kept as; kQuerySize of them for a head
//   Keys             one step of K, kStep elements, ready to multiply; load_keys<kCount>(pointer)
//   dot(sum, keys, query)
//   Weight           what a softmax weight is kept as; store_weights(Weight*, Vec)
//   Values           kWidth dims of two tokens; load_values(...), PairWeight, pair_weight(Weight*), mix(sum, values, w)
#pragma once

#include "attention/kernel/attend.h"
#include "attention/kernel/online_softmax.h"
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
  // How far ahead of its use the KV is asked for: 24 KiB, a tile at least. Further ahead it falls out of the first
  // cache again, which costs attention over few heads a quarter of its speed.
  static constexpr int kTokensAhead = 24 * 1024 / (2 * kHeadDim * static_cast<int>(sizeof(Element)));

  float* scores;  // [head][kChunk]
  float* maxima;  // [head]
  float* sums;    // [head][kWidth], to be added up
  float* values;  // [head][kDim], weighted

  VectorTiles(void* memory, int group, int block_size) : group_(group), block_size_(block_size) {
    Scratch scratch(memory);
    const int heads = group + kMaxHeads - 1;  // the last heads' products may be padded
    queries_ = scratch.take<typename Math::Query>(heads * kQuerySize);
    scores = scratch.take<float>(heads * kChunk);
    weights_ = scratch.take<typename Math::Weight>(heads * kChunk);
    maxima = scratch.take<float>(heads);
    sums = scratch.take<float>(heads * kWidth);
    values = scratch.take<float>(heads * kDim);
    for (int i = 0; i < heads * kQuerySize; ++i) queries_[i] = typename Math::Query{};
    for (int i = 0; i < heads * kChunk; ++i) weights_[i] = typename Math::Weight{};
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
    Math::store_weights(weights_ + head * kChunk + token, weights);
  }

  float maximum(int head) const { return maxima[head]; }
  float sum(int head) const { return Simd::reduce_add(Simd::load(sums + head * kWidth)); }

  void attend(const Chunk<Element>& chunk, float scale) {
    score(chunk);
    online_softmax(*this, group_, chunk.num_tokens, scale);
    accumulate(chunk);
  }

  // scores[h][t] = q[h] . k[t], and garbage for tokens past num_tokens.
  void score(const Chunk<Element>& chunk) {
    for_head_runs([&](auto num_heads, auto first_run, int head) {
      constexpr int kHeads = decltype(num_heads)::value;
      for (int i = 0; i < chunk.num_tiles; ++i) {
        const int left = chunk.num_tokens - i * block_size_;
        const int num_tokens = left < block_size_ ? left : block_size_;
        float* to = scores + head * kChunk + i * block_size_;
        for (int t = 0; t < num_tokens; t += kWidth / kHeads) {
          const int64_t at = t * kDim;
          score_run<kHeads, first_run.value>(chunk.tiles[i] + at, chunk.ahead[i] + at, queries_ + head * kQuerySize,
                                             to + t);
        }
      }
    });
  }

  // values[h][d] += sum over t of weights[h][t] * v[t][d]
  void accumulate(const Chunk<Element>& chunk) {
    for_head_runs([&](auto num_heads, auto first_run, int head) {
      constexpr int kHeads = decltype(num_heads)::value;
      constexpr int kVecs = divisor_up_to(kDim / kWidth, Simd::kAccumulators / kHeads);
      for (int d = 0; d < kDim; d += kVecs * kWidth) accumulate_run<kHeads, kVecs, first_run.value>(chunk, head, d);
    });
  }

 private:
  static constexpr int kWidth = Simd::kWidth;
  static constexpr int kMaxHeads = Simd::kMaxHeads;
  static constexpr int kStep = Math::kStep;
  static constexpr int kSteps = (kDim + kStep - 1) / kStep;
  static constexpr int kQuerySize = kSteps * kStep;

  // Heads share each load of K and V in runs of 8, 4, 2 or 1, the last run padded where that costs less. Only the first
  // run over a chunk reads it from memory.
  template <class Body>
  void for_head_runs(Body body) {
    int head = run_heads(0, Count<true>(), body);
    while (head < group_) head += run_heads(head, Count<false>(), body);
  }

  template <class FirstRun, class Body>
  int run_heads(int head, FirstRun first_run, Body& body) {
    const int left = group_ - head;
    if constexpr (kMaxHeads == 8) {
      if (left >= 7) {
        body(Count<8>(), first_run, head);
        return 8;
      }
    }
    if (left >= 3) {
      body(Count<4>(), first_run, head);
      return 4;
    }
    if (left == 2) {
      body(Count<2>(), first_run, head);
      return 2;
    }
    body(Count<1>(), first_run, head);
    return 1;
  }

  // kWidth scores: of kHeads heads with kWidth / kHeads tokens each.
  template <int kHeads, bool kAsk>
  void score_run(const Element* keys, const Element* ahead, const typename Math::Query* queries, float* to) {
    Vec dots[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) dots[i] = Simd::zero();
    for (int d = 0; d + kStep <= kDim; d += kStep) {
      score_step<kHeads, kStep, kAsk>(dots, keys + d, ahead + d * (kWidth / kHeads), queries + d);
    }
    if constexpr (kDim % kStep != 0) {
      constexpr int kDone = kDim / kStep * kStep;
      score_step<kHeads, kDim - kDone, kAsk>(dots, keys + kDone, ahead + kDone * (kWidth / kHeads), queries + kDone);
    }
    Simd::template store_sums<kHeads>(dots, to, kChunk);
  }

  // `ahead` is asked for in the order of memory, not in that of the keys: the processor's own prefetch follows.
  template <int kHeads, int kCount, bool kAsk>
  void score_step(Vec* dots, const Element* keys, const Element* ahead, const typename Math::Query* queries) {
    constexpr int kTokens = kWidth / kHeads;
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      if constexpr (kAsk) ask_for<kCount>(ahead, t * kCount);
      const auto key = Math::template load_keys<kCount>(keys + t * kDim);
#pragma GCC unroll 8
      for (int h = 0; h < kHeads; ++h) {
        dots[h * kTokens + t] = Math::dot(dots[h * kTokens + t], key, queries + h * kQuerySize);
      }
    }
  }

  // The cache lines that begin in elements [index, index + kCount) of `base`, which begins a line.
  template <int kCount>
  static void ask_for(const Element* base, int index) {
    constexpr int kPerLine = kCacheLine / static_cast<int>(sizeof(Element));
#pragma GCC unroll 4
    for (int i = (index + kPerLine - 1) / kPerLine * kPerLine; i < index + kCount; i += kPerLine) prefetch(base + i);
  }

  template <int kHeads, int kVecs, bool kAsk>
  void accumulate_run(const Chunk<Element>& chunk, int head, int dim) {
    Vec mixed[kHeads][kVecs];
    float* at = values + head * kDim + dim;
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 16
      for (int i = 0; i < kVecs; ++i) mixed[h][i] = Simd::load(at + h * kDim + i * kWidth);
    }
    for (int tile = 0; tile < chunk.num_tiles; ++tile) {
      const int left = chunk.num_tokens - tile * block_size_;
      const int num_tokens = left < block_size_ ? left : block_size_;
      const Element* v = chunk.tiles[tile] + block_size_ * kDim;
      const Element* ahead = chunk.ahead[tile] + block_size_ * kDim + dim * block_size_;
      const typename Math::Weight* weights = weights_ + head * kChunk + tile * block_size_;
      for (int t = 0; t < num_tokens; t += 2) {
        const bool whole = t + 1 < num_tokens;
#pragma GCC unroll 16
        for (int i = 0; i < kVecs; ++i) {
          if constexpr (kAsk) ask_for<2 * kWidth>(ahead + t * kVecs * kWidth, i * 2 * kWidth);
          const auto pair = Math::template load_values<kDim>(v, t, dim + i * kWidth, whole);
#pragma GCC unroll 8
          for (int h = 0; h < kHeads; ++h) {
            mixed[h][i] = Math::mix(mixed[h][i], pair, weights + h * kChunk + t);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 16
      for (int i = 0; i < kVecs; ++i) Simd::store(at + h * kDim + i * kWidth, mixed[h][i]);
    }
  }

  int group_;
  int block_size_;
  typename Math::Query* queries_;   // [head][kQuerySize]
  typename Math::Weight* weights_;  // [head][kChunk]
};

}  // namespace
}  // namespace neo
