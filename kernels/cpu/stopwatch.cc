#include "cpu/stopwatch.h"

#include <array>
#include <atomic>

namespace select_attn {
namespace {

std::atomic<bool> g_on{false};
std::atomic<bool> g_reads_only{false};
std::array<std::atomic<int64_t>, static_cast<size_t>(Phase::kCount)> g_times{};

}  // namespace

void SetStopwatch(bool on) {
  if (on) {
    for (std::atomic<int64_t>& time : g_times) time.store(0, std::memory_order_relaxed);
  }
  g_on.store(on, std::memory_order_relaxed);
}

bool StopwatchIsOn() { return g_on.load(std::memory_order_relaxed); }

int64_t StopwatchTime(Phase phase) {
  return g_times[static_cast<size_t>(phase)].load(std::memory_order_relaxed);
}

void AddLap(Phase phase, int64_t nanoseconds) {
  g_times[static_cast<size_t>(phase)].fetch_add(nanoseconds, std::memory_order_relaxed);
}

void SetReadsOnly(bool on) { g_reads_only.store(on, std::memory_order_relaxed); }

bool ReadsOnly() { return g_reads_only.load(std::memory_order_relaxed); }

}  // namespace select_attn
