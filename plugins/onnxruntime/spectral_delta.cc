// ONNX Runtime operator library: domain "sdct", operator SpectralDelta, on the CPU and (where built with CUDA) the CUDA provider.
//
// The node is described in sdct/sdct.h and in sdct_export/contract.py. Inputs x, adapter_ids, adapter_scales, values, indices,
// y_1 ... y_m; outputs y_1' ... y_m'; attributes d_in, d_out, capacity. x and every y share one of float32, float16, bfloat16.
// This file validates, dispatches and reports errors; no exception leaves it. It needs no header of ONNX Runtime (abi.h) and links
// against nothing of it: the runtime that loads the library passes its functions.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "abi.h"
#include "sdct/sdct.h"

#if defined(SDCT_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

#if defined(_WIN32)
#define SDCT_EXPORT __declspec(dllexport)
#else
#define SDCT_EXPORT __attribute__((visibility("default")))
#endif

namespace {

using namespace sdct;
using ort::Characteristic, ort::ElementType, ort::ErrorCode, ort::MemoryType;

enum Input : size_t { kX, kIds, kScales, kValues, kIndices, kFirstY };

constexpr size_t kMaxRank = 8;

ort::Api api;  // of the runtime that registered the library

// Carries a status through C++ code; never leaves this file.
struct Failure {
  ort::Status* status;
};

[[noreturn]] void fail(ErrorCode code, const std::string& message) {
  throw Failure{api.CreateStatus(code, message.c_str())};
}

void check(ort::Status* status) {
  if (status) throw Failure{status};
}

// Runs f and turns whatever it throws into a status.
template <class F>
ort::Status* guarded(F f) noexcept {
  try {
    f();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return api.CreateStatus(ErrorCode::kRuntimeException, error.what());
  } catch (...) {
    return api.CreateStatus(ErrorCode::kRuntimeException, "SpectralDelta: unknown error");
  }
}

struct Tensor {
  const void* data = nullptr;
  ElementType type = ElementType::kUndefined;
  size_t rank = 0;
  int64_t dims[kMaxRank] = {};
  int64_t size = 1;

  std::string text() const {
    std::string s = "[";
    for (size_t i = 0; i < rank; ++i) s += (i ? ", " : "") + std::to_string(dims[i]);
    return s + "]";
  }
};

#if defined(SDCT_WITH_CUDA)
// Makes a device the current one, and again the one that was. The provider chooses the device of its session for the thread that
// calls Run, and no more than that.
class OnDevice {
 public:
  OnDevice(int device, const std::string& node) {
    cudaError_t error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device) {
      error = cudaSetDevice(device);
      changed_ = error == cudaSuccess;
    }
    if (error == cudaSuccess) return;
    static_cast<void>(cudaGetLastError());  // reported here; the provider's own checks must not meet it again
    fail(ErrorCode::kEpFail, node + "CUDA device " + std::to_string(device) + " cannot be used: " + cudaGetErrorString(error));
  }
  ~OnDevice() {
    if (changed_ && cudaSetDevice(before_) != cudaSuccess) static_cast<void>(cudaGetLastError());
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};
#endif

class Kernel {
 public:
  Kernel(const ort::KernelInfo* info, bool cuda) : cuda_(cuda) {
    size_t length = 0;
    check(api.KernelInfo_GetNodeName(info, nullptr, &length));
    name_.resize(length);
    check(api.KernelInfo_GetNodeName(info, name_.data(), &length));
    if (!name_.empty() && name_.back() == '\0') name_.pop_back();
    name_ = "SpectralDelta node '" + name_ + "': ";

    size_t inputs = 0, outputs = 0;
    check(api.KernelInfo_GetInputCount(info, &inputs));
    check(api.KernelInfo_GetOutputCount(info, &outputs));
    const std::vector<int64_t> d_out = ints(info, "d_out"), capacity = ints(info, "capacity");
    int64_t d_in = 0;
    check(api.KernelInfoGetAttribute_int64(info, "d_in", &d_in));
    const size_t m = d_out.size();
    if (m < 1 || m > size_t(kMaxProjections) || capacity.size() != m || inputs != kFirstY + m || outputs != m) {
      fail(ErrorCode::kInvalidGraph, name_ + "d_out and capacity need one value for each y (1 to " +
                                         std::to_string(kMaxProjections) + "); got " + std::to_string(m) + " and " +
                                         std::to_string(capacity.size()) + " for " + std::to_string(inputs) + " inputs and " +
                                         std::to_string(outputs) + " outputs");
    }
    const auto in_range = [](int64_t value) { return value >= 0 && value <= INT32_MAX; };
    Shape shape{};
    bool good = in_range(d_in);
    shape.d_in = int32_t(d_in);
    shape.projections = int32_t(m);
    for (size_t j = 0; j < m; ++j) {
      good = good && in_range(d_out[j]) && in_range(capacity[j]);
      if (!good) break;
      shape.d_out[j] = int32_t(d_out[j]);
      shape.capacity[j] = int32_t(capacity[j]);
      entries_ += capacity[j];  // at most 8 times what an int32 holds
    }
    Plan* plan = nullptr;
    const Status status = good ? create_plan(shape, &plan) : Status::kBadShape;
    if (status != Status::kOk) fail(ErrorCode::kInvalidGraph, name_ + status_text(status));
    plan_.reset(plan);
    if (!cuda_) return;
    ort::Allocator* allocator = nullptr;
    check(api.KernelInfoGetAllocator(info, MemoryType::kDefault, &allocator));
    allocator_ = {allocator, api.ReleaseAllocator};
    check(api.AllocatorGetInfo(allocator, &memory_));
    check(api.MemoryInfoGetId(memory_, &device_));
  }

