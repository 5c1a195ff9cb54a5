// What Ascend C adds to C++, and the pipes of a vector core.

#ifndef SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_DEVICE_LANGUAGE_H_
#define SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_DEVICE_LANGUAGE_H_

#include <cstdint>

#define __aicore__
#define __global__
#define __gm__
#define __ubuf__
#define __vector__

using GM_ADDR = uint8_t*;

// Those that a vector core has, and all of them.
enum pipe_t { PIPE_S = 0, PIPE_V = 1, PIPE_MTE2 = 2, PIPE_MTE3 = 3, PIPE_ALL = 4 };

enum event_t {
  EVENT_ID0 = 0,
  EVENT_ID1,
  EVENT_ID2,
  EVENT_ID3,
  EVENT_ID4,
  EVENT_ID5,
  EVENT_ID6,
  EVENT_ID7
};

namespace ascend_emulator {

constexpr int kPipes = 4;
constexpr int kEventIds = 8;  // per pair of pipes

inline const char* PipeName(int pipe) {
  constexpr const char* kNames[] = {"S", "V", "MTE2", "MTE3", "ALL"};
  return kNames[pipe];
}

}  // namespace ascend_emulator

namespace AscendC {

// From the first pipe to the second.
enum class HardEvent : uint8_t {
  MTE2_V,
  V_MTE2,
  V_MTE3,
  MTE3_V,
  V_S,
  S_V,
  MTE2_S,
  S_MTE2,
  MTE3_S,
  S_MTE3,
  MTE3_MTE2,
  MTE2_MTE3,
  V_V
};

using TEventID = int8_t;

}  // namespace AscendC

namespace ascend_emulator {

inline pipe_t SourcePipe(AscendC::HardEvent event) {
  constexpr pipe_t kPipesOf[] = {PIPE_MTE2, PIPE_V,    PIPE_V, PIPE_MTE3, PIPE_V,
                                 PIPE_S,    PIPE_MTE2, PIPE_S, PIPE_MTE3, PIPE_S,
                                 PIPE_MTE3, PIPE_MTE2, PIPE_V};
  return kPipesOf[static_cast<int>(event)];
}
inline pipe_t TargetPipe(AscendC::HardEvent event) {
  constexpr pipe_t kPipesOf[] = {PIPE_V,    PIPE_MTE2, PIPE_MTE3, PIPE_V, PIPE_S,
                                 PIPE_V,    PIPE_S,    PIPE_MTE2, PIPE_S, PIPE_MTE3,
                                 PIPE_MTE2, PIPE_MTE3, PIPE_V};
  return kPipesOf[static_cast<int>(event)];
}

}  // namespace ascend_emulator

#endif  // SELECT_ATTN_OPS_TESTS_ASCEND_EMULATOR_DEVICE_LANGUAGE_H_
