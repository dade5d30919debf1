// Launching the kernel on a GPU.
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#include "kernel.h"

namespace sdct {
namespace {

constexpr int kMaxThreads = 512;

thread_local const char* last_error = "";

bool failed(cudaError_t error) {
  if (error == cudaSuccess) return false;
  last_error = cudaGetErrorString(error);
  static_cast<void>(cudaGetLastError());  // reported here; the host's own checks must not meet it again
  return true;
}

class GpuBlock {
 public:
  __device__ __forceinline__ int threads() const { return int(blockDim.x); }
  template <class F>
  __device__ __forceinline__ void phase(F f) {
    f(int32_t(threadIdx.x));
    __syncthreads();
  }
};

// grid.x blocks share the tokens, grid.y blocks the projections. kShared: working memory on chip, else a slice of `workspace`.
template <class T, bool kShared>
__global__ void __launch_bounds__(kMaxThreads, 1)
    spectral_delta(const __grid_constant__ KernelArgs args, Complex* workspace, size_t slice, int32_t step) {
  extern __shared__ __align__(16) unsigned char shared[];
  Complex* memory = reinterpret_cast<Complex*>(shared);
  if constexpr (!kShared) memory = workspace + (size_t(blockIdx.y) * gridDim.x + blockIdx.x) * slice;
  const int32_t first = int32_t(blockIdx.y) * step;
  GpuBlock block;
  for (int64_t t = blockIdx.x; t < args.problem.tokens; t += gridDim.x) {
    kernel::run_token<T>(block, args, memory, t, first, first + step);
  }
}

using Kernel = void (*)(KernelArgs, Complex*, size_t, int32_t);

Kernel kernel_of(DataType type, bool shared) {
  switch (type) {
    case DataType::kFloat32: return shared ? spectral_delta<float, true> : spectral_delta<float, false>;
    case DataType::kFloat16: return shared ? spectral_delta<Half, true> : spectral_delta<Half, false>;
    case DataType::kBFloat16: return shared ? spectral_delta<BFloat16, true> : spectral_delta<BFloat16, false>;
  }
  return nullptr;
}

// Tables of one length on one device.
struct DeviceTables {
  void* memory = nullptr;
  int device = 0;
  ~DeviceTables() {
    int current = 0;
    if (!memory || cudaGetDevice(&current) != cudaSuccess) return;
    if (cudaSetDevice(device) == cudaSuccess) cudaFree(memory);
    cudaSetDevice(current);
  }
};

Status upload(const Tables& tables, int device, std::shared_ptr<const DeviceTables>* out) {
  static std::mutex mutex;
  static auto* cache = new std::map<std::pair<int, int32_t>, std::weak_ptr<const DeviceTables>>;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& known = (*cache)[{device, tables.length()}];
  *out = known.lock();
  if (*out) return Status::kOk;
  auto fresh = std::make_shared<DeviceTables>();
  fresh->device = device;
  if (failed(cudaMalloc(&fresh->memory, tables.blob().size()))) return Status::kOutOfMemory;
  // on a stream that is waited for: cudaMemcpy from ordinary memory may return before the tables have arrived, and a launch on a
  // stream that does not take turns with the default one would not wait for them
  cudaStream_t stream = nullptr;
  if (failed(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking))) return Status::kCuda;
  const bool lost =
      failed(cudaMemcpyAsync(fresh->memory, tables.blob().data(), tables.blob().size(), cudaMemcpyHostToDevice, stream)) ||
      failed(cudaStreamSynchronize(stream));
  if (failed(cudaStreamDestroy(stream)) || lost) return Status::kCuda;
  *out = fresh;
  known = *out;
  return Status::kOk;
}

}  // namespace

class DevicePlan {
 public:
  Shape shape;
  KernelArgs args;  // without a problem
  std::shared_ptr<const DeviceTables> in, out[kMaxProjections];
  size_t bytes = 0;  // working memory of a block
  bool shared = false;
  int threads = 0;
  int multiprocessors = 0;

