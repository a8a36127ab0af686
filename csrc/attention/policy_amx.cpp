// AMX for bf16 where enough heads share a load; AVX-512 for the rest.
#include "attention/kernel/amx_tiles.h"
#include "attention/kernel/avx512.h"
#include "attention/kernel/dispatch.h"
#include "base/cpu.h"

namespace neo {
namespace {

// With fewer heads the vectors keep up with the memory, and a tile would be mostly empty.
constexpr int kSmallestGroup = 3;

template <int kDim>
void attend_bf16(const Share& share) {
  const Geometry& g = share.lap->geometry;
  if (g.num_query_heads / g.num_kv_heads < kSmallestGroup) {
    attend<VectorTiles<FloatMath<Avx512, BF16>, kDim>>(share);
  } else {
    attend<AmxTiles<kDim>>(share);
  }
}

AttendFunction find(DType dtype, int head_dim) {
  if (dtype != DType::kBF16) return find_vector_tiles<Avx512>(dtype, head_dim);
  return find_head_dim(head_dim, [](auto dim) -> AttendFunction { return attend_bf16<dim.value>; });
}

}  // namespace

const Policy kAmxPolicy = {"amx", cpu_has_amx, find};

}  // namespace neo
