#include "tests/attention_case.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

namespace neo::test {

namespace {

// A bf16, fp16 or float element as the library stores it.
void store(void* base, DType dtype, int64_t index, float value) {
  if (dtype == DType::kF32) {
    static_cast<float*>(base)[index] = value;
  } else if (dtype == DType::kF16) {
    const _Float16 half = static_cast<_Float16>(value);
    std::memcpy(static_cast<char*>(base) + 2 * index, &half, 2);
  } else {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t high =
        std::isnan(value) ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    std::memcpy(static_cast<char*>(base) + 2 * index, &high, 2);
  }
}

float load(const void* base, DType dtype, int64_t index) {
  if (dtype == DType::kF32) return static_cast<const float*>(base)[index];
  if (dtype == DType::kF16) {
    _Float16 half;
    std::memcpy(&half, static_cast<const char*>(base) + 2 * index, 2);
    return static_cast<float>(half);
  }
  uint16_t high;
  std::memcpy(&high, static_cast<const char*>(base) + 2 * index, 2);
  const uint32_t bits = static_cast<uint32_t>(high) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void fill(std::vector<uint64_t>& storage, DType dtype, float value) {
  const int64_t count = static_cast<int64_t>(storage.size()) * 8 / (dtype == DType::kF32 ? 4 : 2);
  for (int64_t i = 0; i < count; ++i) store(storage.data(), dtype, i, value);
}

}  // namespace

std::string CaseShape::describe() const {
  static const char* const kNames[] = {"f32", "bf16", "f16"};
  std::string text = std::string(kNames[static_cast<int>(dtype)]) + " heads " + std::to_string(num_query_heads) + "/" +
                     std::to_string(num_kv_heads) + " dim " + std::to_string(head_dim) + " block " +
                     std::to_string(block_size) + " q " + std::to_string(query_size) + " k " +
                     std::to_string(key_size) + " lengths";
  for (const int32_t length : lengths) text += " " + std::to_string(length);
  return text;
}

AttentionCase::AttentionCase(const CaseShape& shape, uint32_t seed)
    : shape_(shape), element_bytes_(shape.dtype == DType::kF32 ? 4 : 2) {
  std::mt19937 random(seed);
  const int rows = static_cast<int>(shape.lengths.size());
  block_start_.push_back(0);
  for (const int32_t length : shape.lengths) {
    block_start_.push_back(block_start_.back() + (length + shape.block_size - 1) / shape.block_size);
  }
  num_blocks_ = block_start_.back() + 3;
  block_ids_.resize(num_blocks_);
  std::iota(block_ids_.begin(), block_ids_.end(), 0);
  std::shuffle(block_ids_.begin(), block_ids_.end(), random);
  block_ids_.resize(block_start_.back());

  const int64_t token_elements = 2LL * shape.num_kv_heads * shape.head_dim;
  const int64_t row_elements = (shape.num_query_heads + 2LL * shape.num_kv_heads) * shape.head_dim;
  const int64_t out_elements = static_cast<int64_t>(rows) * shape.num_query_heads * shape.head_dim;
  kv_.resize(num_blocks_ * shape.block_size * token_elements * element_bytes_ / 8);
  qkv_.resize(rows * row_elements * element_bytes_ / 8);
  out_.resize(out_elements * element_bytes_ / 8);
  lse_.resize(static_cast<size_t>(rows) * shape.num_query_heads);

  std::normal_distribution<float> normal;
  const auto rounded = [&](float value) {
    uint64_t cell;
    store(&cell, shape.dtype, 0, value);
    return load(&cell, shape.dtype, 0);
  };
  for (int b = 0; b < rows; ++b) {
    std::vector<float>& tokens = tokens_.emplace_back(shape.lengths[b] * token_elements);
    for (size_t i = 0; i < tokens.size(); ++i) {
      const bool is_key = i / shape.head_dim % 2 == 0;
      tokens[i] = rounded(normal(random) * (is_key ? shape.key_size : 1.0f));
    }
    for (int64_t i = 0; i < static_cast<int64_t>(shape.num_query_heads) * shape.head_dim; ++i) {
      store(qkv_.data(), shape.dtype, b * row_elements + i, normal(random) * shape.query_size);
    }
    for (int h = 0; h < shape.num_kv_heads; ++h) {
      for (int d = 0; d < shape.head_dim; ++d) {
        const int64_t at = b * row_elements + static_cast<int64_t>(shape.num_query_heads + h) * shape.head_dim + d;
        store(qkv_.data(), shape.dtype, at, static_cast<float>(key(b, shape.lengths[b] - 1, h, d)));
        store(qkv_.data(), shape.dtype, at + static_cast<int64_t>(shape.num_kv_heads) * shape.head_dim,
              static_cast<float>(value(b, shape.lengths[b] - 1, h, d)));
      }
    }
  }
  solve();
  reset();
}

double AttentionCase::key(int row, int token, int kv_head, int dim) const {
  return tokens_[row][((static_cast<int64_t>(token) * shape_.num_kv_heads + kv_head) * 2) * shape_.head_dim + dim];
}

double AttentionCase::value(int row, int token, int kv_head, int dim) const {
  return tokens_[row][((static_cast<int64_t>(token) * shape_.num_kv_heads + kv_head) * 2 + 1) * shape_.head_dim + dim];
}

void AttentionCase::reset() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  fill(kv_, shape_.dtype, nan);
  fill(out_, shape_.dtype, nan);
  std::fill(lse_.begin(), lse_.end(), nan);
  const int64_t tile = 2LL * shape_.block_size * shape_.head_dim;
  for (size_t b = 0; b < shape_.lengths.size(); ++b) {
    for (int token = 0; token < shape_.lengths[b] - 1; ++token) {
      const int64_t block = block_ids_[block_start_[b] + token / shape_.block_size];
      const int place = token % shape_.block_size;
      for (int h = 0; h < shape_.num_kv_heads; ++h) {
        const int64_t k = (block * shape_.num_kv_heads + h) * tile, v = k + tile / 2;
        for (int d = 0; d < shape_.head_dim; ++d) {
          const int64_t row_major = static_cast<int64_t>(place) * shape_.head_dim + d;
          const int64_t paired = (place / 2 * shape_.head_dim + d) * 2LL + place % 2;
          store(kv_.data(), shape_.dtype, k + row_major, static_cast<float>(key(b, token, h, d)));
          store(kv_.data(), shape_.dtype, v + (element_bytes_ == 2 ? paired : row_major),
                static_cast<float>(value(b, token, h, d)));
        }
      }
    }
  }
}

void AttentionCase::solve() {
  const int dim = shape_.head_dim, group = shape_.num_query_heads / shape_.num_kv_heads;
  const int64_t row_elements = (shape_.num_query_heads + 2LL * shape_.num_kv_heads) * dim;
  for (size_t b = 0; b < shape_.lengths.size(); ++b) {
    for (int h = 0; h < shape_.num_query_heads; ++h) {
      std::vector<double> scores(shape_.lengths[b]);
      for (int t = 0; t < shape_.lengths[b]; ++t) {
        for (int d = 0; d < dim; ++d) {
          scores[t] += load(qkv_.data(), shape_.dtype, b * row_elements + h * dim + d) * key(b, t, h / group, d);
        }
        scores[t] *= lap().scale;
      }
      const double max = *std::max_element(scores.begin(), scores.end());
      double sum = 0;
      std::vector<double> mixed(dim);
      for (int t = 0; t < shape_.lengths[b]; ++t) {
        const double weight = std::exp(scores[t] - max);
        sum += weight;
        for (int d = 0; d < dim; ++d) mixed[d] += weight * value(b, t, h / group, d);
      }
      for (const double m : mixed) answer_.push_back(m / sum);
      lse_answer_.push_back(max + std::log(sum));
    }
  }
}

LapShape AttentionCase::lap() const {
  LapShape lap{};
  lap.geometry = {
      1, num_blocks_, shape_.num_query_heads, shape_.num_kv_heads, shape_.head_dim, shape_.block_size, shape_.dtype};
  lap.num_rows = static_cast<int32_t>(shape_.lengths.size());
  lap.lengths = shape_.lengths.data();
  lap.block_start = block_start_.data();
  lap.block_ids = block_ids_.data();
  lap.scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
  return lap;
}

LayerMemory AttentionCase::memory() { return {kv_.data(), qkv_.data(), out_.data(), lse_.data()}; }

double AttentionCase::output_error() const {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < answer_.size(); ++i) {
    const double d = load(out_.data(), shape_.dtype, static_cast<int64_t>(i)) - answer_[i];
    difference += d * d;
    norm += answer_[i] * answer_[i];
  }
  return std::sqrt(difference / norm);
}

double AttentionCase::lse_error() const {
  double worst = 0;
  for (size_t i = 0; i < lse_.size(); ++i) {
    const double error = std::abs(lse_[i] - lse_answer_[i]) / std::max(1.0, std::abs(lse_answer_[i]));
    if (!(error <= worst)) worst = error;  // NaN counts
  }
  return worst;
}

}  // namespace neo::test
