// Attention against float64, for each instruction set that runs here.
#include "attention/attention.h"

#include <cmath>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "attention/policy.h"
#include "tests/attention_case.h"
#include "tests/check.h"

namespace neo::test {
namespace {

double allowed_error(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return 4e-3;
    case DType::kF16:
      return 1e-3;
    case DType::kF32:
      return 1e-5;
  }
  return 0;
}

// Attends twice: the second time shows that the lap is ready for its next layer.
void check_case(const CaseShape& shape, const Policy& policy, int num_threads, uint32_t seed) {
  AttentionCase problem(shape, seed);
  Lap lap(problem.lap(), num_threads, policy);
  for (int layer = 0; layer < 2; ++layer) {
    problem.reset();
    const LayerMemory memory = problem.memory();
    lap.begin_layer();
    for (int thread = num_threads - 1; thread >= 0; --thread) lap.attend(thread, memory);
    const std::string what = std::string(policy.name) + " threads " + std::to_string(num_threads) + " layer " +
                             std::to_string(layer) + " " + shape.describe();
    const double error = problem.output_error();
    CHECK(error <= allowed_error(shape.dtype), "error %g with %s", error, what.c_str());
    const double lse_error = problem.lse_error();
    CHECK(lse_error <= (shape.dtype == DType::kF32 ? 1e-5 : 1e-3), "lse error %g with %s", lse_error, what.c_str());
  }
}

template <class T>
T pick(std::mt19937& random, std::initializer_list<T> choices) {
  return choices.begin()[random() % choices.size()];
}

int32_t random_length(std::mt19937& random, int block_size) {
  switch (random() % 5) {
    case 0:
      return 1;
    case 1:
      return block_size * (1 + random() % 8);  // full blocks
    case 2:
      return block_size * (random() % 8) + 1;  // a last block of one
    case 3:
      return 2 + random() % (2 * block_size);
    default:
      return 1 + random() % 700;
  }
}

void test_random_shapes(const Policy& policy, int num_cases) {
  std::mt19937 random(20261121);
  for (int i = 0; i < num_cases; ++i) {
    CaseShape shape;
    shape.dtype = pick(random, {DType::kF32, DType::kBF16, DType::kF16});
    shape.head_dim = pick(random, {64, 80, 96, 128, 256});
    shape.block_size = pick(random, {16, 32});
    shape.num_kv_heads = pick(random, {1, 2, 3, 8});
    shape.num_query_heads = shape.num_kv_heads * (1 + random() % (shape.num_kv_heads > 2 ? 8 : 20));
    const int rows = 1 + random() % 5;
    for (int b = 0; b < rows; ++b) shape.lengths.push_back(random_length(random, shape.block_size));
    shape.query_size = pick(random, {1e-4f, 0.1f, 1.0f, 4.0f});
    check_case(shape, policy, pick(random, {1, 2, 3, 7, 14}), random());
  }
}

void test_every_dtype_and_head_dim(const Policy& policy) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const int head_dim : {64, 80, 96, 128, 256}) {
      for (const int group : {1, 2, 3, 4, 5, 6, 7, 8, 16, 17, 71}) {
        check_case({dtype, 2 * group, 2, head_dim, group % 2 ? 16 : 32, {1, 45, 16, 100}}, policy, 3, 7);
      }
    }
  }
}

// One key wins by far: nothing may overflow, and what lost must vanish.
void test_huge_scores(const Policy& policy) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    check_case({dtype, 4, 2, 128, 16, {300, 33}, 100.0f, 100.0f}, policy, 4, 1);
  }
  check_case({DType::kBF16, 4, 2, 128, 16, {300, 33}, 1e15f, 1e15f}, policy, 4, 2);
  check_case({DType::kF32, 4, 2, 128, 16, {300, 33}, 1e15f, 1e15f}, policy, 4, 2);
}

void test_long_sequence(const Policy& policy) {
  check_case({DType::kBF16, 8, 1, 128, 16, {20001}}, policy, 14, 3);
  check_case({DType::kBF16, 2, 2, 64, 32, {131072, 5}}, policy, 14, 4);
}

void test_threads(const Policy& policy) {
  const CaseShape shape{DType::kBF16, 8, 2, 128, 16, {3000, 17, 1, 900}};
  constexpr int kThreads = 4;
  AttentionCase problem(shape, 5);
  Lap lap(problem.lap(), kThreads, policy);
  const LayerMemory memory = problem.memory();
  for (int layer = 0; layer < 20; ++layer) {
    lap.begin_layer();
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) threads.emplace_back([&, i] { lap.attend(i, memory); });
    for (std::thread& thread : threads) thread.join();
    CHECK(problem.output_error() <= allowed_error(shape.dtype), "error %g", problem.output_error());
  }
}

