#include "attention/merge.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace neo {

namespace {

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (std::isnan(value)) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void store(void* out, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::kF32:
      static_cast<float*>(out)[index] = value;
      break;
    case DType::kBF16:
      static_cast<uint16_t*>(out)[index] = to_bf16(value);
      break;
    case DType::kF16:
      static_cast<_Float16*>(out)[index] = static_cast<_Float16>(value);
      break;
  }
}

}  // namespace

void merge_partials(const LapShape& lap, const LayerMemory& memory, const Cut& cut, const float* partials) {
  const Geometry& g = lap.geometry;
  const int group = g.num_query_heads / g.num_kv_heads;
  const int64_t stride = partial_floats(g);
  const float* first = partials + cut.first_slot * stride;
  for (int h = 0; h < group; ++h) {
    const float* maxima = first + static_cast<int64_t>(group) * g.head_dim + h;
    const float* sums = maxima + group;
    float max = maxima[0];
    for (int i = 1; i < cut.num_slots; ++i) max = std::max(max, maxima[i * stride]);
    float weights = 0;
    for (int i = 0; i < cut.num_slots; ++i) weights += sums[i * stride] * std::exp2(maxima[i * stride] - max);

    const int64_t query_head = static_cast<int64_t>(cut.row) * g.num_query_heads + cut.kv_head * group + h;
    float mixed[256] = {};
    for (int i = 0; i < cut.num_slots; ++i) {
      const float factor = std::exp2(maxima[i * stride] - max) / weights;
      const float* values = first + i * stride + static_cast<int64_t>(h) * g.head_dim;
      for (int d = 0; d < g.head_dim; ++d) mixed[d] += factor * values[d];
    }
    for (int d = 0; d < g.head_dim; ++d) store(memory.out, g.dtype, query_head * g.head_dim + d, mixed[d]);
    if (memory.lse) memory.lse[query_head] = (max + std::log2(weights)) * 0.69314718f;
  }
}

}  // namespace neo
