// For the files of one instruction set only: all is local to the file that includes it.
#pragma once

#include "attention/kernel/stream.h"

namespace neo {
namespace {

// Memory of a share's tiles, cut from its scratch.
class Scratch {
 public:
  explicit Scratch(void* memory) : next_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + kCacheLine - 1) / kCacheLine * kCacheLine;
    return result;
  }

 private:
  char* next_;
};

}  // namespace
}  // namespace neo
