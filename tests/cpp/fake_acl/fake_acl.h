// A runtime of CANN that says what a test wants.

#ifndef SELECT_ATTN_OPS_TESTS_FAKE_ACL_FAKE_ACL_H_
#define SELECT_ATTN_OPS_TESTS_FAKE_ACL_FAKE_ACL_H_

#include <acl/acl.h>

#include <cstdint>
#include <vector>

struct FakeAcl {
  aclError init_error = ACL_SUCCESS;
  aclError count_error = ACL_SUCCESS;
  aclError capability_error = ACL_SUCCESS;
  aclError set_device_error = ACL_SUCCESS;
  aclError last_error = ACL_SUCCESS;  // until somebody asks for it
  uint32_t num_devices = 2;
  int64_t vector_cores = 40;
  const char* soc = "Ascend910B4";
  const char* message = nullptr;
  int32_t current = -1;              // the thread's device; -1: it has used none
  std::vector<int32_t> set_devices;  // what aclrtSetDevice was called with
  int num_capability_calls = 0;
};

extern FakeAcl fake_acl;

#endif  // SELECT_ATTN_OPS_TESTS_FAKE_ACL_FAKE_ACL_H_
