// Drives the operator library's CUDA branch through ONNX Runtime's interface, with no ONNX Runtime: the host below is this program.
// Built where the library has GPU kernels; with SDCT_PTX they run on the CPU. Usage: onnxruntime_host_test LIBRARY
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../onnxruntime/abi.h"
#include "expected.h"

namespace sdct::ort {
struct Status {
  ErrorCode code;
  std::string message;
};
struct CustomOpDomain {
  std::vector<const CustomOp*> operators;
};
struct Value {
  ElementType type;
  std::vector<int64_t> dims;
  void* data;
};
struct TensorInfo {
  const Value* value;
};
struct MemoryInfo {
  std::string name;
};
struct KernelInfo {
  std::map<std::string, std::vector<int64_t>> attributes;
  size_t inputs, outputs;
};
struct KernelContext {
  std::vector<Value> inputs, outputs;  // an output's memory is there before
  void* stream;
};
}  // namespace sdct::ort

namespace {

using namespace sdct::ort;

int g_checks = 0, g_failures = 0;
#define CHECK(condition)                                                  \
  do {                                                                    \
    ++g_checks;                                                           \
    if (!(condition)) {                                                   \
      ++g_failures;                                                       \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition);         \
    }                                                                     \
  } while (false)

void require(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "onnxruntime_host_test: %s\n", cudaGetErrorString(error));
  std::exit(2);
}

// --- the host ------------------------------------------------------------------------------------------------------------------
void* g_table[kApiEntries];
CustomOpDomain g_domain;
int g_allocations = 0;  // of the provider's memory that are not given back
size_t g_allocated = 0;

Allocator g_allocator;

void* provider_alloc(Allocator*, size_t size) {
  void* memory = nullptr;
  require(cudaMalloc(&memory, size));
  ++g_allocations;
  g_allocated += size;
  return memory;
}
void provider_free(Allocator*, void* memory) {
  require(cudaFree(memory));
  --g_allocations;
}

template <class Function>
void offer(size_t place, Function* function) {
  std::memcpy(&g_table[place], &function, sizeof function);
}

// The places in the table, from abi.h.
enum Place : size_t {
#define PLACE(place, result, name, parameters) k##name = place,
  SDCT_ORT_ENTRIES(PLACE)
#undef PLACE
};

void make_table() {
  offer(kCreateStatus, +[](ErrorCode code, const char* message) { return new Status{code, message}; });
  offer(kCreateCustomOpDomain, +[](const char* name, CustomOpDomain** out) -> Status* {
    CHECK(std::string(name) == "sdct");
    *out = &g_domain;
    return nullptr;
  });
  offer(kCustomOpDomain_Add, +[](CustomOpDomain* domain, const CustomOp* op) -> Status* {
    domain->operators.push_back(op);
    return nullptr;
  });
  offer(kAddCustomOpDomain, +[](SessionOptions*, CustomOpDomain*) -> Status* { return nullptr; });
  offer(kReleaseCustomOpDomain, +[](CustomOpDomain*) {});
  offer(kGetTensorMutableData, +[](Value* value, void** data) -> Status* {
    *data = value->data;
    return nullptr;
  });
  offer(kGetTensorTypeAndShape, +[](const Value* value, TensorInfo** out) -> Status* {
    *out = new TensorInfo{value};
    return nullptr;
  });
  offer(kReleaseTensorTypeAndShapeInfo, +[](TensorInfo* info) { delete info; });
  offer(kGetTensorElementType, +[](const TensorInfo* info, ElementType* type) -> Status* {
    *type = info->value->type;
    return nullptr;
  });
  offer(kGetDimensionsCount, +[](const TensorInfo* info, size_t* rank) -> Status* {
    *rank = info->value->dims.size();
    return nullptr;
  });
  offer(kGetDimensions, +[](const TensorInfo* info, int64_t* dims, size_t rank) -> Status* {
    std::copy_n(info->value->dims.begin(), rank, dims);
    return nullptr;
  });
  offer(kCreateMemoryInfo, +[](const char* name, AllocatorType, int, MemoryType, MemoryInfo** out) -> Status* {
    *out = new MemoryInfo{name};
    return nullptr;
  });
  offer(kReleaseMemoryInfo, +[](MemoryInfo* info) { delete info; });
  offer(kKernelContext_GetAllocator, +[](const KernelContext*, const MemoryInfo* info, Allocator** out) -> Status* {
    CHECK(info->name == "Cuda");
    *out = &g_allocator;
    return nullptr;
  });
  offer(kReleaseAllocator, +[](Allocator*) {});
  offer(kKernelInfoGetAttribute_int64, +[](const KernelInfo* info, const char* name, int64_t* out) -> Status* {
    *out = info->attributes.at(name)[0];
    return nullptr;
  });
  offer(kKernelInfoGetAttributeArray_int64, +[](const KernelInfo* info, const char* name, int64_t* out, size_t* count) -> Status* {
    const std::vector<int64_t>& values = info->attributes.at(name);
    *count = values.size();
    if (out) std::copy(values.begin(), values.end(), out);
    return nullptr;
  });
  offer(kKernelInfo_GetInputCount, +[](const KernelInfo* info, size_t* count) -> Status* {
    *count = info->inputs;
    return nullptr;
  });
  offer(kKernelInfo_GetOutputCount, +[](const KernelInfo* info, size_t* count) -> Status* {
    *count = info->outputs;
    return nullptr;
  });
  offer(kKernelInfo_GetNodeName, +[](const KernelInfo*, char* name, size_t* length) -> Status* {
    *length = 5;
    if (name) std::memcpy(name, "attn", 5);
    return nullptr;
  });
  offer(kKernelContext_GetInput, +[](const KernelContext* context, size_t index, const Value** out) -> Status* {
    *out = &context->inputs.at(index);
    return nullptr;
  });
  offer(kKernelContext_GetOutput,
        +[](KernelContext* context, size_t index, const int64_t* dims, size_t rank, Value** out) -> Status* {
          CHECK(context->outputs.at(index).dims == std::vector<int64_t>(dims, dims + rank));
          *out = &context->outputs[index];
          return nullptr;
        });
  offer(kKernelContext_GetGPUComputeStream, +[](const KernelContext* context, void** stream) -> Status* {
    *stream = context->stream;
    return nullptr;
  });
  g_allocator.version = kApi;
  g_allocator.Alloc = provider_alloc;
  g_allocator.Free = provider_free;
}

