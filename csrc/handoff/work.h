// What the worker pool runs.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "sync/flag.h"

namespace neo {

// Work of one or more steps, each run once by all workers together. A step of decode attention is a layer.
class Work {
 public:
  virtual ~Work() = default;

  // Called once a step before any worker runs it.
  virtual void begin(int /*step*/) {}

  // Worker `worker`'s part of a step. What it throws becomes the pool's error.
  virtual void run(int worker, int step) = 0;

  // Asks for part 0, 1, ... of the memory that `worker` reads first in a step, if there are so many: whether there was
  // such a part. Called while the worker waits for an armed step; perhaps not at all, perhaps from part 0 again.
  virtual bool fetch_ahead(int /*worker*/, int /*step*/, int /*part*/) { return false; }

  // Called once a step by the worker that finished it, before `done` is raised. Times are of CLOCK_MONOTONIC.
  virtual void finished(int step, int64_t start_ns, int64_t end_ns) = 0;

  // What the step is, for error messages.
  virtual std::string name(int step) const = 0;
};

struct FlagValue {
  FlagWord* flag = nullptr;
  uint32_t value = 0;
};

// One step of work between two flags: it begins when `ready` is reached (at once without a flag) and raises `done`.
struct Task {
  std::shared_ptr<Work> work;
  int step = 0;
  FlagValue ready;
  FlagValue done;
};

}  // namespace neo
