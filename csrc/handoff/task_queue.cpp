#include "handoff/task_queue.h"

#include <stdexcept>
#include <utility>

namespace neo {

void TaskQueue::arm(Task task) {
  const FlagValue done = task.done;
  std::unique_lock lock(mutex_);
  if (closed_ || failed()) {
    const bool closed = closed_;
    lock.unlock();
    flag_raise(*done.flag, done.value);
    if (closed) throw std::runtime_error("the worker pool is closed");
    return;
  }
  if (tail_ - head_ == kCapacity) {
    throw std::runtime_error("the worker pool holds " + std::to_string(kCapacity) +
                             " armed tasks, the most that it can; wait for some to be done");
  }
  release_past();
  slot(tail_++) = std::move(task);
}

std::optional<TaskQueue::Pending> TaskQueue::next() {
  const std::scoped_lock lock(mutex_);
  if (head_ == tail_) return std::nullopt;
  polled_ = true;
  return Pending{head_, &slot(head_), slot(head_).ready};
}

TaskQueue::Begun TaskQueue::begin(uint64_t ticket, bool is_ready, int64_t start_ns) {
  const std::scoped_lock lock(mutex_);
  polled_ = false;
  if (!is_ready || head_ != ticket) return {nullptr, nullptr};
  running_ = true;
  start_ns_ = start_ns;
  return {&slot(ticket), ticket + 1 == tail_ ? nullptr : &slot(ticket + 1)};
}

FlagWord* TaskQueue::finish() {
  const std::scoped_lock lock(mutex_);
  if (!running_) return nullptr;
  running_ = false;
  const Task& task = slot(head_);
  const FlagValue done = task.done;
  task.work->finished(task.step, start_ns_, monotonic_ns());
  ++head_;
  flag_set(*done.flag, done.value);  // under the mutex, so that none is raised after `fail` has returned
  return done.flag;
}

std::optional<TaskQueue::Running> TaskQueue::running() const {
  const std::scoped_lock lock(mutex_);
  if (!running_) return std::nullopt;
  const Task& task = ring_[head_ % kCapacity];
  return Running{head_, start_ns_, task.work->name(task.step)};
}

void TaskQueue::fail(const std::string& message, std::optional<uint64_t> ticket) {
  const std::scoped_lock lock(mutex_);
  if (ticket && *ticket != head_) return;
  if (!failed()) {
    error_ = message;
    failed_.store(true, std::memory_order_release);
  }
  drop_all();
}

bool TaskQueue::is_polled() const {
  const std::scoped_lock lock(mutex_);
  return polled_;
}

void TaskQueue::resume() {
  const std::scoped_lock lock(mutex_);
  release_past();
  error_.clear();
  failed_.store(false, std::memory_order_release);
}

void TaskQueue::close() {
  const std::scoped_lock lock(mutex_);
  closed_ = true;
  const uint64_t num_armed = tail_ - head_;
  if (num_armed != 0 && !failed()) {
    error_ = "the worker pool was closed with " + std::to_string(num_armed) + " tasks armed";
    failed_.store(true, std::memory_order_release);
  }
  drop_all();
}

std::optional<std::string> TaskQueue::error() const {
  const std::scoped_lock lock(mutex_);
  return failed() ? std::optional(error_) : std::nullopt;
}

void TaskQueue::release_finished() {
  const std::scoped_lock lock(mutex_);
  if (!failed()) release_past();  // after an error a worker may still be at one of them
}

void TaskQueue::drop_all() {
  running_ = false;
  while (head_ != tail_) {
    const FlagValue done = slot(head_).done;
    ++head_;
    flag_raise(*done.flag, done.value);
  }
}

// References are dropped here, by who arms or waits, so that no worker ever frees memory.
void TaskQueue::release_past() {
  for (; released_ != head_; ++released_) slot(released_).work.reset();
}

}  // namespace neo
