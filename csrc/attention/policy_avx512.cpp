// AVX-512. Converts bf16 and multiplies in float: a Xeon that also has the dot product of bf16 pairs starts one of
// those in two cycles, which is half the products.
#include "attention/kernel/avx512.h"
#include "attention/kernel/dispatch.h"
#include "base/cpu.h"

namespace neo {

const Policy kAvx512Policy = {"avx512", cpu_has_avx512, find_vector_tiles<Avx512>};

}  // namespace neo
