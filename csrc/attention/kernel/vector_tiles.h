// The two products over one tile with vectors of floats: what all policies but AMX use. For the files of one
// instruction set only: all is local to the file that includes it.
//
// `Math` names the Element, the Simd and how elements are multiplied:
//   Query            what a query element is kept as; kQuerySize of them for a head
//   Keys             one step of K, kStep elements, ready to multiply; load_keys<kCount>(pointer)
//   dots<kCount>(sums, keys, query)
//   Weight           what a softmax weight is kept as; store_weights(Weight*, Vec)
//   Values           kWidth dims of two tokens; load_values(...)
//   mix<kCount>(sums, values, weights)
#pragma once

#include "attention/kernel/attend.h"
#include "attention/kernel/lookahead.h"
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
  // Nearer it comes too late, further it falls out of the first cache.
  static constexpr int kTokensAhead = Simd::kAsksIntoBothCaches ? kChunk + 16 : kChunk;

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
    ahead_ = Ahead(chunk, block_size_);
    for_head_runs([&](auto num_heads, auto first_run, int head) {
      constexpr int kHeads = decltype(num_heads)::value;
      for (int i = 0; i < chunk.num_tiles; ++i) {
        const int left = chunk.num_tokens - i * block_size_;
        const int num_tokens = left < block_size_ ? left : block_size_;
        float* to = scores + head * kChunk + i * block_size_;
        for (int t = 0; t < num_tokens; t += kWidth / kHeads) {
          score_run<kHeads, first_run.value>(chunk.tiles[i] + t * kDim, (i * block_size_ + t) * kRowBytes,
                                             queries_ + head * kQuerySize, to + t);
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
  using Ahead = Lookahead<Element, kDim, Simd::kAsksIntoBothCaches>;

  static constexpr int kWidth = Simd::kWidth;
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(Element));
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

  // kWidth scores: of kHeads heads with kWidth / kHeads tokens each. `bytes` of the chunk were read before.
  template <int kHeads, bool kAsk>
  void score_run(const Element* keys, unsigned bytes, const typename Math::Query* queries, float* to) {
    constexpr int kTokens = kWidth / kHeads;
    bytes = Ahead::template in_turns<kTokens * kRowBytes>(bytes);
    Vec dots[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) dots[i] = Simd::zero();
#pragma GCC unroll 8
    for (int d = 0; d + kStep <= kDim; d += kStep) {
      score_step<kHeads, kStep, kAsk>(dots, keys + d, bytes + d * kTokens * sizeof(Element), queries + d);
    }
    if constexpr (kDim % kStep != 0) {
      constexpr int kDone = kDim / kStep * kStep;
      score_step<kHeads, kDim - kDone, kAsk>(dots, keys + kDone, bytes + kDone * kTokens * sizeof(Element),
                                             queries + kDone);
    }
    Simd::template store_sums<kHeads>(dots, to, kChunk);
  }

  // What is kept in registers is the queries or the keys, whichever are fewer.
  template <int kHeads, int kCount, bool kAsk>
  void score_step(Vec* dots, const Element* keys, unsigned bytes, const typename Math::Query* queries) {
    constexpr int kTokens = kWidth / kHeads;
    if constexpr (kAsk) ahead_.template ask_beside<kTokens * kCount * sizeof(Element)>(bytes);
    if constexpr (kHeads <= kTokens) {
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const auto key = Math::template load_keys<kCount>(keys + t * kDim);
#pragma GCC unroll 8
        for (int h = 0; h < kHeads; ++h) {
          Math::template dots<1>(dots + h * kTokens + t, &key, queries + h * kQuerySize);
        }
      }
    } else {
      typename Math::Keys key[kTokens];
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        key[t] = Math::template load_keys<kCount>(keys + t * kDim);
      }
#pragma GCC unroll 8
      for (int h = 0; h < kHeads; ++h) {
        Math::template dots<kTokens>(dots + h * kTokens, key, queries + h * kQuerySize);
      }
    }
  }

  // Two tokens' values, or one's if not `whole`, into what is mixed. Here, too, registers keep what is fewer.
  template <int kHeads, int kVecs>
  static void mix_pair(Vec (&mixed)[kHeads][kVecs], const Element* v, int dim, bool whole,
                       const typename Math::Weight* weights) {
    if constexpr (kHeads <= kVecs) {
#pragma GCC unroll 16
      for (int i = 0; i < kVecs; ++i) {
        const auto pair = Math::template load_values<kDim>(v, dim + i * kWidth, whole);
#pragma GCC unroll 8
        for (int h = 0; h < kHeads; ++h) Math::template mix<1>(&mixed[h][i], &pair, weights + h * kChunk);
      }
    } else {
      typename Math::Values pairs[kVecs];
#pragma GCC unroll 16
      for (int i = 0; i < kVecs; ++i) pairs[i] = Math::template load_values<kDim>(v, dim + i * kWidth, whole);
#pragma GCC unroll 8
      for (int h = 0; h < kHeads; ++h) Math::template mix<kVecs>(mixed[h], pairs, weights + h * kChunk);
    }
  }

  template <int kHeads, int kVecs, bool kAsk>
  void accumulate_run(const Chunk<Element>& chunk, int head, int dim) {
    constexpr unsigned kPairBytes = 2 * kVecs * kWidth * sizeof(Element);
    Vec mixed[kHeads][kVecs];
    float* at = values + head * kDim + dim;
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 16
      for (int i = 0; i < kVecs; ++i) mixed[h][i] = Simd::load(at + h * kDim + i * kWidth);
    }
    unsigned bytes = (kDim + dim) * chunk.num_tokens * sizeof(Element);
    for (int tile = 0; tile < chunk.num_tiles; ++tile) {
      const int left = chunk.num_tokens - tile * block_size_;
      const int num_tokens = left < block_size_ ? left : block_size_;
      const Element* v = chunk.tiles[tile] + block_size_ * kDim;
      const typename Math::Weight* weights = weights_ + head * kChunk + tile * block_size_;
      for (int t = 0; t < num_tokens; t += 2) {
        if constexpr (kAsk) ahead_.template ask_beside<kPairBytes>(bytes);
        bytes += kPairBytes;
        mix_pair(mixed, v + t * kDim, dim, t + 1 < num_tokens, weights + t);
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
  Ahead ahead_;
  typename Math::Query* queries_;   // [head][kQuerySize]
  typename Math::Weight* weights_;  // [head][kChunk]
};

}  // namespace
}  // namespace neo
