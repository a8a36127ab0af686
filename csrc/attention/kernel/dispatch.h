// Head dims known at compile time, chosen at run time. For the files of one instruction set only: all is local to the
// file that includes it.
#pragma once

#include "attention/kernel/attend.h"

namespace neo {
namespace {

template <template <int> class Tiles>
AttendFunction find_head_dim(int head_dim) {
  switch (head_dim) {
    case 64:
      return attend<Tiles<64>>;
    case 80:
      return attend<Tiles<80>>;
    case 96:
      return attend<Tiles<96>>;
    case 128:
      return attend<Tiles<128>>;
    case 256:
      return attend<Tiles<256>>;
    default:
      return nullptr;
  }
}

}  // namespace
}  // namespace neo