template <class T>
void* on_device(const std::vector<T>& host, std::vector<void*>* owned) {
  void* memory = nullptr;
  require(cudaMalloc(&memory, host.size() * sizeof(T)));
  require(cudaMemcpy(memory, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  require(cudaDeviceSynchronize());  // the node runs on a stream that does not wait for it
  owned->push_back(memory);
  return memory;
}

// --- one node ------------------------------------------------------------------------------------------------------------------
// Against float64; `x_on_host`: the kernel must not read it, and that has to come back as a status.
void check_node(const CustomOp* op, const expected::Call& call, bool in_place, bool x_on_host, bool needs_workspace) {
  const size_t m = call.d_out.size();
  KernelInfo info{{{"d_in", {call.d_in}}, {"d_out", call.d_out}, {"capacity", call.capacity}}, 5 + m, m};
  void* kernel = nullptr;
  CHECK(op->CreateKernelV2(op, reinterpret_cast<const Table*>(g_table), &info, &kernel) == nullptr);
  std::vector<void*> owned;
  cudaStream_t stream = nullptr;
  require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  KernelContext context{{}, {}, stream};
  void* x = x_on_host ? const_cast<float*>(call.x.data()) : on_device(call.x, &owned);
  context.inputs = {{ElementType::kFloat, {1, call.tokens, call.d_in}, x},
                    {ElementType::kInt32, {1, 2}, on_device(call.ids, &owned)},
                    {ElementType::kFloat, {1, 2}, on_device(call.scales, &owned)},
                    {ElementType::kFloat, {3, call.entries()}, on_device(call.values, &owned)},
                    {ElementType::kInt32, {3, call.entries(), 2}, on_device(call.indices, &owned)}};
  for (size_t j = 0; j < m; ++j) {
    const Value y{ElementType::kFloat, {1, call.tokens, call.d_out[j]}, on_device(call.y[j], &owned)};
    context.inputs.push_back(y);
    context.outputs.push_back(y);
    if (!in_place) context.outputs[j].data = on_device(std::vector<float>(call.y[j].size()), &owned);
  }
  g_allocated = 0;
  const std::unique_ptr<Status> status(op->KernelComputeV2(kernel, &context));
  CHECK(g_allocations == 0 && (g_allocated > 0) == needs_workspace);
  if (x_on_host) {
    CHECK(status && status->code == ErrorCode::kEpFail && status->message.find("SpectralDelta node 'attn'") == 0);
  } else {
    CHECK(status == nullptr);
    if (status) std::printf("%s\n", status->message.c_str());
    require(cudaStreamSynchronize(stream));
    for (size_t j = 0; j < m; ++j) {
      std::vector<float> got(call.y[j].size());
      require(cudaMemcpy(got.data(), context.outputs[j].data, got.size() * sizeof(float), cudaMemcpyDeviceToHost));
      CHECK(call.error(j, got) < 1e-4);
    }
  }
  op->KernelDestroy(kernel);
  require(cudaStreamDestroy(stream));
  for (void* memory : owned) require(cudaFree(memory));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: onnxruntime_host_test LIBRARY\n");
    return 2;
  }
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  make_table();
  const ApiBase base{[](uint32_t version) noexcept -> const Table* {
                       return version <= kApi ? reinterpret_cast<const Table*>(g_table) : nullptr;
                     },
                     []() noexcept { return "1.18.0"; }};
  using Register = Status* (*)(SessionOptions*, const ApiBase*);
  const auto enter = reinterpret_cast<Register>(dlsym(library, "RegisterCustomOps"));
  CHECK(enter && enter(nullptr, &base) == nullptr && g_domain.operators.size() == 2);
  const CustomOp* cuda = nullptr;
  for (const CustomOp* op : g_domain.operators) {
    const char* provider = op->GetExecutionProviderType(op);
    if (provider && std::string(provider) == "CUDAExecutionProvider") cuda = op;
  }
  CHECK(cuda != nullptr);
  if (!cuda) return 1;
  check_node(cuda, expected::Call(64, {64, 32}, {7, 3}, 5), false, false, false);
  check_node(cuda, expected::Call(768, {768, 256}, {60, 20}, 3), true, false, false);
  check_node(cuda, expected::Call(65536, {48}, {10}, 2), false, false, true);  // in global memory
#if defined(SDCT_PTX)
  check_node(cuda, expected::Call(64, {64}, {7}, 2), false, true, false);  // a GPU would be lost to the process
#endif
  std::printf("ONNX Runtime host: %d checks, %d failed\n", g_checks, g_failures);
  return g_failures != 0;
}