  void compute(ort::KernelContext* context) {
    const Shape& shape = plan_shape(*plan_);
    const int32_t m = shape.projections;
    Problem p{};
    const Tensor ids = input(context, kIds);
    if (ids.rank != 2) refuse("adapter_ids", ids, "[batch, k]");
    p.rows = ids.dims[0], p.blends = ids.dims[1];
    p.ids = static_cast<const int32_t*>(ids.data);
    if (!cuda_ && std::all_of(p.ids, p.ids + ids.size, [](int32_t id) { return id == 0; })) {
      // the base alone: nothing but y matters
      for (int32_t j = 0; j < m; ++j) {
        const Tensor y = input(context, kFirstY + j);
        void* out = output(context, j, y);
        if (out != y.data && y.size > 0) std::memcpy(out, y.data, size_t(y.size) * element_bytes(type_of(y.type)));
      }
      return;
    }
    const Tensor x = input(context, kX), scales = input(context, kScales), values = input(context, kValues),
                 indices = input(context, kIndices);
    p.type = type_of(x.type);
    if (x.rank < 2 || x.dims[x.rank - 1] != shape.d_in) {
      refuse("x", x, "[batch, ..., " + std::to_string(shape.d_in) + "]");
    }
    p.tokens = x.size / shape.d_in;
    if (scales.rank != 2 || scales.dims[0] != p.rows || scales.dims[1] != p.blends) {
      refuse("adapter_scales", scales, ids.text());
    }
    if (p.tokens > 0 && (p.rows == 0 || p.tokens % p.rows != 0)) {
      fail(ErrorCode::kInvalidArgument, name_ + "x " + x.text() + " has " + std::to_string(p.tokens) +
                                            " tokens, no multiple of the " + std::to_string(p.rows) + " rows of adapter_ids");
    }
    const std::string n = std::to_string(entries_);
    if (values.rank != 2 || values.dims[0] < 1 || values.dims[1] != entries_) refuse("values", values, "[slots, " + n + "]");
    p.slots = values.dims[0];
    if (indices.rank != 3 || indices.dims[0] != p.slots || indices.dims[1] != entries_ || indices.dims[2] != 2) {
      refuse("indices", indices, "[" + std::to_string(p.slots) + ", " + n + ", 2]");
    }
    p.x = x.data;
    p.scales = static_cast<const float*>(scales.data);
    p.values = static_cast<const float*>(values.data);
    p.indices = static_cast<const int32_t*>(indices.data);
    if (!cuda_) {
      for (int64_t i = 0; i < p.rows * p.blends; ++i) {
        if (p.ids[i] < 0 || p.ids[i] >= p.slots) {
          fail(ErrorCode::kInvalidArgument, name_ + "adapter_ids holds " + std::to_string(p.ids[i]) +
                                                "; the bank has slots 0 to " + std::to_string(p.slots - 1));
        }
      }
    }
    set_dense_strides(shape, &p);
    for (int32_t j = 0; j < m; ++j) {
      const Tensor y = input(context, kFirstY + j);
      if (y.type != x.type || y.rank < 1 || y.dims[y.rank - 1] != shape.d_out[j] || y.size != p.tokens * shape.d_out[j]) {
        refuse("y_" + std::to_string(j + 1), y,
               "[..., " + std::to_string(shape.d_out[j]) + "] in the type of x with " + std::to_string(p.tokens) + " tokens");
      }
      p.y_in[j] = y.data;
      p.y_out[j] = output(context, j, y);
    }
    if (p.tokens == 0) return;
    const Status status = cuda_ ? run_cuda(context, p) : run_cpu(context, p);
    if (status == Status::kCuda) fail(ErrorCode::kEpFail, name_ + status_text(status) + ": " + cuda_error());
    if (status != Status::kOk) fail(ErrorCode::kFail, name_ + status_text(status));
  }

