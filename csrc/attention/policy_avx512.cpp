// AVX-512. Converting bf16 and multiplying in float is faster here than the dot product of bf16 pairs, which Intel's
// cores start only every second cycle (docs/log.md).
#include "attention/kernel/avx512.h"
#include "attention/kernel/dispatch.h"
#include "base/cpu.h"

namespace neo {

const Policy kAvx512Policy = {"avx512", cpu_has_avx512, find_vector_tiles<Avx512>};

}  // namespace neo