// A lap that fits into the caches is fetched whole, each tile by the thread that is to attend it.
void test_fetch_ahead() {
  AttentionCase problem({DType::kBF16, 4, 2, 64, 16, {100, 1, 32}}, 8);
  constexpr int kThreads = 3, kTiles = 2 * (7 + 1 + 2);
  const Lap lap(problem.lap(), kThreads, find_policy("portable"));
  int num_parts = 0;
  for (int thread = 0; thread < kThreads; ++thread) {
    int part = 0;
    while (lap.fetch_ahead(thread, problem.memory().kv, part)) ++part;
    num_parts += part;
  }
  CHECK(num_parts == kTiles, "%d parts of %d tiles", num_parts, kTiles);
}

template <class Change>
void check_refused(const char* expected, Change change) {
  const AttentionCase problem({DType::kF32, 4, 2, 64, 16, {20, 3}}, 6);
  LapShape shape = problem.lap();
  std::vector<int32_t> lengths(shape.lengths, shape.lengths + shape.num_rows);
  std::vector<int32_t> block_ids(shape.block_ids, shape.block_ids + shape.block_start[shape.num_rows]);
  shape.lengths = lengths.data();
  shape.block_ids = block_ids.data();
  int num_threads = 2;
  change(shape, lengths, block_ids, num_threads);
  try {
    Lap lap(shape, num_threads, find_policy("portable"));
    CHECK(false, "accepted, expected \"%s\"", expected);
  } catch (const std::invalid_argument& error) {
    CHECK(std::strcmp(error.what(), expected) == 0, "\"%s\", expected \"%s\"", error.what(), expected);
  }
}

void test_bad_arguments() {
  using Ints = std::vector<int32_t>;
  check_refused("lengths[1] is 0; expected 1 to 16, what its blocks hold",
                [](LapShape&, Ints& lengths, Ints&, int&) { lengths[1] = 0; });
  check_refused("lengths[0] is 33; expected 1 to 32, what its blocks hold",
                [](LapShape&, Ints& lengths, Ints&, int&) { lengths[0] = 33; });
  check_refused("block_ids[2] is 6; expected 0 to 5", [](LapShape&, Ints&, Ints& ids, int&) { ids[2] = 6; });
  check_refused("block_ids[0] is -1; expected 0 to 5", [](LapShape&, Ints&, Ints& ids, int&) { ids[0] = -1; });
  check_refused("head_dim is 100; expected 64, 80, 96, 128 or 256",
                [](LapShape& s, Ints&, Ints&, int&) { s.geometry.head_dim = 100; });
  check_refused("block_size is 8; expected 16 or 32",
                [](LapShape& s, Ints&, Ints&, int&) { s.geometry.block_size = 8; });
  check_refused("num_query_heads is 5; expected a multiple of num_kv_heads, 2",
                [](LapShape& s, Ints&, Ints&, int&) { s.geometry.num_query_heads = 5; });
  check_refused("scale is -0.5; expected more than 0", [](LapShape& s, Ints&, Ints&, int&) { s.scale = -0.5f; });
  check_refused("num_threads is 0; expected at least 1", [](LapShape&, Ints&, Ints&, int& threads) { threads = 0; });
}

void test_choice_of_policy() {
  CHECK(std::string(available_policies().back()->name) == "portable", "portable is missing or not last");
  for (const Policy* policy : available_policies()) {
    CHECK(&find_policy(policy->name) == policy, "%s finds another", policy->name);
  }
  try {
    find_policy("sse9");
    CHECK(false, "sse9 was found");
  } catch (const std::invalid_argument& error) {
    CHECK(std::strstr(error.what(), "\"sse9\"") && std::strstr(error.what(), "portable"), "%s", error.what());
  }
}

}  // namespace
}  // namespace neo::test

int main(int argc, char** argv) {
  using namespace neo::test;
  const int num_cases = argc > 1 ? std::atoi(argv[1]) : 200;
  test_choice_of_policy();
  test_bad_arguments();
  test_fetch_ahead();
  for (const neo::Policy* policy : neo::available_policies()) {
    const int before = failed_checks;
    test_every_dtype_and_head_dim(*policy);
    test_random_shapes(*policy, num_cases);
    test_huge_scores(*policy);
    test_long_sequence(*policy);
    test_threads(*policy);
    std::printf("%-8s %s\n", policy->name, failed_checks == before ? "ok" : "FAILED");
  }
  return failed_checks ? 1 : 0;
}
