#include "ordering.h"

#include <algorithm>
#include <string>

#include "failure.h"

namespace ascend_emulator {
namespace {

using AscendC::HardEvent;

std::string FlagName(HardEvent event, int id) {
  return std::string("<") + PipeName(SourcePipe(event)) + "_" + PipeName(TargetPipe(event)) + ">(" +
         std::to_string(id) + ")";
}

void CheckId(HardEvent event, int id) {
  if (id < 0 || id >= kEventIds) Fail("event id out of range: " + FlagName(event, id));
}

}  // namespace

uint32_t Ordering::Complete(int pipe, int of) const {
  // The compiler puts barriers between dependent vector instructions unless told not to.
  if (pipe == PIPE_V && of == PIPE_V && !strict_vector_order_) return issued_[PIPE_V] - 1;
  // The scalar unit does one thing after the other.
  if (pipe == PIPE_S && of == PIPE_S) return issued_[PIPE_S];
  return known_[static_cast<size_t>(pipe)][static_cast<size_t>(of)];
}

void Ordering::Join(int pipe, const Clocks& clocks) {
  Clocks& known = known_[static_cast<size_t>(pipe)];
  for (size_t i = 0; i < known.size(); ++i) known[i] = std::max(known[i], clocks[i]);
}

void Ordering::SetFlag(HardEvent event, int id, Setter setter) {
  CheckId(event, id);
  std::optional<Flag>& flag = FlagAt(event, id);
  if (flag) {
    Fail("SetFlag" + FlagName(event, id) + ": the flag is set already" +
         (flag->setter == Setter::kKernel ? "" : ", by a queue that uses the same id"));
  }
  const auto source = static_cast<size_t>(SourcePipe(event));
  flag = Flag{known_[source], setter};
  flag->clocks[source] = issued_[source];
}

void Ordering::WaitFlag(HardEvent event, int id) {
  CheckId(event, id);
  std::optional<Flag>& flag = FlagAt(event, id);
  if (!flag) Fail("WaitFlag" + FlagName(event, id) + " without a SetFlag: it would hang");
  const Clocks clocks = flag->clocks;
  flag.reset();
  const pipe_t target = TargetPipe(event);
  Join(target, clocks);
  // While the scalar unit waits it hands no instruction to the other pipes.
  if (target == PIPE_S) {
    for (int pipe = 0; pipe < kPipes; ++pipe) Join(pipe, known_[PIPE_S]);
  }
}

void Ordering::Barrier(pipe_t pipe) {
  if (pipe == PIPE_ALL) {
    known_.fill(issued_);
  } else {
    const auto p = static_cast<size_t>(pipe);
    known_[p][p] = issued_[p];
  }
}

int Ordering::FirstFreeId(HardEvent event) const {
  const auto& taken = taken_[static_cast<size_t>(event)];
  const auto* free_id = std::find(taken.begin(), taken.end(), false);
  if (free_id == taken.end()) Fail("no event id is left: " + FlagName(event, kEventIds));
  return static_cast<int>(free_id - taken.begin());
}

int Ordering::AllocateId(HardEvent event) {
  const int id = FirstFreeId(event);
  taken_[static_cast<size_t>(event)][static_cast<size_t>(id)] = true;
  return id;
}

void Ordering::ReleaseId(HardEvent event, int id) {
  CheckId(event, id);
  bool& taken = taken_[static_cast<size_t>(event)][static_cast<size_t>(id)];
  if (!taken) Fail("ReleaseEventID" + FlagName(event, id) + ": the id is not allocated");
  taken = false;
}

void Ordering::CheckEnd() const {
  for (int e = 0; e < kEvents; ++e) {
    for (int id = 0; id < kEventIds; ++id) {
      const auto& flag = flags_[static_cast<size_t>(e)][static_cast<size_t>(id)];
      if (!flag || flag->setter == Setter::kQueueFreed) continue;
      const std::string name = FlagName(static_cast<HardEvent>(e), id);
      Fail(flag->setter == Setter::kKernel
               ? "SetFlag" + name + " without a WaitFlag at the end of the kernel"
               : "EnQue without a DeQue at the end of the kernel, flag " + name);
    }
  }
}

}  // namespace ascend_emulator