  int32_t split(int64_t tokens) const {  // blocks for the projections: apart while the GPU has room, to cut latency
    return tokens * shape.projections <= multiprocessors ? shape.projections : 1;
  }
  int64_t blocks(int64_t tokens) const {  // blocks for the tokens
    return std::min<int64_t>(tokens, shared ? INT32_MAX : 2 * int64_t(multiprocessors));
  }
};

const char* cuda_error() noexcept { return last_error; }

Status cuda_prepare(const Plan& plan, DevicePlan** device_plan) noexcept {
  if (!device_plan) return Status::kBadProblem;
  *device_plan = nullptr;
  try {
    auto made = std::make_unique<DevicePlan>();
    made->shape = plan.shape;
    made->args = kernel_args(plan, Problem{});
    int device = 0, most_shared = 0;
    if (failed(cudaGetDevice(&device)) ||
        failed(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) ||
        failed(cudaDeviceGetAttribute(&made->multiprocessors, cudaDevAttrMultiProcessorCount, device))) {
      return Status::kCuda;
    }
    Status status = upload(*plan.in, device, &made->in);
    if (status != Status::kOk) return status;
    made->args.in = plan.in->view(made->in->memory);
    int32_t longest = made->args.in.m;
    for (int32_t j = 0; j < plan.shape.projections; ++j) {
      status = upload(*plan.out[j], device, &made->out[j]);
      if (status != Status::kOk) return status;
      made->args.out[j] = plan.out[j]->view(made->out[j]->memory);
      longest = std::max(longest, made->args.out[j].m);
    }
    made->bytes = (block_bytes(made->args) + 15) / 16 * 16;
    made->shared = made->bytes <= size_t(most_shared);
    made->threads = std::min(kMaxThreads, std::max(64, (longest / 8 + 31) / 32 * 32));
    if (made->shared) {
      for (const DataType type : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
        if (failed(cudaFuncSetAttribute(kernel_of(type, true), cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared))) {
          return Status::kCuda;
        }
      }
    }
    *device_plan = made.release();
  } catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
  }
  return Status::kOk;
}

void cuda_release(DevicePlan* device_plan) noexcept { delete device_plan; }

size_t cuda_workspace_bytes(const DevicePlan& plan, int64_t tokens) noexcept {
  if (plan.shared || tokens <= 0) return 0;
  return size_t(plan.blocks(tokens)) * plan.shape.projections * plan.bytes;
}

Status cuda_run(const DevicePlan& plan, const Problem& problem, void* workspace, size_t workspace_bytes,
                CUstream_st* stream) noexcept {
  const Status status = check_problem(plan.shape, problem);
  if (status != Status::kOk) return status;
  if (problem.tokens == 0) return Status::kOk;
  const int32_t split = plan.split(problem.tokens);
  const int64_t blocks = plan.blocks(problem.tokens);
  if (!plan.shared && (!workspace || reinterpret_cast<uintptr_t>(workspace) % 16 != 0 ||
                       workspace_bytes < size_t(blocks) * split * plan.bytes)) {
    return Status::kWorkspace;
  }
  KernelArgs args = plan.args;
  args.problem = problem;
  args.tokens_per_row = problem.rows > 0 ? std::max<int64_t>(problem.tokens / problem.rows, 1) : 1;
  Complex* memory = static_cast<Complex*>(workspace);
  size_t slice = plan.bytes / sizeof(Complex);
  int32_t step = plan.shape.projections / split;
  void* parameters[] = {&args, &memory, &slice, &step};
  const dim3 grid{unsigned(blocks), unsigned(split), 1}, block{unsigned(plan.threads), 1, 1};
  const auto* kernel = reinterpret_cast<const void*>(kernel_of(problem.type, plan.shared));
  if (failed(cudaLaunchKernel(kernel, grid, block, parameters, plan.shared ? plan.bytes : 0, stream))) {
    return Status::kCuda;
  }
  return Status::kOk;
}

}  // namespace sdct
