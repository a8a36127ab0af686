#include "base/cpu.h"

#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>

#include <cstdint>
#endif

namespace neo {

#if defined(__x86_64__)

namespace {

struct CpuidLeaf {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuidLeaf cpuid(uint32_t leaf, uint32_t subleaf) {
  CpuidLeaf r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool all_bits(uint64_t value, uint64_t bits) { return (value & bits) == bits; }

// The register state that the operating system saves (XCR0).
uint64_t saved_state() {
  constexpr uint32_t kOsxsave = 1u << 27;
  if (!all_bits(cpuid(1, 0).ecx, kOsxsave)) return 0;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

constexpr uint64_t kYmmState = 0x6;
constexpr uint64_t kZmmState = 0xe6;
constexpr uint64_t kTileState = 0x60000;

// Linux gives the large tile state only to processes that ask, before their first tile instruction.
bool request_tile_state() {
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

}  // namespace

bool cpu_has_avx2() {
  constexpr uint32_t kFma = 1u << 12, kF16c = 1u << 29, kAvx2 = 1u << 5;
  return all_bits(saved_state(), kYmmState) && all_bits(cpuid(1, 0).ecx, kFma | kF16c) &&
         all_bits(cpuid(7, 0).ebx, kAvx2);
}

bool cpu_has_avx512() {
  constexpr uint32_t kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
  return cpu_has_avx2() && all_bits(saved_state(), kZmmState) && all_bits(cpuid(7, 0).ebx, kF | kDq | kBw | kVl);
}

bool cpu_has_amx() {
  constexpr uint32_t kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAvx512Bf16 = 1u << 5;
  return cpu_has_avx512() && all_bits(cpuid(7, 1).eax, kAvx512Bf16) && all_bits(saved_state(), kTileState) &&
         all_bits(cpuid(7, 0).edx, kAmxBf16 | kAmxTile) && request_tile_state();
}

#else

bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }
bool cpu_has_amx() { return false; }

#endif

size_t cpu_cache_bytes() {
  constexpr size_t kSmall = 256 * 1024;
  const long num_bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return num_bytes > 0 ? static_cast<size_t>(num_bytes) : kSmall;
}

}  // namespace neo
