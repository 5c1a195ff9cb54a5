#include "cuda_runtime.h"

#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_emulator {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = size_t{256} << 10;

// Where threads wait for each other: the last one to come lets all go on.
struct Meeting {
  unsigned expected = 0;
  unsigned waiting = 0;
  uint64_t round = 0;
};

// Lets one thread block run at a time, and says which.
class Turns {
 public:
  Turns(unsigned blocks, unsigned seed) : random_(seed), waiting_(blocks), left_(blocks) {
    std::iota(left_.begin(), left_.end(), 0u);
    GiveAway();
  }

  // Of whoever has the turn.
  std::mt19937& random() { return random_; }

  void Await(unsigned block) {
    std::unique_lock<std::mutex> lock(mutex_);
    waiting_[block].wait(lock, [&] { return whose_ == block; });
  }
  // Sometimes lets another one go on.
  void MaybePass(unsigned block) {
    if (left_.size() == 1 || random_() % kResumesPerTurn != 0) return;
    GiveAway();
    Await(block);
  }
  void End(unsigned block) {
    left_.erase(std::find(left_.begin(), left_.end(), block));
    if (!left_.empty()) GiveAway();
  }

 private:
  static constexpr unsigned kResumesPerTurn = 40;

  void GiveAway() {
    const std::lock_guard<std::mutex> lock(mutex_);
    whose_ = left_[random_() % left_.size()];
    waiting_[whose_].notify_one();
  }

  std::mt19937 random_;
  std::mutex mutex_;
  std::vector<std::condition_variable> waiting_;
  std::vector<unsigned> left_;
  unsigned whose_ = 0;
};

class ThreadBlock;
thread_local ThreadBlock* running = nullptr;

class ThreadBlock {
 public:
  ThreadBlock(unsigned threads, const std::function<void()>& kernel)
      : kernel_(kernel), fibers_(threads), warps_((threads + kWarp - 1) / kWarp) {
    // Not zeroed: most of it is never touched.
    for (Fiber& fiber : fibers_) fiber.stack.reset(new char[kStackBytes]);
  }

  void Run(unsigned number, Turns& turns) {
    const auto threads = static_cast<unsigned>(fibers_.size());
    everybody_ = {threads, 0, 0};
    for (unsigned w = 0; w < warps_.size(); ++w) {
      warps_[w].meeting = {std::min(kWarp, threads - w * kWarp), 0, 0};
    }
    for (unsigned t = 0; t < threads; ++t) Prepare(t);
    running = this;
    left_ = threads;
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    while (left_ > 0) {
      progress_ = false;
      std::shuffle(order.begin(), order.end(), turns.random());
      for (const unsigned t : order) {
        if (fibers_[t].done || !CanGoOn(fibers_[t])) continue;
        Resume(t);
        turns.MaybePass(number);
      }
      if (!progress_) {
        throw std::logic_error("threads wait for others that never come: " + Where());
      }
    }
    running = nullptr;
  }

  void Meet(Meeting& meeting) {
    Fiber& fiber = fibers_[current_];
    if (++meeting.waiting == meeting.expected) {
      meeting.waiting = 0;
      ++meeting.round;
      return;
    }
    fiber.waits_at = &meeting;
    fiber.round = meeting.round;
    Yield();
  }

  Meeting& everybody() { return everybody_; }

  struct Warp {
    Meeting meeting;
    uint64_t values[kWarp] = {};
  };
  Warp& warp() { return warps_[current_ / kWarp]; }
  unsigned lane() const { return current_ % kWarp; }

 private:
  struct Fiber {
    ucontext_t context = {};
    std::unique_ptr<char[]> stack;
    bool done = false;
    const Meeting* waits_at = nullptr;
    uint64_t round = 0;  // of the meeting, when it began to wait
    void* fake_stack = nullptr;
  };

  void Prepare(unsigned t) {
    Fiber& fiber = fibers_[t];
    fiber.done = false;
    fiber.waits_at = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &ThreadBlock::Enter, 0);
  }

  static bool CanGoOn(const Fiber& fiber) {
    return fiber.waits_at == nullptr || fiber.waits_at->round != fiber.round;
  }

  static void Enter() {
    ThreadBlock& block = *running;
    block.FinishSwitch(nullptr);
    block.kernel_();
    Fiber& fiber = block.fibers_[block.current_];
    fiber.done = true;
    --block.left_;
    block.SwitchToScheduler(fiber, true);
  }

  void Resume(unsigned t) {
    progress_ = true;
    current_ = t;
    threadIdx = {t};
    Fiber& fiber = fibers_[t];
    fiber.waits_at = nullptr;
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStackBytes);
    swapcontext(&scheduler_, &fiber.context);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
    swapcontext(&scheduler_, &fiber.context);
#endif
  }

  void Yield() {
    Fiber& fiber = fibers_[current_];
    SwitchToScheduler(fiber, false);
    FinishSwitch(fiber.fake_stack);
  }

  void SwitchToScheduler(Fiber& fiber, [[maybe_unused]] bool for_good) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, scheduler_stack_,
                                   scheduler_stack_bytes_);
#endif
    swapcontext(&fiber.context, &scheduler_);
  }

  void FinishSwitch([[maybe_unused]] void* fake_stack) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
  }

  std::string Where() const {
    unsigned at_barrier = 0;
    unsigned in_warp = 0;
    for (const Fiber& fiber : fibers_) {
      if (fiber.done) continue;
      ++(fiber.waits_at == &everybody_ ? at_barrier : in_warp);
    }
    return std::to_string(at_barrier) + " at a barrier, " + std::to_string(in_warp) +
           " at an exchange of their warp, " + std::to_string(fibers_.size() - left_) +
           " have ended";
  }

  const std::function<void()>& kernel_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  Meeting everybody_;
  ucontext_t scheduler_ = {};
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  unsigned current_ = 0;
  unsigned left_ = 0;
  bool progress_ = false;
};

}  // namespace

void RunGrid(unsigned blocks, unsigned threads, unsigned seed,
             const std::function<void()>& kernel) {
  Turns turns(blocks, seed);
  std::vector<std::exception_ptr> failures(blocks);
  std::vector<std::thread> hosts;
  for (unsigned b = 0; b < blocks; ++b) {
    hosts.emplace_back([&, b] {
      turns.Await(b);
      gridDim = {blocks};
      blockIdx = {b};
      try {
        ThreadBlock(threads, kernel).Run(b, turns);
      } catch (...) {
        failures[b] = std::current_exception();
      }
      turns.End(b);
    });
  }
  for (std::thread& host : hosts) host.join();
  for (const std::exception_ptr& failure : failures) {
    if (failure != nullptr) std::rethrow_exception(failure);
  }
}

void Barrier() { running->Meet(running->everybody()); }

void Gather(uint64_t own, uint64_t (&values)[32]) {
  ThreadBlock::Warp& warp = running->warp();
  warp.values[running->lane()] = own;
  running->Meet(warp.meeting);
  std::copy(warp.values, warp.values + kWarp, values);
  running->Meet(warp.meeting);  // before anybody gives the next value
}

uint64_t Exchange(uint64_t own, unsigned from) {
  uint64_t values[kWarp];
  Gather(own, values);
  return values[from];
}

}  // namespace cuda_emulator
