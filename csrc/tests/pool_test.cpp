// The worker pool under load and under faults, mostly for the sanitizers' sake.
#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "handoff/read_bandwidth.h"
#include "handoff/worker_pool.h"
#include "sync/topology.h"
#include "tests/check.h"

namespace {

using neo::Fault;
using neo::FlagWord;
using neo::WorkerPool;

struct alignas(64) Line {
  FlagWord flag{0};
};

// Each worker adds to a plain counter of its own; `finished` reads them all. A step that begins before the one before
// it has ended, or ends before all workers are through, is a wrong sum or a data race.
class Counting : public neo::Work {
 public:
  explicit Counting(int num_workers) : counters_(static_cast<size_t>(num_workers)) {}

  void run(int worker, int step) override {
    if (step < 0) throw std::runtime_error("a negative step");
    ++counters_[static_cast<size_t>(worker)].value;
  }

  // Reads the worker's counter, so that a step that is fetched for too early or too late is a data race.
  bool fetch_ahead(int worker, int, int part) override {
    return counters_[static_cast<size_t>(worker)].value >= 0 && part < 3;
  }

  void finished(int, int64_t, int64_t) override {
    ++num_steps_;
    for (const Counter& counter : counters_) CHECK(counter.value == num_steps_, "in step %d", num_steps_);
  }

  std::string name(int step) const override { return "step " + std::to_string(step); }

  int num_steps() const { return num_steps_; }

 private:
  struct alignas(64) Counter {
    int value = 0;
  };
  std::vector<Counter> counters_;
  int num_steps_ = 0;
};

std::vector<int> some_cpus() {
  std::vector<int> cpus = neo::affinity_cpus();
  cpus.resize(std::min<size_t>(cpus.size(), 4));
  return cpus;
}

bool reached(const FlagWord& flag, uint32_t value) { return neo::flag_wait_for(flag, value, 60); }

// A thread plays the device: it raises `ready` and waits for `done`, step after step, while another arms ahead of it.
void test_order(double spin_us) {
  constexpr uint32_t kSteps = 3000;
  WorkerPool pool(some_cpus(), {.spin_us = spin_us, .nap_us = 1, .deadline_s = 60});
  const auto work = std::make_shared<Counting>(pool.num_workers());
  Line ready, done;
  std::thread device([&] {
    for (uint32_t step = 1; step <= kSteps; ++step) {
      neo::flag_raise(ready.flag, step);
      if (step % 16 == 0) CHECK(reached(done.flag, step), "step %u", step);
    }
  });
  for (uint32_t step = 1; step <= kSteps; ++step) {
    pool.arm({work, static_cast<int>(step), {&ready.flag, step}, {&done.flag, step}});
  }
  CHECK(reached(done.flag, kSteps), "the last step");
  device.join();
  CHECK(work->num_steps() == static_cast<int>(kSteps), "%d steps", work->num_steps());
  CHECK(!pool.error(), "no error");
}

// Several threads arm and run at once.
void test_many_callers() {
  constexpr int kCallers = 3, kSteps = 300;
  WorkerPool pool(some_cpus(), {});
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back([&] {
      const auto work = std::make_shared<Counting>(pool.num_workers());
      for (int step = 0; step < kSteps; ++step) pool.run(work, step);
      CHECK(work->num_steps() == kSteps, "%d steps", work->num_steps());
    });
  }
  for (std::thread& caller : callers) caller.join();
}

// Each worker that has run a step fetches for the next one while that is not ready.
class Fetching : public neo::Work {
 public:
  static constexpr int kParts = 5;

  explicit Fetching(int num_workers) : fetched_(static_cast<size_t>(num_workers)) {}

  void run(int, int step) override { step_ = step; }
  bool fetch_ahead(int worker, int step, int part) override {
    if (step_ < 0) return false;  // the first step
    CHECK(step == step_ + 1, "step %d after %d", step, step_.load());
    std::atomic<int>& fetched = fetched_[static_cast<size_t>(worker)];
    CHECK(part == 0 || part == fetched, "part %d after %d", part, fetched.load() - 1);
    fetched = part + 1;
    return part < kParts;
  }
  void finished(int, int64_t, int64_t) override {}
  std::string name(int) const override { return "fetching"; }

  bool is_fetched() const {
    return std::all_of(fetched_.begin(), fetched_.end(), [](const auto& parts) { return parts == kParts + 1; });
  }

 private:
  std::atomic<int> step_{-1};
  std::vector<std::atomic<int>> fetched_;
};

