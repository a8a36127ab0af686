// A decode attention problem with random values: host KV in its layout, the rows of a lap, and the float64 answer.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "attention/attention.h"

namespace neo::test {

struct CaseShape {
  DType dtype;
  int num_query_heads;
  int num_kv_heads;
  int head_dim;
  int block_size;
  std::vector<int32_t> lengths;
  float query_size = 1;  // standard deviation of q's elements: the size of the scores
  float key_size = 1;

  std::string describe() const;
};

// Rows of two-byte or four-byte elements, all written with NaN first: what attention must not read is not a number.
class AttentionCase {
 public:
  AttentionCase(const CaseShape& shape, uint32_t seed);

  LapShape lap() const;
  LayerMemory memory();

  // Forgets the newest tokens and the output, so that a layer can be attended again.
  void reset();

  // Norm of the difference from the float64 answer over the norm of the answer.
  double output_error() const;
  // Largest difference of a log-sum-exp from the float64 answer, relative to 1 or the answer, whichever is larger.
  double lse_error() const;

 private:
  void write_tokens(bool newest);
  void solve();
  double key(int row, int token, int kv_head, int dim) const;
  double value(int row, int token, int kv_head, int dim) const;

  CaseShape shape_;
  int64_t element_bytes_;
  int32_t num_blocks_;
  std::vector<int32_t> block_start_;
  std::vector<int32_t> block_ids_;
  std::vector<uint64_t> kv_;  // storage; elements are addressed by bytes
  std::vector<uint64_t> qkv_;
  std::vector<uint64_t> out_;
  std::vector<float> lse_;
  std::vector<std::vector<float>> tokens_;  // by row: [token][kv_head][2][head_dim], as rounded to the dtype
  std::vector<double> answer_;
  std::vector<double> lse_answer_;
};

}  // namespace neo::test
