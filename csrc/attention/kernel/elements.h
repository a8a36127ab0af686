// KV elements as types. For the files of one instruction set only: all is local to the file that includes it.
#pragma once

#include <cstdint>

namespace neo {
namespace {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class Element>
inline constexpr bool kIsF16 = false;
template <>
inline constexpr bool kIsF16<F16> = true;

// V of two-byte elements lies in token pairs, [tokens / 2][head_dim][2]; V of f32 is row-major.
template <class Element>
inline constexpr bool kPairedV = sizeof(Element) == 2;

}  // namespace
}  // namespace neo
