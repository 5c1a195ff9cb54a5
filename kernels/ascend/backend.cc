// The Ascend backend as the core library sees it.

#include "ascend/backend.h"

#include <acl/acl.h>

#include <string>

#include "ascend/device.h"
#include "ascend/limits.h"

namespace select_attn::ascend {

namespace {

std::string SocName() {
  const char* name = aclrtGetSocName();
  return name == nullptr ? "an unknown chip" : name;
}

// "Ascend910B4 (40 vector cores), 8 devices".
const char* Description() {
  uint32_t count = 0;
  aclrtGetDeviceCount(&count);
  return Keep(SocName() + " (" + std::to_string(NumVectorCores({kDLExtDev, 0})) +
              " vector cores), " + std::to_string(count) + (count == 1 ? " device" : " devices"));
}

// Why nothing can run here; empty if something can.
std::string WhyNot() {
  // Whoever comes first initialises ACL, torch-npu or this.
  const aclError initialised = aclInit(nullptr);
  if (initialised != ACL_SUCCESS && initialised != ACL_ERROR_REPEAT_INITIALIZE) {
    return "aclInit failed with error " + std::to_string(initialised) +
           "; is there an NPU driver, and is CANN's set_env.sh sourced?";
  }
  uint32_t count = 0;
  const aclError error = aclrtGetDeviceCount(&count);
  if (error != ACL_SUCCESS) {
    return "aclrtGetDeviceCount failed with error " + std::to_string(error);
  }
  if (count == 0) return "there is no NPU";
  const std::string soc = SocName();
  if (soc.rfind("Ascend910B", 0) != 0) {
    return "the kernels are for Ascend910B1 to Ascend910B4, and this is " + soc;
  }
  return "";
}

// By name, so that what is not here is no operator of the backend.
BackendTable MakeTable() {
  BackendTable table = {};
  table.version = BackendTable::kVersion;
  table.description = Description;
  table.quest_prefill_metadata = QuestPrefillMetadata();
  table.quest_block_select_paged = QuestBlockSelectPaged();
  table.selected_block_tables = SelectedBlockTables();
  return table;
}

}  // namespace
}  // namespace select_attn::ascend

extern "C" __attribute__((visibility("default"))) const select_attn::BackendTable*
select_attn_ops_backend(const char** why) {
  namespace ascend = select_attn::ascend;
  const std::string reason = ascend::WhyNot();
  if (!reason.empty()) {
    *why = ascend::Keep(reason);
    return nullptr;
  }
  static const select_attn::BackendTable table = ascend::MakeTable();
  return &table;
}
