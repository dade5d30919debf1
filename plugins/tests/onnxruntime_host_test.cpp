// Drives the operator library's CUDA branch through ONNX Runtime's interface, with no ONNX Runtime: the host below is this program.
// Built where the library has GPU kernels; with SDCT_PTX they run on the CPU. Usage: onnxruntime_host_test LIBRARY
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
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
  int device;
};
struct Allocator {};
struct KernelInfo {
  std::map<std::string, std::vector<int64_t>> attributes;
  size_t inputs, outputs;
  int device;  // of the session
};
struct KernelContext {
  std::vector<Value> inputs, outputs;  // an output's memory is there before
  void* stream;
  int device;
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

// The provider's memory of one device. As in ONNX Runtime, a piece that was got for a stream goes to that stream alone until the run
// ends, and one that was got for none goes to any stream as soon as it is free.
struct Arena : Allocator {
  struct Piece {
    void* memory;
    size_t size;
    void* stream;
    bool used;
  };
  explicit Arena(int device) : info{device} {}
  void* get(size_t size, void* stream) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (size > most) throw std::runtime_error("the arena is full");
    for (Piece& piece : pieces) {
      if (piece.used || piece.size < size || (piece.stream && piece.stream != stream)) continue;
      piece.used = true;
      piece.stream = stream;
      return piece.memory;
    }
    int before = 0;
    require(cudaGetDevice(&before));
    require(cudaSetDevice(info.device));
    void* memory = nullptr;
    require(cudaMalloc(&memory, size));
    require(cudaSetDevice(before));
    pieces.push_back({memory, size, stream, true});
    return memory;
  }
  void give_back(void* memory) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = std::find_if(pieces.begin(), pieces.end(), [&](const Piece& piece) { return piece.memory == memory; });
    CHECK(found != pieces.end() && found->used);
    if (found != pieces.end()) found->used = false;
  }
  bool idle() const {
    return std::none_of(pieces.begin(), pieces.end(), [](const Piece& piece) { return piece.used; });
  }
  void end_run() {
    for (Piece& piece : pieces) piece.stream = nullptr;
  }
  MemoryInfo info;
  std::mutex mutex;
  std::vector<Piece> pieces;
  size_t most = SIZE_MAX;
  int holders = 0;  // of references to it
};
std::vector<std::unique_ptr<Arena>> g_arenas;

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
  offer(kKernelInfoGetAllocator, +[](const KernelInfo* info, MemoryType type, Allocator** out) -> Status* {
    CHECK(type == MemoryType::kDefault);
    ++g_arenas.at(size_t(info->device))->holders;
    *out = g_arenas[size_t(info->device)].get();
    return nullptr;
  });
  offer(kReleaseAllocator, +[](Allocator* allocator) { --static_cast<Arena*>(allocator)->holders; });
  offer(kAllocatorAlloc, +[](Allocator* allocator, size_t size, void** memory) noexcept -> Status* {
    try {
      *memory = static_cast<Arena*>(allocator)->get(size, nullptr);
      return nullptr;
    } catch (const std::exception& error) {
      return new Status{ErrorCode::kRuntimeException, error.what()};
    }
  });
  offer(kAllocatorFree, +[](Allocator* allocator, void* memory) -> Status* {
    static_cast<Arena*>(allocator)->give_back(memory);
    return nullptr;
  });
  offer(kAllocatorGetInfo, +[](const Allocator* allocator, const MemoryInfo** out) -> Status* {
    *out = &static_cast<const Arena*>(allocator)->info;
    return nullptr;
  });
  offer(kMemoryInfoGetId, +[](const MemoryInfo* info, int* id) -> Status* {
    *id = info->device;
    return nullptr;
  });
  // like ONNX Runtime's it ends the process where the arena is full (1.23 and 1.32) or there is no stream (1.18)
  offer(kKernelContext_GetScratchBuffer,
        +[](const KernelContext* context, const MemoryInfo* info, size_t bytes, void** memory) noexcept -> Status* {
          if (!context->stream) std::terminate();
          if (info->device != context->device) return new Status{ErrorCode::kInvalidArgument, "No requested allocator available"};
          *memory = g_arenas.at(size_t(info->device))->get(bytes, context->stream);
          return nullptr;
        });
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
}

// --- one node ------------------------------------------------------------------------------------------------------------------
class Node {
 public:
  Node(const CustomOp* op, const expected::Call& call, int device) : op_(op), call_(call), device_(device) {
    const size_t m = call.d_out.size();
    const KernelInfo info{{{"d_in", {call.d_in}}, {"d_out", call.d_out}, {"capacity", call.capacity}}, 5 + m, m, device};
    CHECK(op->CreateKernelV2(op, reinterpret_cast<const Table*>(g_table), &info, &kernel_) == nullptr);
  }
  ~Node() { op_->KernelDestroy(kernel_); }
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;

