#include "fake_acl.h"

FakeAcl fake_acl;

// NOLINTBEGIN(readability-identifier-naming): the names are CANN's.

extern "C" {

aclError aclInit(const char* /*config*/) { return fake_acl.init_error; }

aclError aclrtGetDeviceCount(uint32_t* count) {
  *count = fake_acl.num_devices;
  return fake_acl.count_error;
}

const char* aclrtGetSocName() { return fake_acl.soc; }

aclError aclGetDeviceCapability(uint32_t /*device*/, aclDeviceInfo info, int64_t* value) {
  ++fake_acl.num_capability_calls;
  *value = info == ACL_DEVICE_INFO_VECTOR_CORE_NUM ? fake_acl.vector_cores : 0;
  return fake_acl.capability_error;
}

aclError aclrtGetDevice(int32_t* device) {
  constexpr aclError kNoContext = 107002;
  if (fake_acl.current < 0) return kNoContext;
  *device = fake_acl.current;
  return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t device) {
  fake_acl.set_devices.push_back(device);
  if (fake_acl.set_device_error == ACL_SUCCESS) fake_acl.current = device;
  return fake_acl.set_device_error;
}

aclError aclrtGetLastError(aclrtLastErrLevel /*level*/) {
  const aclError error = fake_acl.last_error;
  fake_acl.last_error = ACL_SUCCESS;
  return error;
}

const char* aclGetRecentErrMsg() { return fake_acl.message; }

}  // extern "C"

// NOLINTEND(readability-identifier-naming)