 private:
  std::vector<int64_t> ints(const ort::KernelInfo* info, const char* attribute) const {
    size_t count = 0;
    check(api.KernelInfoGetAttributeArray_int64(info, attribute, nullptr, &count));
    std::vector<int64_t> out(count);
    check(api.KernelInfoGetAttributeArray_int64(info, attribute, out.data(), &count));
    return out;
  }

  [[noreturn]] void refuse(const std::string& what, const Tensor& got, const std::string& expected) const {
    fail(ErrorCode::kInvalidArgument, name_ + what + " has shape " + got.text() + ", expected " + expected);
  }

  DataType type_of(ElementType type) const {
    switch (type) {
      case ElementType::kFloat: return DataType::kFloat32;
      case ElementType::kFloat16: return DataType::kFloat16;
      case ElementType::kBFloat16: return DataType::kBFloat16;
      default: fail(ErrorCode::kInvalidArgument, name_ + "x must be float32, float16 or bfloat16");
    }
  }

  Tensor input(const ort::KernelContext* context, size_t index) const {
    const ort::Value* value = nullptr;
    check(api.KernelContext_GetInput(context, index, &value));
    Tensor t;
    if (api.GetTensorElementTypeAndShapeDataReference) {
      const int64_t* dims = nullptr;
      check(api.GetTensorElementTypeAndShapeDataReference(value, &t.type, &dims, &t.rank));
      limit_rank(index, t.rank);
      std::copy_n(dims, t.rank, t.dims);
    } else {
      ort::TensorInfo* info = nullptr;
      check(api.GetTensorTypeAndShape(value, &info));
      const std::unique_ptr<ort::TensorInfo, decltype(api.ReleaseTensorTypeAndShapeInfo)> guard(
          info, api.ReleaseTensorTypeAndShapeInfo);
      check(api.GetTensorElementType(info, &t.type));
      check(api.GetDimensionsCount(info, &t.rank));
      limit_rank(index, t.rank);
      check(api.GetDimensions(info, t.dims, t.rank));
    }
    for (size_t i = 0; i < t.rank; ++i) t.size *= t.dims[i];
    void* data = nullptr;
    check(api.GetTensorMutableData(const_cast<ort::Value*>(value), &data));
    t.data = data;
    return t;
  }

  void limit_rank(size_t index, size_t rank) const {
    if (rank > kMaxRank) {
      fail(ErrorCode::kInvalidArgument, name_ + "input " + std::to_string(index) + " has more than 8 dimensions");
    }
  }

  // The memory of y_j', which may be that of y_j.
  void* output(ort::KernelContext* context, int32_t j, const Tensor& y) const {
    ort::Value* value = nullptr;
    check(api.KernelContext_GetOutput(context, size_t(j), y.dims, y.rank, &value));
    void* data = nullptr;
    check(api.GetTensorMutableData(value, &data));
    return data;
  }

