#include "handoff/worker_pool.h"

#include <cmath>
#include <stdexcept>
#include <utility>

#include "base/decimal.h"
#include "sync/topology.h"

namespace neo {
namespace {

// `value` seconds or microseconds as nanoseconds; throws for less than `least` or more than a million seconds.
int64_t to_ns(const char* name, double value, double unit_ns, double least) {
  constexpr double kLongestNs = 1e15;
  if (value >= least && value * unit_ns <= kLongestNs) return std::llround(value * unit_ns);
  throw std::invalid_argument(std::string(name) + " is " + decimal(value) + "; expected " + decimal(least) + " to " +
                              decimal(kLongestNs / unit_ns));
}

std::shared_ptr<Crew> make_crew(const std::vector<int>& cpus, const WorkerPool::Options& options) {
  check_cpus(cpus, "cpus");
  return std::make_shared<Crew>(cpus, Crew::Times{.spin_ns = to_ns("spin_us", options.spin_us, 1e3, 0),
                                                  .nap_ns = to_ns("nap_us", options.nap_us, 1e3, 1),
                                                  .deadline_ns = to_ns("deadline_s", options.deadline_s, 1e9, 1e-3)});
}

}  // namespace

WorkerPool::WorkerPool(const std::vector<int>& cpus, const Options& options)
    : crew_(make_crew(cpus, options)), threads_(static_cast<size_t>(num_workers()) + 1) {
  for (int worker = 0; worker < num_workers(); ++worker) start_worker(worker);
  threads_.back() = std::thread([crew = crew_] { crew->watch(); });
  ++num_started_;
}

WorkerPool::~WorkerPool() { close(); }

void WorkerPool::start_worker(int worker) {
  crew_->revive(worker);
  threads_[static_cast<size_t>(worker)] =
      std::thread([crew = crew_, worker, num_begun = crew_->num_begun()] { crew->work(worker, num_begun); });
  ++num_started_;
}

void WorkerPool::run(std::shared_ptr<Work> work, int step) {
  constexpr int64_t kSpinNs = 50'000, kNapNs = 1'000'000;
  alignas(64) FlagWord done{0};
  arm({.work = std::move(work), .step = step, .ready = {}, .done = {&done, 1}});
  flag_wait(done, 1, kSpinNs, kNapNs, [] { return false; });
  crew_->queue.release_finished();
  if (const auto message = error()) throw std::runtime_error(*message);
}

void WorkerPool::clear_error() {
  const std::scoped_lock lock(control_mutex_);
  if (closed_) throw std::runtime_error("the worker pool is closed");
  crew_->queue.fail("the error is being cleared");  // nothing begins while workers are replaced
  if (!crew_->wait_quiescent(crew_->deadline_ns())) {
    throw std::runtime_error(crew_->busy_workers() + " did not come back within the deadline");
  }
  for (int worker = 0; worker < num_workers(); ++worker) {
    if (crew_->is_alive(worker)) continue;
    threads_[static_cast<size_t>(worker)].join();
    start_worker(worker);
  }
  crew_->queue.resume();
}

void WorkerPool::inject_fault(Fault fault, int worker, int after_tasks) {
  const int index = worker < 0 ? worker + num_workers() : worker;
  if (index < 0 || index >= num_workers()) {
    throw std::invalid_argument("worker is " + std::to_string(worker) + "; the pool has " +
                                std::to_string(num_workers()) + " workers");
  }
  if (after_tasks < 0) {
    throw std::invalid_argument("after_tasks is " + std::to_string(after_tasks) + "; expected 0 or more");
  }
  crew_->fault.set(fault, index, crew_->num_begun() + static_cast<uint32_t>(after_tasks) + 1);
}

void WorkerPool::close() {
  const std::scoped_lock lock(control_mutex_);
  if (closed_) return;
  closed_ = true;
  crew_->stop();
  const bool all_left = crew_->wait_left(num_started_, crew_->deadline_ns());
  for (std::thread& thread : threads_) {
    if (all_left) {
      thread.join();
    } else {
      thread.detach();
    }
  }
}

}  // namespace neo
