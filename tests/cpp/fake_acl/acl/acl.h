// What the Ascend backend uses of CANN's runtime, for machines without it.

#ifndef SELECT_ATTN_OPS_TESTS_FAKE_ACL_ACL_ACL_H_
#define SELECT_ATTN_OPS_TESTS_FAKE_ACL_ACL_ACL_H_

#include <cstdint>

// NOLINTBEGIN(readability-identifier-naming): the names are CANN's.

using aclError = int;

constexpr aclError ACL_SUCCESS = 0;
constexpr aclError ACL_ERROR_REPEAT_INITIALIZE = 100002;

enum aclDeviceInfo { ACL_DEVICE_INFO_AI_CORE_NUM, ACL_DEVICE_INFO_VECTOR_CORE_NUM };

enum aclrtLastErrLevel { ACL_RT_THREAD_LEVEL };

extern "C" {

aclError aclInit(const char* config);
aclError aclrtGetDeviceCount(uint32_t* count);
const char* aclrtGetSocName();
aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo info, int64_t* value);
aclError aclrtGetDevice(int32_t* device);
aclError aclrtSetDevice(int32_t device);
aclError aclrtGetLastError(aclrtLastErrLevel level);
const char* aclGetRecentErrMsg();

}  // extern "C"

// NOLINTEND(readability-identifier-naming)

#endif  // SELECT_ATTN_OPS_TESTS_FAKE_ACL_ACL_ACL_H_
