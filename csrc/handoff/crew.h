// The threads of a worker pool and the state that they share.
//
// Worker 0 leads: it waits for the next task and its `ready` flag, then lets all workers go. Whoever finishes last ends
// the task and raises `done`; then the leader goes on. Meanwhile whoever waits fetches what it will read first in the
// task after it into its cache: that uses the memory while a task ends and the next begins. The watchdog sleeps until
// the running task's deadline.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "handoff/fault.h"
#include "handoff/task_queue.h"
#include "sync/signal.h"

namespace neo {

class Crew {
 public:
  struct Times {
    int64_t spin_ns;
    int64_t nap_ns;
    int64_t deadline_ns;
  };

  Crew(const std::vector<int>& cpus, const Times& times);

  // The body of worker `worker`'s thread: until `stop`, or until it dies. The first `num_begun` tasks are past.
  void work(int worker, uint32_t num_begun);
  // The body of the watchdog's thread.
  void watch();

  void arm(Task task);
  // Makes all threads end, now or at the end of what they are at; drops what is armed.
  void stop();
  // Waits until no worker is in a task, fetches for one, or reads a flag; whether that came about in time.
  bool wait_quiescent(int64_t timeout_ns);
  // Waits until `num_threads` threads have left since the beginning; whether that came about in time.
  bool wait_left(uint32_t num_threads, int64_t timeout_ns);

  int num_workers() const { return static_cast<int>(workers_.size()); }
  bool is_alive(int worker) const { return workers_[static_cast<size_t>(worker)].alive; }
  void revive(int worker) { workers_[static_cast<size_t>(worker)].alive = true; }
  uint32_t num_begun() const { return begun_.value(); }
  int64_t deadline_ns() const { return times_.deadline_ns; }
  // The workers that are still at the last task that was begun, as in "worker 3, 4".
  std::string busy_workers() const;

  TaskQueue queue;
  FaultPlan fault;

 private:
  struct alignas(64) Worker {
    int cpu = 0;
    std::atomic<bool> alive{true};
    std::atomic<bool> fetching{false};      // uses `upcoming_`
    std::atomic<uint32_t> num_finished{0};  // tasks begun up to the last one that it is through with
  };

  void lead();
  bool wait_ready(const TaskQueue::Pending& next);
  void follow(int worker, uint32_t num_begun);
  bool run_share(int worker);
  template <typename Stop>
  void fetch_ahead(int worker, Stop stop);
  bool any_fetching() const;
  void finish_share(int worker);
  bool stopping() const { return stopping_.load(std::memory_order_acquire); }

  std::vector<Worker> workers_;
  const Times times_;
  std::atomic<bool> stopping_{false};
  const Task* task_ = nullptr;  // the task begun last; written by the leader before it advances `begun_`
  std::atomic<const Task*> upcoming_{nullptr};  // the armed task after it, or null; written by the leader
  std::atomic<int> num_running_{0};             // workers that are not through with it
  Signal armed_;
  Signal begun_;
  Signal finished_;
  Signal stopped_;
  Signal left_;  // counts the threads that have
};

}  // namespace neo
