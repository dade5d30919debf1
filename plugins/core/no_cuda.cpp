// The GPU functions of a build without CUDA.
#include "sdct/sdct.h"

namespace sdct {

Status cuda_prepare(const Plan&, DevicePlan** device_plan) noexcept {
  if (device_plan) *device_plan = nullptr;
  return Status::kUnavailable;
}
void cuda_release(DevicePlan*) noexcept {}
size_t cuda_workspace_bytes(const DevicePlan&, int64_t) noexcept { return 0; }
Status cuda_run(const DevicePlan&, const Problem&, void*, size_t, CUstream_st*) noexcept { return Status::kUnavailable; }
const char* cuda_error() noexcept { return "built without CUDA"; }

}  // namespace sdct
