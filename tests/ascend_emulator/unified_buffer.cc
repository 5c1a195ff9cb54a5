#include "unified_buffer.h"

#include <algorithm>
#include <cstring>

#include "failure.h"

namespace ascend_emulator {
namespace {

constexpr uint8_t kPoison = 0xFF;  // NaN in every float type

}  // namespace

UnifiedBuffer::UnifiedBuffer(const Ordering& ordering)
    : ordering_(ordering),
      bytes_(kUnifiedBufferBytes + kBlockBytes, kPoison),
      defined_(kUnifiedBufferBytes, 0),
      cells_(kCells, Cell{}) {
  const auto address = reinterpret_cast<uintptr_t>(bytes_.data());
  padding_ = (kBlockBytes - address % kBlockBytes) % kBlockBytes;
}

uint32_t UnifiedBuffer::Take(uint32_t bytes) {
  if (bytes == 0) Fail("InitBuffer: a buffer of 0 bytes");
  if (++num_buffers_ > kMostBuffers) Fail("InitBuffer: more than 64 buffers");
  const uint64_t rounded = (uint64_t{bytes} + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
  if (taken_ + rounded > kUnifiedBufferBytes) {
    Fail("InitBuffer: the unified buffer is full: " + std::to_string(taken_) + " of " +
         std::to_string(kUnifiedBufferBytes) + " bytes are taken, " + std::to_string(rounded) +
         " more are asked for");
  }
  const uint32_t address = taken_;
  taken_ += static_cast<uint32_t>(rounded);
  return address;
}

void UnifiedBuffer::CheckRange(const Access& access, uint32_t address, uint32_t bytes) const {
  if (uint64_t{address} + bytes > kUnifiedBufferBytes) {
    Fail(std::string(access.name) + ": bytes " + std::to_string(address) + " to " +
         std::to_string(uint64_t{address} + bytes) + " are outside the unified buffer");
  }
}

void UnifiedBuffer::Conflict(const Access& access, const char* what, const char* earlier_what,
                             int earlier_pipe, uint32_t earlier_number, uint32_t cell) const {
  const auto& names = names_[earlier_pipe];
  const char* earlier = earlier_number < names.size() ? names[earlier_number] : nullptr;
  std::string missing = std::string(PipeName(earlier_pipe)) + "_" + PipeName(access.pipe);
  if (earlier_pipe == access.pipe)
    missing = std::string("PipeBarrier<PIPE_") + PipeName(earlier_pipe) + ">";
  Fail(std::string(access.name) + " (" + PipeName(access.pipe) + ") " + what + " what " +
       (earlier != nullptr ? earlier : "an instruction") + " (" + PipeName(earlier_pipe) + ") " +
       earlier_what + ", byte " + std::to_string(cell * kCellBytes) +
       " of the unified buffer, without synchronisation: " + missing + " is missing");
}

void UnifiedBuffer::Remember(const Access& access) {
  auto& names = names_[access.pipe];
  if (names.size() <= access.number) names.resize(access.number + 1, nullptr);
  names[access.number] = access.name;
}

void UnifiedBuffer::ReadAny(const Access& access, uint32_t address, uint32_t bytes) {
  if (bytes == 0) return;
  CheckRange(access, address, bytes);
  Remember(access);
  const uint32_t end = (address + bytes - 1) / kCellBytes + 1;
  for (uint32_t i = address / kCellBytes; i < end; ++i) {
    Cell& cell = cells_[i];
    const bool own = cell.writer == access.pipe && cell.written == access.number;
    if (!own && cell.written > ordering_.Complete(access.pipe, cell.writer)) {
      Conflict(access, "reads", "wrote", cell.writer, cell.written, i);
    }
    cell.read[access.pipe] = access.number;
  }
}

void UnifiedBuffer::Read(const Access& access, uint32_t address, uint32_t bytes) {
  if (bytes == 0) return;
  ReadAny(access, address, bytes);
  const uint8_t* first = defined_.data() + address;
  const void* undefined = std::memchr(first, 0, bytes);
  if (undefined != nullptr) {
    const auto offset = static_cast<const uint8_t*>(undefined) - first;
    Fail(std::string(access.name) + " reads byte " + std::to_string(address + offset) +
         " of the unified buffer, which nobody wrote");
  }
}

void UnifiedBuffer::Write(const Access& access, uint32_t address, uint32_t bytes) {
  if (bytes == 0) return;
  CheckRange(access, address, bytes);
  Remember(access);
  uint32_t complete[kPipes];
  for (int pipe = 0; pipe < kPipes; ++pipe) complete[pipe] = ordering_.Complete(access.pipe, pipe);
  const uint32_t end = (address + bytes - 1) / kCellBytes + 1;
  for (uint32_t i = address / kCellBytes; i < end; ++i) {
    Cell& cell = cells_[i];
    const bool own = cell.writer == access.pipe && cell.written == access.number;
    if (!own && cell.written > complete[cell.writer]) {
      Conflict(access, "overwrites", "wrote", cell.writer, cell.written, i);
    }
    for (int pipe = 0; pipe < kPipes; ++pipe) {
      const bool own_read = pipe == access.pipe && cell.read[pipe] == access.number;
      if (!own_read && cell.read[pipe] > complete[pipe]) {
        Conflict(access, "overwrites", "reads", pipe, cell.read[pipe], i);
      }
    }
    cell.written = access.number;
    cell.writer = static_cast<uint8_t>(access.pipe);
  }
  std::fill_n(defined_.begin() + address, bytes, uint8_t{1});
}

bool UnifiedBuffer::WroteAny(const Access& access, uint32_t address, uint32_t bytes) const {
  if (bytes == 0) return false;
  const uint32_t end = (address + bytes - 1) / kCellBytes + 1;
  for (uint32_t i = address / kCellBytes; i < end && i < kCells; ++i) {
    if (cells_[i].writer == access.pipe && cells_[i].written == access.number) return true;
  }
  return false;
}

void UnifiedBuffer::MakeUndefined(uint32_t address, uint32_t bytes) {
  std::fill_n(defined_.begin() + address, bytes, uint8_t{0});
  std::fill_n(data() + address, bytes, kPoison);
}

void UnifiedBuffer::CopyDefined(uint32_t to, uint32_t from, uint32_t bytes) {
  std::memmove(defined_.data() + to, defined_.data() + from, bytes);
}

}  // namespace ascend_emulator
