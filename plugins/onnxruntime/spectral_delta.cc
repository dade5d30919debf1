// ONNX Runtime operator library: domain "sdct", operator SpectralDelta, on the CPU and (where built with CUDA) the CUDA provider.
//
// The node is described in sdct/sdct.h and in sdct_export/contract.py. Inputs x, adapter_ids, adapter_scales, values, indices,
// y_1 ... y_m; outputs y_1' ... y_m'; attributes d_in, d_out, capacity. x and every y share one of float32, float16, bfloat16.
// This file validates, dispatches and reports errors; no exception leaves it.
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "sdct/sdct.h"

#if defined(_WIN32)
#define SDCT_EXPORT __declspec(dllexport)
#else
#define SDCT_EXPORT __attribute__((visibility("default")))
#endif

namespace {

using namespace sdct;

// The oldest ONNX Runtime whose interface this library needs: 1.18.
constexpr uint32_t kApi = 18;

enum Input : size_t { kX, kIds, kScales, kValues, kIndices, kFirstY };

const OrtApi* api = nullptr;

// Carries a status through C++ code; never leaves this file.
struct Failure {
  OrtStatus* status;
};

[[noreturn]] void fail(OrtErrorCode code, const std::string& message) {
  throw Failure{api->CreateStatus(code, message.c_str())};
}

void check(OrtStatus* status) {
  if (status) throw Failure{status};
}

// Runs f and turns whatever it throws into a status.
template <class F>
OrtStatus* guarded(F f) noexcept {
  try {
    f();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_RUNTIME_EXCEPTION, error.what());
  } catch (...) {
    return api->CreateStatus(ORT_RUNTIME_EXCEPTION, "SpectralDelta: unknown error");
  }
}

struct Tensor {
  const void* data = nullptr;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  size_t rank = 0;
  int64_t dims[8] = {};
  int64_t size = 1;

  std::string text() const {
    std::string s = "[";
    for (size_t i = 0; i < rank; ++i) s += (i ? ", " : "") + std::to_string(dims[i]);
    return s + "]";
  }
};

