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
  struct Options {
    double spin_us = 5000;  // how long who waits spins before it sleeps; a GPU is at layers in between for less
    double nap_us = 30;  // how often a sleeper looks at an armed task's ready flag; raised by a device, it wakes none
    double deadline_s = 30;  // the longest from a task's ready flag to done
  };

  // One worker pinned to each of `cpus`. Throws std::invalid_argument with names and values.
  WorkerPool(const std::vector<int>& cpus, const Options& options);
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

  std::shared_ptr<Crew> crew_;        // shared with its threads, which may outlive the pool when they are stuck
  std::mutex control_mutex_;          // clear_error and close exclude each other
  std::vector<std::thread> threads_;  // the workers', then the watchdog's
  uint32_t num_started_ = 0;
  bool closed_ = false;
};

}  // namespace neo
