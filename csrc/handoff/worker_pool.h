// Pinned threads that run armed work between two flags.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "handoff/crew.h"

namespace neo {

class WorkerPool {
 public:
  // One worker pinned to each of `cpus`. Workers spin for `spin_us` when they wait, then sleep. `deadline_s` bounds a
  // task from its ready flag to done. Throws std::invalid_argument with names and values.
  WorkerPool(std::vector<int> cpus, double spin_us, double deadline_s);
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  int num_workers() const { return crew_->num_workers(); }

  // Queues a task: takes a short lock, and a system call when the leader sleeps.
  void arm(Task task) { crew_->arm(std::move(task)); }
  // Runs one step now and waits for it; throws std::runtime_error with the pool's error.
  void run(std::shared_ptr<Work> work, int step);

  // The first error since the last `clear_error`.
  std::optional<std::string> error() const { return crew_->queue.error(); }
  // Drops what is armed (raising `done`), waits until no worker is at work, replaces those that died, forgets the
  // error. Throws std::runtime_error when a worker does not come back within the deadline, or the pool is closed.
  void clear_error();

  // Makes worker `worker` (negative: from the last) commit `fault` at the task after the next `after_tasks` ones.
  void inject_fault(Fault fault, int worker, int after_tasks);

  // Drops what is armed (raising `done`) and ends the threads. One that is stuck past the deadline is left behind.
  void close();

 private:
  void start_worker(int worker);

  std::shared_ptr<Crew> crew_;  // shared with its threads, which may outlive the pool when they are stuck
  std::mutex control_mutex_;    // clear_error and close exclude each other
  std::vector<std::thread> threads_;  // the workers', then the watchdog's
  uint32_t num_started_ = 0;
  bool closed_ = false;
};

}  // namespace neo