class Kernel {
 public:
  Kernel(const OrtKernelInfo* info, bool cuda) : cuda_(cuda) {
    size_t length = 0;
    check(api->KernelInfo_GetNodeName(info, nullptr, &length));
    name_.resize(length);
    check(api->KernelInfo_GetNodeName(info, name_.data(), &length));
    if (!name_.empty() && name_.back() == '\0') name_.pop_back();
    name_ = "SpectralDelta node '" + name_ + "': ";

    size_t inputs = 0, outputs = 0;
    check(api->KernelInfo_GetInputCount(info, &inputs));
    check(api->KernelInfo_GetOutputCount(info, &outputs));
    const std::vector<int64_t> d_out = ints(info, "d_out"), capacity = ints(info, "capacity");
    int64_t d_in = 0;
    check(api->KernelInfoGetAttribute_int64(info, "d_in", &d_in));
    const size_t m = d_out.size();
    if (m < 1 || m > size_t(kMaxProjections) || capacity.size() != m || inputs != kFirstY + m || outputs != m) {
      fail(ORT_INVALID_GRAPH, name_ + "d_out and capacity need one value for each y (1 to " +
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
      shape.d_out[j] = int32_t(d_out[j]);
      shape.capacity[j] = int32_t(capacity[j]);
      entries_ += capacity[j];
    }
    Plan* plan = nullptr;
    const Status status = good ? create_plan(shape, &plan) : Status::kBadShape;
    if (status != Status::kOk) fail(ORT_INVALID_GRAPH, name_ + status_text(status));
    plan_.reset(plan);
  }

  void compute(OrtKernelContext* context) {
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
        if (out != y.data) std::memcpy(out, y.data, size_t(y.size) * element_bytes(type_of(y.type)));
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
      fail(ORT_INVALID_ARGUMENT, name_ + "x " + x.text() + " has " + std::to_string(p.tokens) +
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
          fail(ORT_INVALID_ARGUMENT, name_ + "adapter_ids holds " + std::to_string(p.ids[i]) + "; the bank has slots 0 to " +
                                         std::to_string(p.slots - 1));
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
    if (status == Status::kCuda) fail(ORT_EP_FAIL, name_ + status_text(status) + ": " + cuda_error());
    if (status != Status::kOk) fail(ORT_FAIL, name_ + status_text(status));
  }

 private:
  std::vector<int64_t> ints(const OrtKernelInfo* info, const char* attribute) const {
    size_t count = 0;
    check(api->KernelInfoGetAttributeArray_int64(info, attribute, nullptr, &count));
    std::vector<int64_t> out(count);
    check(api->KernelInfoGetAttributeArray_int64(info, attribute, out.data(), &count));
    return out;
  }

  [[noreturn]] void refuse(const std::string& what, const Tensor& got, const std::string& expected) const {
    fail(ORT_INVALID_ARGUMENT, name_ + what + " has shape " + got.text() + ", expected " + expected);
  }

  DataType type_of(ONNXTensorElementDataType type) const {
    switch (type) {
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return DataType::kFloat32;
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return DataType::kFloat16;
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return DataType::kBFloat16;
      default: fail(ORT_INVALID_ARGUMENT, name_ + "x must be float32, float16 or bfloat16");
    }
  }

  Tensor input(const OrtKernelContext* context, size_t index) const {
    const OrtValue* value = nullptr;
    check(api->KernelContext_GetInput(context, index, &value));
    Tensor t;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api->GetTensorTypeAndShape(value, &info));
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(api->ReleaseTensorTypeAndShapeInfo)> guard(
        info, api->ReleaseTensorTypeAndShapeInfo);
    check(api->GetTensorElementType(info, &t.type));
    check(api->GetDimensionsCount(info, &t.rank));
    if (t.rank > 8) fail(ORT_INVALID_ARGUMENT, name_ + "input " + std::to_string(index) + " has more than 8 dimensions");
    check(api->GetDimensions(info, t.dims, t.rank));
    for (size_t i = 0; i < t.rank; ++i) t.size *= t.dims[i];
    void* data = nullptr;
    check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    t.data = data;
    return t;
  }

  // The memory of y_j', which may be that of y_j.
  void* output(OrtKernelContext* context, int32_t j, const Tensor& y) const {
    OrtValue* value = nullptr;
    check(api->KernelContext_GetOutput(context, size_t(j), y.dims, y.rank, &value));
    void* data = nullptr;
    check(api->GetTensorMutableData(value, &data));
    return data;
  }

  Status run_cpu(OrtKernelContext* context, const Problem& problem) {
    struct Pool {
      OrtKernelContext* context;
      OrtStatus* status;
    } pool{context, nullptr};
    const Parallel parallel{
        [](void* opaque, size_t count, void (*body)(void*, size_t), void* body_context) {
          auto* pool = static_cast<Pool*>(opaque);
          // as many batches as items (up to a limit): a thread takes the next one when it is free
          pool->status =
              api->KernelContext_ParallelFor(pool->context, body, count, std::min<size_t>(count, 64), body_context);
        },
        &pool, INT32_MAX};
    const Status status = cpu_run(*plan_, problem, &parallel);
    check(pool.status);
    return status;
  }

  Status run_cuda(OrtKernelContext* context, const Problem& problem) {
    void* stream = nullptr;
    check(api->KernelContext_GetGPUComputeStream(context, &stream));
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
    if (bytes == 0) return cuda_run(*device_plan_, problem, nullptr, 0, static_cast<CUstream_st*>(stream));

    OrtMemoryInfo* place = nullptr;
    check(api->CreateMemoryInfo("Cuda", OrtDeviceAllocator, 0, OrtMemTypeDefault, &place));
    const std::unique_ptr<OrtMemoryInfo, decltype(api->ReleaseMemoryInfo)> guard(place, api->ReleaseMemoryInfo);
    OrtAllocator* allocator = nullptr;
    check(api->KernelContext_GetAllocator(context, place, &allocator));
    const std::unique_ptr<OrtAllocator, decltype(api->ReleaseAllocator)> owner(allocator, api->ReleaseAllocator);
    // the provider's arena hands memory out again in stream order, so that it may go back while the kernel still runs
    void* workspace = allocator->Alloc(allocator, bytes);
    if (!workspace) return Status::kOutOfMemory;
    const Status status = cuda_run(*device_plan_, problem, workspace, bytes, static_cast<CUstream_st*>(stream));
    allocator->Free(allocator, workspace);
    return status;
  }

  struct Destroy {
    void operator()(Plan* plan) const { destroy_plan(plan); }
    void operator()(DevicePlan* plan) const { cuda_release(plan); }
  };

  std::string name_;
  bool cuda_;
  int64_t entries_ = 0;
  std::unique_ptr<Plan, Destroy> plan_;
  std::mutex mutex_;
  std::unique_ptr<DevicePlan, Destroy> device_plan_;
};

// y_j' has the shape and type of y_j.
OrtStatus* infer_shapes(const OrtCustomOp*, OrtShapeInferContext* context) noexcept {
  return guarded([&] {
    size_t inputs = 0;
    check(api->ShapeInferContext_GetInputCount(context, &inputs));
    for (size_t j = kFirstY; j < inputs; ++j) {
      OrtTensorTypeAndShapeInfo* info = nullptr;
      check(api->ShapeInferContext_GetInputTypeShape(context, j, &info));
      check(api->ShapeInferContext_SetOutputTypeShape(context, j - kFirstY, info));
    }
  });
}

template <bool kCuda>
OrtCustomOp describe() {
  OrtCustomOp op{};
  op.version = kApi;
  op.GetName = [](const OrtCustomOp*) { return "SpectralDelta"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* {
    return kCuda ? "CUDAExecutionProvider" : nullptr;
  };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return kFirstY + 1; };
  op.GetInputType = [](const OrtCustomOp*, size_t i) {
    switch (i) {
      case kIds:
      case kIndices: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
      case kScales:
      case kValues: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
      default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;  // one type for x and every y, checked in compute
    }
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) {
    return i == kFirstY ? INPUT_OUTPUT_VARIADIC : INPUT_OUTPUT_REQUIRED;
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_VARIADIC; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
    return guarded([&] { *kernel = new Kernel(info, kCuda); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return guarded([&] { static_cast<Kernel*>(kernel)->compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.InferOutputShapeFn = infer_shapes;
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
  // y_j' may take y_j's memory; pairs beyond a node's inputs are ignored
  op.GetMayInplace = [](int** inputs, int** outputs) -> size_t {
    *inputs = new (std::nothrow) int[kMaxProjections];
    *outputs = new (std::nothrow) int[kMaxProjections];
    if (!*inputs || !*outputs) return 0;
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

}  // namespace

extern "C" {

// What ONNX Runtime calls after loading the library (SessionOptions.register_custom_ops_library).
SDCT_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* found = base->GetApi(kApi);
  if (!found) {
    const OrtApi* oldest = base->GetApi(1);
    return oldest ? oldest->CreateStatus(ORT_FAIL, "the sdct operator library needs ONNX Runtime 1.18 or newer") : nullptr;
  }
  api = found;
  return guarded([&] {
    // the runtime keeps pointers to these for as long as a session lives
    static const OrtCustomOp cpu = describe<false>();
    OrtCustomOpDomain* domain = nullptr;
    check(api->CreateCustomOpDomain("sdct", &domain));
    static std::mutex mutex;
    static auto* domains = new std::vector<std::unique_ptr<OrtCustomOpDomain, decltype(api->ReleaseCustomOpDomain)>>;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      domains->emplace_back(domain, api->ReleaseCustomOpDomain);
    }
    check(api->CustomOpDomain_Add(domain, &cpu));
#if defined(SDCT_WITH_CUDA)
    static const OrtCustomOp cuda = describe<true>();
    check(api->CustomOpDomain_Add(domain, &cuda));
#endif
    check(api->AddCustomOpDomain(options, domain));
  });
}

// Version of the node contract this library implements.
SDCT_EXPORT int32_t sdct_version() { return kVersion; }

}  // extern "C"
