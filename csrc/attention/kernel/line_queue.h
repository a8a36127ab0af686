// Memory that is asked for bit by bit. For the files of one instruction set only: all is local to the file that
// includes it.
#pragma once

#include "attention/kernel/stream.h"

namespace neo {
namespace {

template <int kMostRuns>
class LineQueue {
 public:
  void clear() { next_ = num_runs_ = 0; }
  bool empty() const { return next_ == num_runs_; }

  // Appends a run of lines, which `take` is to divide.
  void add(const void* address, int64_t num_bytes) {
    const char* begin = static_cast<const char*>(address);
    runs_[num_runs_++] = {begin, begin + num_bytes};
  }

  // Calls `ask` with the addresses of the next kLines lines, if there are any.
  template <int kLines, class Ask>
  void take(Ask ask) {
    if (empty()) return;
    Run& run = runs_[next_];
#pragma GCC unroll 16
    for (int i = 0; i < kLines; ++i) ask(run.begin + i * kCacheLine);
    run.begin += kLines * kCacheLine;
    next_ += run.begin == run.end;
  }

 private:
  struct Run {
    const char* begin;
    const char* end;
  };

  Run runs_[kMostRuns];
  int num_runs_ = 0;
  int next_ = 0;
};

}  // namespace
}  // namespace neo