  std::unique_ptr<Status> compute(KernelContext* context) {
    return std::unique_ptr<Status>(op_->KernelComputeV2(kernel_, context));
  }

  // What it says on a stream of its device, null where all is well; the results are those of float64.
  // `x_on_host`: the kernel must not read x. `streamless`: the runtime names no stream.
  std::unique_ptr<Status> run(bool in_place = false, bool x_on_host = false, bool streamless = false) {
    int before = 0, after = 0;
    require(cudaGetDevice(&before));
    require(cudaSetDevice(device_));
    std::vector<void*> owned;
    cudaStream_t stream = nullptr;
    require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    KernelContext context{{}, {}, streamless ? nullptr : stream, device_};
    void* x = x_on_host ? const_cast<float*>(call_.x.data()) : on_device(call_.x, &owned);
    context.inputs = {{ElementType::kFloat, {1, call_.tokens, call_.d_in}, x},
                      {ElementType::kInt32, {1, 2}, on_device(call_.ids, &owned)},
                      {ElementType::kFloat, {1, 2}, on_device(call_.scales, &owned)},
                      {ElementType::kFloat, {3, call_.entries()}, on_device(call_.values, &owned)},
                      {ElementType::kInt32, {3, call_.entries(), 2}, on_device(call_.indices, &owned)}};
    for (size_t j = 0; j < call_.d_out.size(); ++j) {
      const Value y{ElementType::kFloat, {1, call_.tokens, call_.d_out[j]}, on_device(call_.y[j], &owned)};
      context.inputs.push_back(y);
      context.outputs.push_back(y);
      if (!in_place) context.outputs[j].data = on_device(std::vector<float>(call_.y[j].size()), &owned);
    }
    require(cudaSetDevice(before));
    std::unique_ptr<Status> status = compute(&context);
    CHECK(cudaGetDevice(&after) == cudaSuccess && after == before);
    CHECK(cudaGetLastError() == cudaSuccess);
    CHECK(g_arenas[size_t(device_)]->idle());
    if (!status) {
      require(streamless ? cudaDeviceSynchronize() : cudaStreamSynchronize(stream));
      for (size_t j = 0; j < call_.d_out.size(); ++j) {
        std::vector<float> got(call_.y[j].size());
        require(cudaMemcpy(got.data(), context.outputs[j].data, got.size() * sizeof(float), cudaMemcpyDeviceToHost));
        CHECK(call_.error(j, got) < 1e-4);
      }
    }
    streams_.push_back(stream);
    for (void* memory : owned) require(cudaFree(memory));
    return status;
  }
  void end_run() {
    for (cudaStream_t stream : streams_) require(cudaStreamDestroy(stream));
    streams_.clear();
    g_arenas[size_t(device_)]->end_run();
  }

