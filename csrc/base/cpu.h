// What this processor and operating system let us execute.
#pragma once

#include <cstddef>

namespace neo {

bool cpu_has_avx2();    // AVX2, FMA and F16C
bool cpu_has_avx512();  // F, BW, DQ and VL
bool cpu_has_amx();     // the above, AVX-512 and AMX bf16, and the kernel's permission to use it, which this asks for

size_t cpu_cache_bytes();  // of one core's second-level cache; a small one where the system does not tell

}  // namespace neo
