// Element types and head dims known at compile time, chosen at run time. For the files of one instruction set only: all
// is local to the file that includes it.
#pragma once

#include "attention/kernel/attend.h"
#include "attention/kernel/float_math.h"
#include "attention/kernel/vector_tiles.h"

namespace neo {
namespace {

// `at` is called with the head dim as a constant; its result, or null for a head dim that is not supported.
template <class At>
AttendFunction find_head_dim(int head_dim, At at) {
  switch (head_dim) {
    case 64:
      return at(Count<64>());
    case 80:
      return at(Count<80>());
    case 96:
      return at(Count<96>());
    case 128:
      return at(Count<128>());
    case 256:
      return at(Count<256>());
    default:
      return nullptr;
  }
}

template <class Math>
AttendFunction find_tiles(int head_dim) {
  return find_head_dim(head_dim, [](auto dim) -> AttendFunction { return attend<VectorTiles<Math, dim.value>>; });
}

template <class Simd>
AttendFunction find_vector_tiles(DType dtype, int head_dim) {
  switch (dtype) {
    case DType::kF32:
      return find_tiles<FloatMath<Simd, float>>(head_dim);
    case DType::kBF16:
      return find_tiles<FloatMath<Simd, BF16>>(head_dim);
    case DType::kF16:
      return find_tiles<FloatMath<Simd, F16>>(head_dim);
  }
  return nullptr;
}

}  // namespace
}  // namespace neo
