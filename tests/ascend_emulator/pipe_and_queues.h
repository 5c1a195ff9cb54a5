// TPipe, TBuf, TQue, and synchronisation of the pipes.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_PIPE_AND_QUEUES_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_PIPE_AND_QUEUES_H_

#include <algorithm>
#include <cstdint>
#include <deque>
#include <vector>

#include "tensors.h"

namespace AscendC {

template <HardEvent event>
void SetFlag(int32_t id) {
  ascend_emulator::Core().SetFlag(event, id, ascend_emulator::Ordering::Setter::kKernel);
}
template <HardEvent event>
void WaitFlag(int32_t id) {
  ascend_emulator::Core().WaitFlag(event, id);
}
template <pipe_t pipe>
void PipeBarrier() {
  static_assert(pipe == PIPE_V || pipe == PIPE_MTE2 || pipe == PIPE_MTE3 || pipe == PIPE_ALL,
                "no barrier of this pipe");
  ascend_emulator::Core().Barrier(pipe);
}

template <TPosition position = TPosition::VECCALC>
class TBuf {
 public:
  template <typename T>
  LocalTensor<T> Get() const {
    return Get<T>(bytes_ / static_cast<uint32_t>(sizeof(T)));
  }
  template <typename T>
  LocalTensor<T> Get(uint32_t size) const {
    ascend_emulator::Check(bytes_ > 0, "TBuf::Get before InitBuffer");
    ascend_emulator::Check(size * sizeof(T) <= bytes_, "TBuf::Get: more than the buffer holds");
    return LocalTensor<T>(address_, size, position);
  }

 private:
  friend class TPipe;

  uint32_t address_ = 0;
  uint32_t bytes_ = 0;
};

// A queue of VECIN brings what MTE2 copied to the vector unit, one of VECOUT what that computed to
// MTE3. Its flags are those of kernels, as in Ascend C: so an id that a kernel takes without asking
// may be one of a queue.
template <TPosition position, int32_t depth>
class TQue {
 public:
  static_assert(position == TPosition::VECIN || position == TPosition::VECOUT,
                "a queue is of VECIN or VECOUT");
  static_assert(depth >= 1, "queues of no depth are not modelled");

  template <typename T>
  LocalTensor<T> AllocTensor() {
    ascend_emulator::Check(!buffers_.empty(), "AllocTensor before InitBuffer");
    // In turn, so that the one given back last has the most time.
    for (size_t tried = 0; tried < buffers_.size(); ++tried) {
      const size_t i = next_;
      next_ = (next_ + 1) % buffers_.size();
      Buffer& buffer = buffers_[i];
      if (buffer.state != State::kFree) continue;
      if (buffer.flag >= 0) Wait(kFreed, buffer);
      buffer.state = State::kAllocated;
      ascend_emulator::Core().buffer.MakeUndefined(buffer.address, bytes_);
      return Tensor<T>(i);
    }
    ascend_emulator::Fail("AllocTensor: all buffers of the queue are in use");
  }

  template <typename T>
  bool EnQue(const LocalTensor<T>& tensor) {
    Buffer& buffer = Own(tensor, "EnQue of a tensor that this queue did not allocate");
    ascend_emulator::Check(buffer.state == State::kAllocated,
                           "EnQue of a tensor that is not allocated, or queued already");
    ascend_emulator::Check(queued_.size() < depth, "EnQue: the queue is full");
    Set(kFilled, buffer, ascend_emulator::Ordering::Setter::kQueueFilled);
    buffer.state = State::kQueued;
    queued_.push_back(static_cast<size_t>(tensor.buffer()));
    int64_t& most = ascend_emulator::Core().counters.most_tensors_in_queue;
    most = std::max(most, static_cast<int64_t>(queued_.size()));
    return true;
  }

  template <typename T>
  LocalTensor<T> DeQue() {
    ascend_emulator::Check(!queued_.empty(), "DeQue of an empty queue: it would hang");
    const size_t i = queued_.front();
    queued_.pop_front();
    Wait(kFilled, buffers_[i]);
    buffers_[i].state = State::kTaken;
    return Tensor<T>(i);
  }

