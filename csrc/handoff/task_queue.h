// The armed tasks of a worker pool, in order, and its first error.
//
// Every armed task's `done` is raised exactly once: by `finish` when its workers are through, or early when the queue
// fails, is halted or closed, so that a device that waits for it goes on. That is safe because the iteration has
// failed by then and its outputs are thrown away.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "handoff/work.h"

namespace neo {

class TaskQueue {
 public:
  static constexpr uint64_t kCapacity = 4096;

  // Appends a task. In error its `done` is raised at once instead; when closed, std::runtime_error is thrown besides.
  // Throws std::runtime_error when the queue is full.
  void arm(Task task);

  struct Pending {
    uint64_t ticket;
    const Task* task;
    FlagValue ready;
  };
  // The first task, if any: its `ready` flag may be read until the matching `begin`.
  std::optional<Pending> next();
  // Whether that task is still to be begun.
  bool is_pending(uint64_t ticket) const { return head_.load(std::memory_order_acquire) == ticket; }
  struct Begun {
    const Task* task;      // valid until `finish`, its work until all workers have returned from it
    const Task* upcoming;  // the one after it if that is armed, or null
  };
  // Begins it when it `is_ready` and has not been dropped; a null task otherwise.
  Begun begin(uint64_t ticket, bool is_ready, int64_t start_ns);
  // Ends the running task, unless that has been given up: its flag, raised, on which those that sleep are still to be
  // woken, or null.
  FlagWord* finish();

  struct Running {
    uint64_t ticket;
    int64_t start_ns;
    std::string name;
  };
  // The running task, if there is one that has not been given up.
  std::optional<Running> running() const;

  // Lets go of the work of finished tasks; `arm` does so too.
  void release_finished();

  // Records the first error and raises `done` of every armed task. With a ticket: only if that task is the first one.
  void fail(const std::string& message, std::optional<uint64_t> ticket = std::nullopt);
  // Whether the flag of a task, perhaps one that was dropped meanwhile, may still be read.
  bool is_polled() const;
  // Forgets the error and the dropped tasks. No worker may be running one.
  void resume();
  // Like `fail`, for good; an error only if tasks were armed.
  void close();

  bool failed() const { return failed_.load(std::memory_order_acquire); }
  std::optional<std::string> error() const;

 private:
  Task& slot(uint64_t ticket) { return ring_[ticket % kCapacity]; }
  void drop_all();
  void release_past();

  mutable std::mutex mutex_;
  std::vector<Task> ring_{kCapacity};
  std::atomic<uint64_t> head_{0};  // the first task that is neither finished nor dropped; written under the mutex
  uint64_t tail_ = 0;              // the next task to be armed
  uint64_t released_ = 0;          // tasks before this one hold no work any more
  bool running_ = false;           // the first task has begun
  int64_t start_ns_ = 0;
  bool polled_ = false;
  bool closed_ = false;
  std::atomic<bool> failed_{false};  // whether error_ is set
  std::string error_;
};

}  // namespace neo
