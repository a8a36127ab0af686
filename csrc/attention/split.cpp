#include "attention/split.h"

#include <algorithm>

namespace neo {

namespace {

// A cut costs two threads the start and the end of an item and one of them a merge: about what reading this takes.
constexpr int64_t kCutCostBytes = 48 * 1024;

// Items of less than this cost more than they help.
constexpr int64_t kSmallestItemBytes = 64 * 1024;

// Of what is left of a share, an item takes at most one part in this many.
constexpr int64_t kItemPart = 2;

// Items end where a multiple of this many tokens ends, which attention takes at one go.
constexpr int64_t kItemTokens = 64;

int64_t bytes_per_token(const Geometry& g) { return 2 * g.head_dim * (g.dtype == DType::kF32 ? 4 : 2); }

// Walks the (row, kv head) pairs of a lap in order, with their place in one long line of tokens.
class Pairs {
 public:
  explicit Pairs(const LapShape& shape) : shape_(shape) {}

  int32_t row() const { return row_; }
  int32_t kv_head() const { return kv_head_; }
  int64_t begin() const { return begin_; }
  int64_t end() const { return begin_ + shape_.lengths[row_]; }

  void next() {
    begin_ = end();
    if (++kv_head_ == shape_.geometry.num_kv_heads) {
      kv_head_ = 0;
      ++row_;
    }
  }

 private:
  const LapShape& shape_;
  int32_t row_ = 0;
  int32_t kv_head_ = 0;
  int64_t begin_ = 0;
};

int64_t count_tokens(const LapShape& shape) {
  int64_t total = 0;
  for (int b = 0; b < shape.num_rows; ++b)
    total += static_cast<int64_t>(shape.lengths[b]) * shape.geometry.num_kv_heads;
  return total;
}

// Where each thread's share ends, in the line of tokens.
std::vector<int64_t> share_ends(const LapShape& shape, int num_threads) {
  const int64_t total = count_tokens(shape);
  const int64_t tolerance = std::max(kCutCostBytes / bytes_per_token(shape.geometry), total / num_threads / 100);
  std::vector<int64_t> ends;
  Pairs pairs(shape);
  for (int thread = 1; thread < num_threads && total > 0; ++thread) {
    const int64_t even = total * thread / num_threads;
    while (pairs.end() <= even) pairs.next();
    const int64_t before = even - pairs.begin(), after = pairs.end() - even;
    if (std::min(before, after) <= tolerance) {
      ends.push_back(before < after ? pairs.begin() : pairs.end());
    } else {
      ends.push_back(even - before % shape.geometry.block_size);
    }
  }
  ends.resize(num_threads, total);
  return ends;
}

// Where an item that begins at token `first` of a (row, kv head) ends, if `left` tokens are left of its thread's share
// and `stop` is as far as it may go.
int64_t item_end(const Geometry& g, int64_t first, int64_t stop, int64_t left) {
  const int64_t longest = std::max(left / kItemPart, kSmallestItemBytes / bytes_per_token(g));
  if (stop - first <= longest + longest / 2) return stop;
  return std::min(stop, first + (longest + kItemTokens - 1) / kItemTokens * kItemTokens);
}

// Appends tokens [first, stop) of a (row, kv head) as one item.
void add_item(Split& split, const Pairs& pairs, int64_t first, int64_t stop) {
  Item item{pairs.row(), pairs.kv_head(), static_cast<int32_t>(first), static_cast<int32_t>(stop), -1};
  if (first > 0 || stop < pairs.end() - pairs.begin()) {
    item.partial = static_cast<int32_t>(split.cut_of_slot.size());
    if (first == 0) split.cuts.push_back({item.row, item.kv_head, item.partial, 0});
    split.cuts.back().num_slots++;
    split.cut_of_slot.push_back(static_cast<int32_t>(split.cuts.size()) - 1);
  }
  split.items.push_back(item);
}

}  // namespace

Split split_lap(const LapShape& shape, int num_threads) {
  const std::vector<int64_t> ends = share_ends(shape, num_threads);
  Split split;
  split.thread_start.push_back(0);
  Pairs pairs(shape);
  int64_t position = 0;
  for (const int64_t end : ends) {
    while (position < end) {
      const int64_t first = position - pairs.begin();
      const int64_t stop = item_end(shape.geometry, first, std::min(end, pairs.end()) - pairs.begin(), end - position);
      add_item(split, pairs, first, stop);
      position = pairs.begin() + stop;
      if (position == pairs.end()) pairs.next();
    }
    split.thread_start.push_back(static_cast<int32_t>(split.items.size()));
  }
  return split;
}

}  // namespace neo
