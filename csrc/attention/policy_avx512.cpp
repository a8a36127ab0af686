// AVX-512 with the bf16 dot product.
#include "attention/kernel/avx512.h"
#include "attention/kernel/dispatch.h"
#include "base/cpu.h"

namespace neo {
namespace {

AttendFunction find(DType dtype, int head_dim) {
  if (dtype == DType::kBF16) return find_tiles<BF16DotMath>(head_dim);
  return find_vector_tiles<Avx512>(dtype, head_dim);
}

}  // namespace

const Policy kAvx512Policy = {"avx512", cpu_has_avx512, find};

}  // namespace neo
