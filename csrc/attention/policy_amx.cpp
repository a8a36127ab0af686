// AMX for bf16, AVX-512 for the rest.
#include "attention/kernel/amx_tiles.h"
#include "attention/kernel/avx512.h"
#include "attention/kernel/dispatch.h"
#include "base/cpu.h"

namespace neo {
namespace {

template <int kDim>
void attend_bf16(const Share& share) {
  const Geometry& g = share.lap->geometry;
  const int group = g.num_query_heads / g.num_kv_heads;
  if (group <= 4) {
    attend<AmxTiles<kDim, 4>>(share);
  } else if (group <= 8) {
    attend<AmxTiles<kDim, 8>>(share);
  } else {
    attend<AmxTiles<kDim, 16>>(share);
  }
}

AttendFunction find(DType dtype, int head_dim) {
  if (dtype != DType::kBF16) return find_vector_tiles<Avx512>(dtype, head_dim);
  return find_head_dim(head_dim, [](auto dim) -> AttendFunction { return attend_bf16<dim.value>; });
}

}  // namespace

const Policy kAmxPolicy = {"amx", cpu_has_amx, find};

}  // namespace neo
