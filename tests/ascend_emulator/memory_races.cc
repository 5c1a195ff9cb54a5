#include "memory_races.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>

namespace ascend_emulator {
namespace {

enum class Kind { kRead, kRepeat, kChange };
constexpr size_t kKinds = 3;

struct Owned {
  Interval interval;
  int core;
  Kind kind;
};

// Sorted, and joined where they meet.
void AddJoined(std::vector<Interval> intervals, int core, Kind kind, std::vector<Owned>& all) {
  std::sort(intervals.begin(), intervals.end(),
            [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  const size_t first = all.size();
  for (const Interval& interval : intervals) {
    if (all.size() > first && interval.begin <= all.back().interval.end) {
      all.back().interval.end = std::max(all.back().interval.end, interval.end);
    } else {
      all.push_back({interval, core, kind});
    }
  }
}

}  // namespace

void GlobalAccesses::Add(std::vector<Interval>& intervals, const void* address, uint64_t bytes) {
  if (bytes == 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const uintptr_t end = begin + bytes;
  if (!intervals.empty()) {
    Interval& last = intervals.back();
    if (begin >= last.begin && begin <= last.end) {
      last.end = std::max(last.end, end);
      return;
    }
  }
  intervals.push_back({begin, end});
}

void GlobalAccesses::Write(const void* address, const void* data, uint64_t bytes) {
  if (bytes == 0) return;
  Add(std::memcmp(address, data, bytes) == 0 ? repeats_ : changes_, address, bytes);
}

std::vector<std::string> FindRaces(const std::vector<GlobalAccesses>& cores,
                                   const std::vector<int>& order) {
  std::vector<Owned> all;
  for (size_t core = 0; core < cores.size(); ++core) {
    AddJoined(cores[core].reads(), static_cast<int>(core), Kind::kRead, all);
    AddJoined(cores[core].repeats(), static_cast<int>(core), Kind::kRepeat, all);
    AddJoined(cores[core].changes(), static_cast<int>(core), Kind::kChange, all);
  }
  std::vector<size_t> turns(cores.size());
  for (size_t turn = 0; turn < order.size(); ++turn) {
    turns[static_cast<size_t>(order[turn])] = turn;
  }
  const auto conflict = [&](const Owned& a, const Owned& b) {
    if (a.core == b.core) return false;
    if (a.kind == Kind::kRead || b.kind == Kind::kRead) return a.kind != b.kind;
    const bool a_is_last = turns[static_cast<size_t>(a.core)] > turns[static_cast<size_t>(b.core)];
    return (a_is_last ? a : b).kind == Kind::kChange;
  };
  std::sort(all.begin(), all.end(),
            [](const Owned& a, const Owned& b) { return a.interval.begin < b.interval.begin; });

  std::set<std::pair<int, int>> reported;
  std::vector<std::string> messages;
  // Of each core and kind, the access before that reaches furthest.
  std::vector<const Owned*> furthest(kKinds * cores.size(), nullptr);
  for (const Owned& later : all) {
    for (const Owned* earlier : furthest) {
      if (earlier == nullptr || !conflict(*earlier, later)) continue;
      if (earlier->interval.end <= later.interval.begin) continue;
      const auto cores_of = std::minmax(earlier->core, later.core);
      if (!reported.insert(cores_of).second) continue;
      const Owned& writer = earlier->kind == Kind::kRead ? later : *earlier;
      const Owned& other = earlier->kind == Kind::kRead ? *earlier : later;
      messages.push_back("core " + std::to_string(writer.core) +
                         " writes global memory that core " + std::to_string(other.core) +
                         (other.kind == Kind::kRead ? " reads" : " writes") +
                         " in the same launch");
    }
    const Owned*& mine =
        furthest[kKinds * static_cast<size_t>(later.core) + static_cast<size_t>(later.kind)];
    if (mine == nullptr || mine->interval.end < later.interval.end) mine = &later;
  }
  return messages;
}

}  // namespace ascend_emulator
