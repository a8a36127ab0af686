// The split of a lap over threads: nothing left out, nothing twice, shares that are even.
#include "attention/split.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include "tests/check.h"

namespace neo::test {
namespace {

LapShape shape_of(const std::vector<int32_t>& lengths, int num_kv_heads) {
  LapShape shape{};
  shape.geometry = {1, 1, num_kv_heads, num_kv_heads, 128, 16, DType::kBF16};
  shape.num_rows = static_cast<int32_t>(lengths.size());
  shape.lengths = lengths.data();
  return shape;
}

// Items of a (row, kv head) follow each other from its first token to its last; partial results are counted right.
void check_complete(const Split& split, const std::vector<int32_t>& lengths, int num_kv_heads) {
  std::map<std::pair<int, int>, int> attended;
  std::map<std::pair<int, int>, int> num_partials;
  for (const Item& item : split.items) {
    int& next = attended[{item.row, item.kv_head}];
    CHECK(item.first_token == next, "row %d: item begins at %d, expected %d", item.row, item.first_token, next);
    CHECK(item.first_token % 16 == 0, "row %d: item begins at %d, inside a block", item.row, item.first_token);
    CHECK(item.stop_token > item.first_token, "row %d: empty item at %d", item.row, item.first_token);
    next = item.stop_token;
    const bool whole = item.first_token == 0 && item.stop_token == lengths[item.row];
    CHECK(whole == (item.partial < 0), "row %d: partial is %d", item.row, item.partial);
    if (!whole) ++num_partials[{item.row, item.kv_head}];
  }
  CHECK(attended.size() == lengths.size() * num_kv_heads, "%zu pairs attended", attended.size());
  for (const auto& [pair, tokens] : attended) {
    CHECK(tokens == lengths[pair.first], "row %d: %d tokens attended", pair.first, tokens);
  }
  for (const Cut& cut : split.cuts) {
    const int expected = num_partials[{cut.row, cut.kv_head}];
    CHECK(cut.num_slots == expected, "row %d: %d slots, expected %d", cut.row, cut.num_slots, expected);
  }
}

double most_over_mean(const Split& split, int num_threads) {
  int64_t most = 0, total = 0;
  for (int thread = 0; thread < num_threads; ++thread) {
    int64_t tokens = 0;
    for (int i = split.thread_start[thread]; i < split.thread_start[thread + 1]; ++i) {
      tokens += split.items[i].stop_token - split.items[i].first_token;
    }
    most = std::max(most, tokens);
    total += tokens;
  }
  return static_cast<double>(most) * num_threads / static_cast<double>(total);
}

void test_random_lengths() {
  std::mt19937 random(1);
  for (int i = 0; i < 500; ++i) {
    const int num_kv_heads = 1 + static_cast<int>(random() % 8), num_threads = 1 + static_cast<int>(random() % 32);
    std::vector<int32_t> lengths(1 + random() % 20);
    for (int32_t& length : lengths) length = 1 + static_cast<int32_t>(random() % (random() % 4 ? 300 : 40000));
    check_complete(split_lap(shape_of(lengths, num_kv_heads), num_threads), lengths, num_kv_heads);
  }
}

void test_shares_are_even() {
  const std::vector<std::vector<int32_t>> laps = {{131072},
                                                  {1024, 1024, 1024},
                                                  {100000, 17, 300, 5000},
                                                  std::vector<int32_t>(256, 128),
                                                  std::vector<int32_t>(8, 1024)};
  for (const std::vector<int32_t>& lengths : laps) {
    const double uneven = most_over_mean(split_lap(shape_of(lengths, 8), 14), 14);
    CHECK(uneven <= 1.1, "the largest of 14 shares of %zu rows is %.2f of the mean", lengths.size(), uneven);
  }
}

// A cut would cost more than it saves.
void test_short_rows_stay_whole() {
  for (const int num_threads : {2, 4, 14}) {
    CHECK(split_lap(shape_of({16, 16, 16}, 2), num_threads).cuts.empty(), "cut for %d threads", num_threads);
  }
  CHECK(split_lap(shape_of(std::vector<int32_t>(256, 128), 8), 8).cuts.empty(), "256 equal rows are cut for 8 threads");
}

}  // namespace
}  // namespace neo::test

int main() {
  neo::test::test_random_lengths();
  neo::test::test_shares_are_even();
  neo::test::test_short_rows_stay_whole();
  return failed_checks ? 1 : 0;
}
