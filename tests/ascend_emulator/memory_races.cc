#include "memory_races.h"

#include <algorithm>
#include <set>
#include <utility>

namespace ascend_emulator {
namespace {

struct Owned {
  Interval interval;
  int core;
  bool writes;
};

// Sorted, and joined where they meet.
void AddJoined(std::vector<Interval> intervals, int core, bool writes, std::vector<Owned>& all) {
  std::sort(intervals.begin(), intervals.end(),
            [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  const size_t first = all.size();
  for (const Interval& interval : intervals) {
    if (all.size() > first && interval.begin <= all.back().interval.end) {
      all.back().interval.end = std::max(all.back().interval.end, interval.end);
    } else {
      all.push_back({interval, core, writes});
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

std::vector<std::string> FindRaces(const std::vector<GlobalAccesses>& cores) {
  std::vector<Owned> all;
  for (size_t core = 0; core < cores.size(); ++core) {
    AddJoined(cores[core].reads(), static_cast<int>(core), false, all);
    AddJoined(cores[core].writes(), static_cast<int>(core), true, all);
  }
  std::sort(all.begin(), all.end(),
            [](const Owned& a, const Owned& b) { return a.interval.begin < b.interval.begin; });

  std::set<std::pair<int, int>> reported;
  std::vector<std::string> messages;
  // Of each core, the reads and the writes before that reach furthest.
  std::vector<const Owned*> furthest(2 * cores.size(), nullptr);
  for (const Owned& later : all) {
    for (const Owned* earlier : furthest) {
      if (earlier == nullptr || earlier->core == later.core) continue;
      if (!earlier->writes && !later.writes) continue;
      if (earlier->interval.end <= later.interval.begin) continue;
      const auto cores_of = std::minmax(earlier->core, later.core);
      if (!reported.insert(cores_of).second) continue;
      const Owned& writer = earlier->writes ? *earlier : later;
      const Owned& other = earlier->writes ? later : *earlier;
      messages.push_back("core " + std::to_string(writer.core) +
                         " writes global memory that core " + std::to_string(other.core) +
                         (other.writes ? " writes" : " reads") + " in the same launch");
    }
    const Owned*& mine = furthest[2 * static_cast<size_t>(later.core) + (later.writes ? 1 : 0)];
    if (mine == nullptr || mine->interval.end < later.interval.end) mine = &later;
  }
  return messages;
}

}  // namespace ascend_emulator