void test_fetch_ahead() {
  WorkerPool pool(some_cpus(), {.deadline_s = 60});
  const auto work = std::make_shared<Fetching>(pool.num_workers());
  Line ready, done;
  for (const int step : {0, 1}) {
    const auto value = static_cast<uint32_t>(step + 1);
    pool.arm({work, step, {&ready.flag, value}, {&done.flag, value}});
  }
  neo::flag_raise(ready.flag, 1);
  CHECK(neo::spin_until([&] { return work->is_fetched(); }, int64_t{60} * 1'000'000'000), "all parts by all workers");
  neo::flag_raise(ready.flag, 2);
  CHECK(reached(done.flag, 2), "the second step");
}

void test_fault(Fault fault, int worker, const std::string& expected) {
  WorkerPool pool(some_cpus(), {.spin_us = 20, .nap_us = 30, .deadline_s = fault == Fault::kStall ? 0.05 : 30});
  for (int round = 0; round < 20; ++round) {
    const auto work = std::make_shared<Counting>(pool.num_workers());
    Line ready;
    std::array<Line, 4> done;
    pool.inject_fault(fault, worker, 1);
    for (uint32_t i = 0; i < done.size(); ++i) {
      pool.arm({work, static_cast<int>(i), {&ready.flag, i + 1}, {&done[i].flag, 1}});
    }
    neo::flag_raise(ready.flag, 2);  // the last two steps never become ready
    for (const Line& line : done) CHECK(reached(line.flag, 1), "round %d: done is raised in any case", round);
    const std::string message = pool.error().value_or("no error");
    CHECK(message.find(expected) != std::string::npos, "%s lacks %s", message.c_str(), expected.c_str());
    pool.clear_error();
    CHECK(!pool.error(), "cleared");
    const auto next = std::make_shared<Counting>(pool.num_workers());
    pool.run(next, 0);
    CHECK(next->num_steps() == 1, "the pool works again");
  }
}

// While the pool is in error, armed tasks are done at once and not run.
void test_armed_in_error() {
  WorkerPool pool(some_cpus(), {});
  bool thrown = false;
  try {
    pool.run(std::make_shared<Counting>(pool.num_workers()), -1);
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  CHECK(thrown, "run says so when a worker throws");
  const auto work = std::make_shared<Counting>(pool.num_workers());
  Line ready, done;
  pool.arm({work, 0, {&ready.flag, 1}, {&done.flag, 1}});
  CHECK(neo::flag_reached(done.flag, 1) && work->num_steps() == 0, "done at once, not run");
}

void test_close_while_awaited() {
  for (int round = 0; round < 50; ++round) {
    WorkerPool pool(some_cpus(), {.spin_us = 5, .nap_us = 30, .deadline_s = 30});
    Line ready, first_done, second_done;
    const auto work = std::make_shared<Counting>(pool.num_workers());
    pool.arm({work, 0, {&ready.flag, 1}, {&first_done.flag, 1}});
    pool.arm({work, 1, {&ready.flag, 2}, {&second_done.flag, 1}});
    std::thread waiter([&] { CHECK(reached(second_done.flag, 1), "close ends the wait"); });
    if (round % 2 == 0) neo::flag_raise(ready.flag, 1);
    pool.close();
    CHECK(neo::flag_reached(first_done.flag, 1), "done is raised");
    waiter.join();
    CHECK(pool.error().has_value(), "closing with tasks armed is an error");
  }
}

// Without `ready` ever being raised, `clear_error` empties the queue, and the pool goes on.
void test_drain() {
  WorkerPool pool(some_cpus(), {.spin_us = 5, .nap_us = 30, .deadline_s = 30});
  const auto work = std::make_shared<Counting>(pool.num_workers());
  {
    const auto ready = std::make_unique<Line>();  // freed right after: nobody may look at it any more
    Line done;
    for (uint32_t i = 1; i <= 100; ++i) pool.arm({work, 0, {&ready->flag, 1}, {&done.flag, i}});
    pool.clear_error();
    CHECK(neo::flag_reached(done.flag, 100), "all dropped");
  }
  CHECK(work.use_count() == 1, "dropped work is let go");
  pool.run(work, 0);
  CHECK(work->num_steps() == 1, "and only this ran");
}

// A queue that is full says so, and takes tasks again once there is room.
void test_capacity() {
  WorkerPool pool(some_cpus(), {});
  const auto work = std::make_shared<Counting>(pool.num_workers());
  Line ready, done;
  uint32_t num_armed = 0;
  try {
    while (true) {
      pool.arm({work, 0, {&ready.flag, 1}, {&done.flag, num_armed + 1}});
      ++num_armed;
    }
  } catch (const std::runtime_error&) {
    CHECK(num_armed == neo::TaskQueue::kCapacity, "%u tasks", num_armed);
  }
  neo::flag_raise(ready.flag, 1);
  CHECK(reached(done.flag, num_armed), "all done");
  pool.run(work, 0);
}

}  // namespace

int main() {
  test_order(/*spin_us=*/200);
  test_order(/*spin_us=*/0);
  test_many_callers();
  test_fetch_ahead();
  for (int worker : {0, -1}) {
    test_fault(Fault::kThrow, worker, "injected fault");
    test_fault(Fault::kDie, worker, "died at step 1");
    test_fault(Fault::kStall, worker, "not done within 0.05 s");
  }
  test_armed_in_error();
  test_close_while_awaited();
  test_drain();
  test_capacity();
  WorkerPool pool(some_cpus(), {});
  const std::vector<std::byte> memory(size_t{8} << 20);
  CHECK(neo::read_bandwidth(pool, memory.data(), memory.size(), 2) > 0, "some bandwidth");
  return failed_checks == 0 ? 0 : 1;
}
