#include "cpu/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <string>
#include <thread>

#include "cpu/openmp.h"
#include "select_attn_ops/error.h"
#include "select_attn_ops/runtime.h"

namespace select_attn {
namespace {

int64_t ProcessorsOfThisProcess() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
  // More processors than a cpu_set_t holds.
  return std::max<int64_t>(std::thread::hardware_concurrency(), 1);
}

int64_t CheckNumThreads(int64_t count, const char* what, const std::string& got) {
  if (count < 1 || count > 65536) {
    throw Error(ErrorKind::kValueError, std::string(what) + " must be in [1, 65536], got " + got);
  }
  return count;
}

int64_t DefaultNumThreads() {
  const char* text = std::getenv("SELECT_ATTN_NUM_THREADS");
  if (text == nullptr || *text == '\0') return ProcessorsOfThisProcess();
  char* end = nullptr;
  const int64_t count = std::strtoll(text, &end, 10);
  return CheckNumThreads(*end == '\0' ? count : 0, "SELECT_ATTN_NUM_THREADS", text);
}

std::atomic<int64_t>& NumThreadsSetting() {
  static std::atomic<int64_t> count{DefaultNumThreads()};
  return count;
}

}  // namespace

int64_t NumThreads() { return NumThreadsSetting().load(std::memory_order_relaxed); }

void SetNumThreads(int64_t count) {
  NumThreadsSetting().store(CheckNumThreads(count, "the number of threads", std::to_string(count)),
                            std::memory_order_relaxed);
}

namespace cpu {
namespace {

// Arithmetic with denormals, rounding to nearest, while it lives, whatever the thread's own
// settings are: they must not show in the results, nor those of the threads in each other's.
class DefaultArithmetic {
 public:
  DefaultArithmetic() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultArithmetic() { std::fesetenv(&saved_); }
  DefaultArithmetic(const DefaultArithmetic&) = delete;
  DefaultArithmetic& operator=(const DefaultArithmetic&) = delete;

 private:
  std::fenv_t saved_;
};

// One call of ParallelTake.
class Job {
 public:
  Job(int64_t count, int64_t grain, ShareFunction function, void* context)
      : queue_(count, grain), function_(function), context_(context) {}

  // Works until nothing is left to take.
  void Work() noexcept {
    const DefaultArithmetic arithmetic;
    try {
      function_(context_, queue_);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (exception_ == nullptr) exception_ = std::current_exception();
      queue_.Clear();
    }
  }

  void RethrowException() const {
    if (exception_ != nullptr) std::rethrow_exception(exception_);
  }

 private:
  RangeQueue queue_;
  const ShareFunction function_;
  void* const context_;
  std::mutex mutex_;
  std::exception_ptr exception_;  // the first one
};

// Threads that sleep until a job wants them. One job at a time.
class ThreadPool {
 public:
  // Lets up to num_helpers threads help the calling one with the job. False, with nothing done, if
  // another job has the pool.
  bool TryRun(Job& job, int64_t num_helpers) {
    const std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    int64_t wanted = 0;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      StartThreads(num_helpers);
      job_ = &job;
      wanted_ = wanted = std::min(num_helpers, num_threads_);
    }
    // Not all of them: a pool may have far more threads than a short job wants.
    for (int64_t i = 0; i < wanted; ++i) wake_.notify_one();
    job.Work();
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // a thread that has not woken by now is not waited for
    idle_.wait(lock, [this] { return working_ == 0; });
    return true;
  }

 private:
  // Fewer than asked for, if the system has no more.
  void StartThreads(int64_t count) {
    try {
      for (; num_threads_ < count; ++num_threads_) std::thread([this] { Main(); }).detach();
    } catch (const std::system_error&) {
    }
  }

  [[noreturn]] void Main() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      --wanted_;
      ++working_;
      Job& job = *job_;
      lock.unlock();
      job.Work();
      lock.lock();
      if (--working_ == 0) idle_.notify_one();
    }
  }

  std::mutex busy_;  // held by the one call that has the pool

  std::mutex mutex_;  // of all below
  std::condition_variable wake_;
  std::condition_variable idle_;
  Job* job_ = nullptr;
  int64_t wanted_ = 0;   // threads that job_ still wants
  int64_t working_ = 0;  // threads inside job_
  int64_t num_threads_ = 0;
};

std::atomic<ThreadPool*> g_pool{nullptr};

// Never destroyed: its threads may outlive every static object.
ThreadPool& Pool() {
  ThreadPool* pool = g_pool.load(std::memory_order_acquire);
  if (pool != nullptr) return *pool;
  static std::once_flag registered;
  // A forked child has none of its parent's threads, and the parent's pool in whatever state it
  // was: the child starts over with a new one.
  std::call_once(registered, [] {
    pthread_atfork(nullptr, nullptr, [] { g_pool.store(nullptr, std::memory_order_relaxed); });
  });
  auto* fresh = new ThreadPool;
  if (g_pool.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) return *fresh;
  delete fresh;
  return *pool;
}

}  // namespace

void ParallelTakeRanges(int64_t count, int64_t grain, ShareFunction function, void* context) {
  if (count <= 0) return;
  Job job(count, grain, function, context);
  const int64_t num_ranges = (count - 1) / grain + 1;
  const int64_t num_threads = NumThreads();
  const auto work = [](void* shared) { static_cast<Job*>(shared)->Work(); };
  const bool is_shared = num_threads > 1 && num_ranges > 1 &&
                         (RunOnTorchTeam(num_threads, work, &job) ||
                          Pool().TryRun(job, std::min(num_threads, num_ranges) - 1));
  if (!is_shared) job.Work();
  job.RethrowException();
}

}  // namespace cpu
}  // namespace select_attn