 private:
  template <class T>
  static void* on_device(const std::vector<T>& host, std::vector<void*>* owned) {
    void* memory = nullptr;
    require(cudaMalloc(&memory, host.size() * sizeof(T)));
    require(cudaMemcpy(memory, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    require(cudaDeviceSynchronize());  // the node runs on a stream that does not wait for it
    owned->push_back(memory);
    return memory;
  }
  const CustomOp* op_;
  expected::Call call_;
  int device_;
  void* kernel_ = nullptr;
  std::vector<cudaStream_t> streams_;
};

void well(const std::unique_ptr<Status>& status) {
  CHECK(status == nullptr);
  if (status) std::printf("%s\n", status->message.c_str());
}

bool says(const std::unique_ptr<Status>& status, ErrorCode code, const char* text) {
  if (!status) return false;
  const bool good = status->code == code && status->message.find("SpectralDelta node 'attn': ") == 0 &&
                    status->message.find(text) != std::string::npos;
  if (!good) std::printf("code %d: %s\n", int(status->code), status->message.c_str());
  return good;
}

void check_node(const CustomOp* op, const expected::Call& call, bool in_place, bool needs_workspace, int device = 0) {
  Node node(op, call, device);
  well(node.run(in_place));
  node.end_run();
  CHECK(g_arenas[size_t(device)]->pieces.empty() == !needs_workspace);
}

// Working memory in global memory, on several streams at once.
void check_workspace(const CustomOp* op, int device) {
  const expected::Call call(65536, {48}, {10}, 2);
  Arena& arena = *g_arenas[size_t(device)];
  check_node(op, call, false, true, device);
  Node node(op, call, device);
  well(node.run());
  well(node.run());  // on another stream, while the first may still be at work
  CHECK(arena.pieces.size() == 2 && arena.pieces[0].stream && arena.pieces[1].stream &&
        arena.pieces[0].stream != arena.pieces[1].stream);
  well(node.run(false, false, true));
  node.end_run();
  arena.most = 1000;
  Node poor(op, call, device);
  const std::unique_ptr<Status> status = poor.run();
  CHECK(status && status->message.find("the arena is full") != std::string::npos);
  arena.most = SIZE_MAX;
  well(poor.run());
  poor.end_run();
}

#if defined(SDCT_PTX)
extern "C" void sdct_ptx_refuse_allocation(int error, int granted);

// Tables that cannot go up. The lengths are no other node's, whose tables would serve.
void check_refused_tables(const CustomOp* op) {
  for (int granted : {0, 1}) {  // those of x, those of y
    Node node(op, expected::Call(120, {56}, {7}, 2), 0);
    sdct_ptx_refuse_allocation(cudaErrorMemoryAllocation, granted + 7);  // after the tensors
    CHECK(says(node.run(), ErrorCode::kFail, "out of memory"));
    sdct_ptx_refuse_allocation(cudaErrorDevicesUnavailable, granted + 7);
    CHECK(says(node.run(), ErrorCode::kEpFail, "a CUDA call failed: CUDA-capable device(s) is/are busy or unavailable"));
    well(node.run());  // it has forgotten all that
    node.end_run();
  }
}

// A session on a device that is not the current one, beside a session on another device.
void check_devices(const CustomOp* op) {
  const expected::Call small(64, {64, 32}, {7, 3}, 5), large(8192, {4096}, {30}, 2);  // the second asks for much shared memory
  for (const expected::Call* call : {&small, &large}) {
    Node first(op, *call, 0), second(op, *call, 1);
    well(second.run());
    well(first.run());
    well(second.run(true));
    require(cudaSetDevice(1));
    well(first.run());
    well(second.run());
    require(cudaSetDevice(0));
    std::thread([&] { well(second.run()); }).join();  // a thread whose current device nobody has chosen
    first.end_run();
    second.end_run();
  }
  check_workspace(op, 1);
  Node lost(op, small, 2);
  setenv("SDCT_PTX_DEVICES", "3", 1);
  well(lost.run());
  const auto gone = [&](const char* devices, const char* text) {
    KernelContext context{{}, {}, nullptr, 2};
    std::vector<std::vector<int64_t>> dims{{1, 5, 64}, {1, 2}, {1, 2}, {3, 10}, {3, 10, 2}, {1, 5, 64}, {1, 5, 32}};
    int place = 1;  // never looked at
    for (size_t k = 0; k < dims.size(); ++k) {
      const bool integers = k == 1 || k == 4;
      context.inputs.push_back({integers ? ElementType::kInt32 : ElementType::kFloat, dims[k], &place});
      if (k >= 5) context.outputs.push_back(context.inputs.back());
    }
    setenv("SDCT_PTX_DEVICES", devices, 1);
    CHECK(says(lost.compute(&context), ErrorCode::kEpFail, text));
    CHECK(cudaGetLastError() == cudaSuccess);
  };
  gone("2", "CUDA device 2 cannot be used: invalid device ordinal");
  gone("0", "CUDA device 2 cannot be used: no CUDA-capable device is detected");
  setenv("SDCT_PTX_DEVICES", "3", 1);
  lost.end_run();
}
#endif

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
  for (int device = 0; device < 3; ++device) g_arenas.push_back(std::make_unique<Arena>(device));
  check_node(cuda, expected::Call(64, {64, 32}, {7, 3}, 5), false, false);
  check_node(cuda, expected::Call(768, {768, 256}, {60, 20}, 3), true, false);
  check_workspace(cuda, 0);
#if defined(SDCT_PTX)
  {
    Node node(cuda, expected::Call(64, {64}, {7}, 2), 0);  // a GPU would be lost to the process
    CHECK(says(node.run(false, true), ErrorCode::kEpFail, "outside of device memory"));
    node.end_run();
  }
  check_refused_tables(cuda);
  setenv("SDCT_PTX_DEVICES", "2", 1);
  check_devices(cuda);
#endif
  for (const auto& arena : g_arenas) CHECK(arena->holders == 0 && arena->idle());
  std::printf("ONNX Runtime host: %d checks, %d failed\n", g_checks, g_failures);
  return g_failures != 0;
}