  Status run_cpu(ort::KernelContext* context, const Problem& problem) {
    struct Pool {
      ort::KernelContext* context;
      ort::Status* status;
    } pool{context, nullptr};
    const Parallel parallel{
        [](void* opaque, size_t count, void (*body)(void*, size_t), void* body_context) {
          auto* pool = static_cast<Pool*>(opaque);
          if (pool->status) return;  // the first failure counts
          // as many batches as items (up to a limit): a thread takes the next one when it is free
          pool->status =
              api.KernelContext_ParallelFor(pool->context, body, count, std::min<size_t>(count, 64), body_context);
        },
        &pool, INT32_MAX};
    const Status status = cpu_run(*plan_, problem, &parallel);
    check(pool.status);
    return status;
  }

#if defined(SDCT_WITH_CUDA)
  Status run_cuda(ort::KernelContext* context, const Problem& problem) {
    const OnDevice on_device(device_, name_);
    void* stream = nullptr;
    check(api.KernelContext_GetGPUComputeStream(context, &stream));
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!device_plan_) {
        DevicePlan* made = nullptr;
        const Status status = cuda_prepare(*plan_, &made);
        if (status != Status::kOk) return status;
        device_plan_.reset(made);
      }
    }
    const size_t bytes = cuda_workspace_bytes(*device_plan_, problem.tokens);
    const std::unique_ptr<void, Scratch> workspace(bytes ? scratch(context, stream, bytes) : nullptr, Scratch{allocator_.get()});
    if (bytes && !workspace) return Status::kOutOfMemory;
    return cuda_run(*device_plan_, problem, workspace.get(), bytes, static_cast<CUstream_st*>(stream));
  }

  // Memory that the arena lends to this call's stream: given back while the kernel still runs, it goes to nobody but those who come
  // after the kernel on the same stream. What the allocator itself hands out belongs to no stream, and goes to any.
  // Without a stream, which 1.18 does not survive there, everything runs in the order of the default one.
  void* scratch(const ort::KernelContext* context, void* stream, size_t bytes) {
    // A full arena's exception leaves this function, which must not throw: the process would end. So a node whose need grows asks
    // first where it comes back as a status.
    if (bytes > most_scratch_) {
      void* trial = nullptr;
      check(api.AllocatorAlloc(allocator_.get(), bytes, &trial));
      check(api.AllocatorFree(allocator_.get(), trial));
      most_scratch_ = bytes;
    }
    void* memory = nullptr;
    check(stream ? api.KernelContext_GetScratchBuffer(context, memory_, bytes, &memory)
                 : api.AllocatorAlloc(allocator_.get(), bytes, &memory));
    return memory;
  }
  struct Scratch {
    ort::Allocator* allocator;
    void operator()(void* memory) const { static_cast<void>(api.AllocatorFree(allocator, memory)); }  // always null
  };
#else
  Status run_cuda(ort::KernelContext*, const Problem&) { return Status::kUnavailable; }
#endif

  struct Destroy {
    void operator()(Plan* plan) const { destroy_plan(plan); }
    void operator()(DevicePlan* plan) const { cuda_release(plan); }
  };

  std::string name_;
  bool cuda_;
  int64_t entries_ = 0;
  std::unique_ptr<Plan, Destroy> plan_;
  // with CUDA
  std::unique_ptr<ort::Allocator, void (*)(ort::Allocator*) noexcept> allocator_{nullptr, nullptr};  // of the session's device
  const ort::MemoryInfo* memory_ = nullptr;                                                          // what it hands out
  int device_ = 0;
  std::atomic<size_t> most_scratch_{0};  // that was ever got
  std::mutex mutex_;
  std::unique_ptr<DevicePlan, Destroy> device_plan_;
};

// y_j' has the shape and type of y_j.
ort::Status* infer_shapes(const ort::CustomOp*, ort::ShapeInferContext* context) noexcept {
  return guarded([&] {
    size_t inputs = 0;
    check(api.ShapeInferContext_GetInputCount(context, &inputs));
    for (size_t j = kFirstY; j < inputs; ++j) {
      ort::TensorInfo* info = nullptr;
      check(api.ShapeInferContext_GetInputTypeShape(context, j, &info));
      check(api.ShapeInferContext_SetOutputTypeShape(context, j - kFirstY, info));
    }
  });
}