  template <typename T>
  void FreeTensor(const LocalTensor<T>& tensor) {
    Buffer& buffer = Own(tensor, "FreeTensor of a tensor that this queue did not allocate");
    ascend_emulator::Check(buffer.state != State::kFree, "FreeTensor of a tensor that is free");
    ascend_emulator::Check(buffer.state != State::kQueued, "FreeTensor of a tensor that is queued");
    Set(kFreed, buffer, ascend_emulator::Ordering::Setter::kQueueFreed);
    buffer.state = State::kFree;
  }

  bool HasTensorInQue() const { return !queued_.empty(); }
  bool HasIdleBuffer() const {
    return std::any_of(buffers_.begin(), buffers_.end(),
                       [](const Buffer& buffer) { return buffer.state == State::kFree; });
  }

 private:
  friend class TPipe;

  static constexpr HardEvent kFilled =
      position == TPosition::VECIN ? HardEvent::MTE2_V : HardEvent::V_MTE3;
  static constexpr HardEvent kFreed =
      position == TPosition::VECIN ? HardEvent::V_MTE2 : HardEvent::MTE3_V;

  enum class State { kFree, kAllocated, kQueued, kTaken };

  struct Buffer {
    uint32_t address;
    State state;
    int flag;  // id of the flag that is set for it, or -1
  };

  template <typename T>
  LocalTensor<T> Tensor(size_t i) const {
    return LocalTensor<T>(buffers_[i].address, bytes_ / static_cast<uint32_t>(sizeof(T)), position,
                          this, static_cast<int>(i));
  }
  template <typename T>
  Buffer& Own(const LocalTensor<T>& tensor, const char* otherwise) {
    ascend_emulator::Check(tensor.queue() == this, otherwise);
    return buffers_[static_cast<size_t>(tensor.buffer())];
  }
  static void Set(HardEvent event, Buffer& buffer, ascend_emulator::Ordering::Setter setter) {
    ascend_emulator::VectorCore& core = ascend_emulator::Core();
    buffer.flag = core.ordering.AllocateId(event);
    core.SetFlag(event, buffer.flag, setter);
  }
  static void Wait(HardEvent event, Buffer& buffer) {
    ascend_emulator::VectorCore& core = ascend_emulator::Core();
    core.WaitFlag(event, buffer.flag);
    core.ordering.ReleaseId(event, buffer.flag);
    buffer.flag = -1;
  }

  std::vector<Buffer> buffers_;
  uint32_t bytes_ = 0;  // per buffer
  std::deque<size_t> queued_;
  size_t next_ = 0;
};

class TPipe {
 public:
  TPipe() = default;
  TPipe(const TPipe&) = delete;
  TPipe& operator=(const TPipe&) = delete;

  template <TPosition position, int32_t depth>
  bool InitBuffer(TQue<position, depth>& queue, uint8_t num, uint32_t bytes) {
    ascend_emulator::Check(queue.buffers_.empty(), "InitBuffer: the queue has buffers already");
    ascend_emulator::Check(num > 0, "InitBuffer: a queue of no buffers");
    queue.bytes_ = bytes;
    for (int i = 0; i < num; ++i) queue.buffers_.push_back({Take(bytes), {}, -1});
    return true;
  }
  template <TPosition position>
  bool InitBuffer(TBuf<position>& buffer, uint32_t bytes) {
    ascend_emulator::Check(buffer.bytes_ == 0, "InitBuffer: the buffer has memory already");
    buffer.address_ = Take(bytes);
    buffer.bytes_ = bytes;
    return true;
  }

  template <HardEvent event>
  TEventID AllocEventID() {
    return static_cast<TEventID>(ascend_emulator::Core().ordering.AllocateId(event));
  }
  template <HardEvent event>
  void ReleaseEventID(TEventID id) {
    ascend_emulator::Core().ordering.ReleaseId(event, id);
  }
  TEventID FetchEventID(HardEvent event) {
    return static_cast<TEventID>(ascend_emulator::Core().ordering.FirstFreeId(event));
  }
  template <HardEvent event>
  TEventID FetchEventID() {
    return FetchEventID(event);
  }

 private:
  static uint32_t Take(uint32_t bytes) {
    ascend_emulator::VectorCore& core = ascend_emulator::Core();
    const uint32_t address = core.buffer.Take(bytes);
    core.counters.buffer_bytes = core.buffer.bytes_taken();
    return address;
  }
};

}  // namespace AscendC

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_PIPE_AND_QUEUES_H_
