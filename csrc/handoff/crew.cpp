#include "handoff/crew.h"

#include <sys/prctl.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "base/decimal.h"
#include "sync/spin.h"
#include "sync/topology.h"

namespace neo {
namespace {

// A pause between two looks, where nobody is in a hurry.
void nap() {
  constexpr int64_t kNapNs = 200'000;
  const std::atomic<uint32_t> nobody_wakes{0};
  futex_wait(nobody_wakes, 0, kNapNs);
}

// As in "30 s" or "0.25 s".
std::string seconds_text(int64_t time_ns) { return decimal(static_cast<double>(time_ns) * 1e-9) + " s"; }

}  // namespace

Crew::Crew(const std::vector<int>& cpus, const Times& times) : workers_(cpus.size()), times_(times) {
  for (size_t i = 0; i < cpus.size(); ++i) workers_[i].cpu = cpus[i];
}

void Crew::arm(Task task) {
  queue.arm(std::move(task));
  armed_.advance();
}

void Crew::work(int worker, uint32_t num_begun) {
  Worker& self = workers_[static_cast<size_t>(worker)];
  pin_this_thread(self.cpu);
  prctl(PR_SET_NAME, ("neo-worker-" + std::to_string(worker)).c_str());
  prctl(PR_SET_TIMERSLACK, 1000);  // nanoseconds; naps are to be as short as asked
  if (worker == 0) {
    lead();
  } else {
    follow(worker, num_begun);
  }
  self.alive = false;
  if (!stopping()) {
    queue.fail("worker " + std::to_string(worker) + " died at " + task_->work->name(task_->step));
    finish_share(worker);
  }
  left_.advance();
}

void Crew::lead() {
  while (true) {
    const uint32_t num_armed = armed_.value();
    if (stopping()) return;
    const auto next = queue.next();
    if (!next) {
      armed_.wait_past(num_armed, times_.spin_ns);
      continue;
    }
    upcoming_ = next->task;
    const bool is_ready = wait_ready(*next);
    const uint32_t num_finished = finished_.value();
    num_running_ = num_workers();  // before `begin`, after which the task counts as running
    const TaskQueue::Begun begun = queue.begin(next->ticket, is_ready, monotonic_ns());
    if (begun.task == nullptr) {
      num_running_ = 0;
      continue;
    }
    task_ = begun.task;
    upcoming_ = begun.upcoming;
    task_->work->begin(task_->step);
    begun_.advance();
    if (!run_share(0)) return;
    fetch_ahead(0, [&] { return finished_.value() != num_finished; });
    finished_.wait_past(num_finished, times_.spin_ns);
  }
}

// Whether the task's `ready` flag was reached, and the task not dropped meanwhile.
bool Crew::wait_ready(const TaskQueue::Pending& next) {
  if (next.ready.flag == nullptr) return true;
  const auto dropped = [&] { return stopping() || !queue.is_pending(next.ticket); };
  fetch_ahead(0, [&] { return flag_reached(*next.ready.flag, next.ready.value) || dropped(); });
  return flag_wait(*next.ready.flag, next.ready.value, times_.spin_ns, times_.nap_ns, dropped);
}

void Crew::follow(int worker, uint32_t num_begun) {
  while (true) {
    fetch_ahead(worker, [&] { return begun_.value() != num_begun; });
    begun_.wait_past(num_begun++, times_.spin_ns);
    if (stopping() || !run_share(worker)) return;
  }
}

// Whether the worker lives on.
bool Crew::run_share(int worker) {
  try {
    switch (fault.take(worker, begun_.value())) {
      case Fault::kNone:
        break;
      case Fault::kDie:
        return false;
      case Fault::kThrow:
        throw std::runtime_error("injected fault");
      case Fault::kStall:
        while (!stopping() && !queue.failed()) nap();
        break;
    }
    task_->work->run(worker, task_->step);
  } catch (const std::exception& error) {
    queue.fail("worker " + std::to_string(worker) + " failed at " + task_->work->name(task_->step) + ": " +
               error.what());
  }
  finish_share(worker);
  return true;
}

// Fetches what `worker` will read first in the upcoming task, until `stop` or all is fetched. The flag and the pointer
// are written and read in opposite orders here and in `wait_quiescent`, so that one of both sees the other.
template <typename Stop>
void Crew::fetch_ahead(int worker, Stop stop) {
  std::atomic<bool>& fetching = workers_[static_cast<size_t>(worker)].fetching;
  fetching = true;
  if (const Task* task = upcoming_) {
    for (int part = 0; !stop() && task->work->fetch_ahead(worker, task->step, part); ++part) {
    }
  }
  fetching.store(false, std::memory_order_release);
}

bool Crew::any_fetching() const {
  return std::any_of(workers_.begin(), workers_.end(), [](const Worker& worker) { return worker.fetching.load(); });
}

void Crew::finish_share(int worker) {
  workers_[static_cast<size_t>(worker)].num_finished.store(begun_.value(), std::memory_order_relaxed);
  if (num_running_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  const FlagWord* done = queue.finish();
  finished_.advance();  // first, as the leader is in a hurry
  if (done != nullptr) futex_wake_all(*done);
}

void Crew::watch() {
  prctl(PR_SET_NAME, "neo-watchdog");
  while (true) {
    const uint32_t num_stopped = stopped_.value();
    if (stopping()) break;
    const int64_t now_ns = monotonic_ns();
    const auto running = queue.running();
    const int64_t left_ns = (running ? running->start_ns : now_ns) + times_.deadline_ns - now_ns;
    if (left_ns > 0) {
      stopped_.wait_past(num_stopped, 0, left_ns);
      continue;
    }
    queue.fail(running->name + " was not done within " + seconds_text(times_.deadline_ns) +
                   " of its ready flag; still at it: " + busy_workers(),
               running->ticket);
  }
  left_.advance();
}

void Crew::stop() {
  stopping_ = true;
  queue.close();
  for (Signal* signal : {&armed_, &begun_, &finished_, &stopped_}) signal->advance();
}

bool Crew::wait_quiescent(int64_t timeout_ns) {
  const int64_t stop_ns = monotonic_ns() + timeout_ns;
  const auto wait_for = [&](auto condition) {
    while (!condition()) {
      if (monotonic_ns() >= stop_ns) return false;
      nap();
    }
    return true;
  };
  if (!wait_for([&] { return !queue.is_polled() && num_running_.load(std::memory_order_acquire) == 0; })) return false;
  upcoming_ = nullptr;
  return wait_for([&] { return !any_fetching(); });
}

bool Crew::wait_left(uint32_t num_threads, int64_t timeout_ns) {
  const int64_t stop_ns = monotonic_ns() + timeout_ns;
  for (uint32_t num_left = left_.value(); num_left != num_threads; num_left = left_.value()) {
    if (!left_.wait_past(num_left, 0, stop_ns - monotonic_ns())) return false;
  }
  return true;
}

std::string Crew::busy_workers() const {
  std::string busy;
  for (size_t i = 0; i < workers_.size(); ++i) {
    if (workers_[i].num_finished.load(std::memory_order_relaxed) == begun_.value()) continue;
    busy += (busy.empty() ? "worker " : ", ") + std::to_string(i);
  }
  return busy;
}

}  // namespace neo