template <bool kCuda>
ort::CustomOp describe() {
  ort::CustomOp op{};
  op.version = ort::kApi;
  op.GetName = [](const ort::CustomOp*) { return "SpectralDelta"; };
  op.GetExecutionProviderType = [](const ort::CustomOp*) -> const char* {
    return kCuda ? "CUDAExecutionProvider" : nullptr;
  };
  op.GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return kFirstY + 1; };
  op.GetInputType = [](const ort::CustomOp*, size_t i) {
    switch (i) {
      case kIds:
      case kIndices: return ElementType::kInt32;
      case kScales:
      case kValues: return ElementType::kFloat;
      default: return ElementType::kUndefined;  // one type for x and every y, checked in compute
    }
  };
  op.GetInputCharacteristic = [](const ort::CustomOp*, size_t i) {
    return i == kFirstY ? Characteristic::kVariadic : Characteristic::kRequired;
  };
  op.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return MemoryType::kDefault; };
  op.GetVariadicInputMinArity = [](const ort::CustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const ort::CustomOp*) { return 1; };
  op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const ort::CustomOp*, size_t) { return ElementType::kUndefined; };
  op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return Characteristic::kVariadic; };
  op.GetVariadicOutputMinArity = [](const ort::CustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 1; };
  op.CreateKernelV2 = [](const ort::CustomOp*, const ort::Table*, const ort::KernelInfo* info, void** kernel) {
    return guarded([&] { *kernel = new Kernel(info, kCuda); });
  };
  op.KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
    return guarded([&] { static_cast<Kernel*>(kernel)->compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.InferOutputShapeFn = infer_shapes;
  op.GetStartVersion = [](const ort::CustomOp*) { return 1; };
  op.GetEndVersion = [](const ort::CustomOp*) { return INT32_MAX; };
  // y_j' may take y_j's memory; pairs beyond a node's inputs are ignored
  op.GetMayInplace = [](int** inputs, int** outputs) -> size_t {
    *inputs = new (std::nothrow) int[kMaxProjections];
    *outputs = new (std::nothrow) int[kMaxProjections];
    if (!*inputs || !*outputs) {  // no memory: no pairs, and nothing for the runtime to release
      delete[] *inputs;
      delete[] *outputs;
      *inputs = *outputs = nullptr;
      return 0;
    }
    for (int j = 0; j < kMaxProjections; ++j) (*inputs)[j] = int(kFirstY) + j, (*outputs)[j] = j;
    return kMaxProjections;
  };
  op.ReleaseMayInplace = [](int* inputs, int* outputs) {
    delete[] inputs;
    delete[] outputs;
  };
  op.GetAliasMap = [](int**, int**) -> size_t { return 0; };
  op.ReleaseAliasMap = [](int*, int*) {};
  return op;
}

// Whether a runtime that calls itself `version`, such as "1.31.1", has version `api` of the interface. Asked for one it lacks, it
// would print an error.
bool at_least(const char* version, uint32_t wanted) {
  char* end = nullptr;
  const unsigned long major = std::strtoul(version, &end, 10);
  return major > 1 || (major == 1 && *end == '.' && std::strtoul(end + 1, nullptr, 10) >= wanted);
}

}  // namespace

extern "C" {

// What ONNX Runtime calls after loading the library (SessionOptions.register_custom_ops_library).
SDCT_EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  const ort::Table* table = base->GetApi(ort::kApi);
  if (!table) {
    const ort::Table* oldest = base->GetApi(1);
    if (!oldest) return nullptr;
    ort::load(oldest, 0, &api.CreateStatus);
    return api.CreateStatus(ErrorCode::kFail, "the sdct operator library needs ONNX Runtime 1.18 or newer");
  }
  return guarded([&] {
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    static const ort::Table* bound = nullptr;
    if (table != bound) {  // not again for every session: others may be running
      api = ort::bind(table, at_least(base->GetVersionString(), ort::kNewerApi) ? base->GetApi(ort::kNewerApi) : nullptr);
      bound = table;
    }
    // the runtime keeps pointers to these for as long as a session lives
    static const ort::CustomOp cpu = describe<false>();
    ort::CustomOpDomain* domain = nullptr;
    check(api.CreateCustomOpDomain("sdct", &domain));
    static auto* domains = new std::vector<std::unique_ptr<ort::CustomOpDomain, decltype(api.ReleaseCustomOpDomain)>>;
    domains->emplace_back(domain, api.ReleaseCustomOpDomain);
    check(api.CustomOpDomain_Add(domain, &cpu));
#if defined(SDCT_WITH_CUDA)
    static const ort::CustomOp cuda = describe<true>();
    check(api.CustomOpDomain_Add(domain, &cuda));
#endif
    check(api.AddCustomOpDomain(options, domain));
  });
}

// Version of the node contract this library implements.
SDCT_EXPORT int32_t sdct_version() { return kVersion; }

// Whether it has GPU kernels, for the CUDA provider.
SDCT_EXPORT int32_t sdct_cuda() {
#if defined(SDCT_WITH_CUDA)
  return 1;
#else
  return 0;
#endif
}

// Vector instructions it uses on this CPU: "avx512", "avx2" or "baseline".
SDCT_EXPORT const char* sdct_cpu_isa() { return cpu_isa(); }

}  // extern "C"
