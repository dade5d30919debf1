// The kernel core on a GPU behind a C interface, with device memory and timers: for tests and benchmarks (tests/gpu/native_gpu.py).
//
// Every function returns 0, or something else with the reason in sdct_gpu_error(). Timers flush the L2 cache before each run, so
// that nothing is served from it, and give the milliseconds of every single run.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <vector>

#include "sdct/sdct.h"

#define SDCT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace sdct;

thread_local char error_text[256] = "";

int fail(const char* what, const char* why) {
  std::snprintf(error_text, sizeof error_text, "%s: %s", what, why);
  return 1;
}

int check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return 0;
  static_cast<void>(cudaGetLastError());
  return fail(what, cudaGetErrorString(error));
}

int check(Status status, const char* what) {
  if (status == Status::kOk) return 0;
  return fail(what, status == Status::kCuda ? cuda_error() : status_text(status));
}

#define TRY(call) \
  if (const int bad = check(call, #call)) return bad

struct Node {
  Plan* plan = nullptr;
  DevicePlan* device_plan = nullptr;
  ~Node() {
    cuda_release(device_plan);
    destroy_plan(plan);
  }
};

struct Memory {
  void* data = nullptr;
  ~Memory() { cudaFree(data); }
};

struct Stream {
  cudaStream_t stream = nullptr;
  ~Stream() {
    if (stream) cudaStreamDestroy(stream);
  }
};

struct Graph {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  ~Graph() {
    if (exec) cudaGraphExecDestroy(exec);
    if (graph) cudaGraphDestroy(graph);
  }
};

struct Events {
  cudaEvent_t begin = nullptr, end = nullptr;
  ~Events() {
    if (begin) cudaEventDestroy(begin);
    if (end) cudaEventDestroy(end);
  }
};

__global__ void empty() {}

int launch(const Node* node, const Problem& problem, void* workspace, size_t bytes, cudaStream_t stream) {
  if (!node) {
    empty<<<1, 32, 0, stream>>>();
    TRY(cudaGetLastError());
    return 0;
  }
  TRY(cuda_run(*node->device_plan, problem, workspace, bytes, stream));
  return 0;
}

// Captures `launches` launches that take turns over `problems`.
int capture(const Node* node, const Problem* problems, int32_t count, int32_t launches, void* workspace, size_t bytes,
            cudaStream_t stream, Graph* graph) {
  TRY(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  int bad = 0;
  for (int32_t i = 0; i < launches && !bad; ++i) bad = launch(node, node ? problems[i % count] : Problem{}, workspace, bytes, stream);
  const cudaError_t ended = cudaStreamEndCapture(stream, &graph->graph);
  if (bad) return bad;
  TRY(ended);
  TRY(cudaGraphInstantiate(&graph->exec, graph->graph, 0));
  return 0;
}

size_t workspace_bytes(const Node* node, const Problem* problems, int32_t count) {
  size_t most = 0;
  for (int32_t i = 0; node && i < count; ++i) {
    const size_t bytes = cuda_workspace_bytes(*node->device_plan, problems[i].tokens);
    most = bytes > most ? bytes : most;
  }
  return most;
}

// Milliseconds of each of `repeats` calls of `body(stream, i)`, three more before them.
template <class Body>
int time_each(int32_t repeats, float* milliseconds, cudaStream_t stream, Body body) {
  int device = 0, l2 = 0;
  TRY(cudaGetDevice(&device));
  TRY(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device));
  const size_t flush_bytes = 4 * size_t(l2) + (size_t(64) << 20);
  Memory flush;
  Events events;
  TRY(cudaMalloc(&flush.data, flush_bytes));
  TRY(cudaEventCreate(&events.begin));
  TRY(cudaEventCreate(&events.end));
  for (int32_t i = -3; i < repeats; ++i) {
    TRY(cudaMemsetAsync(flush.data, i & 255, flush_bytes, stream));  // also keeps the GPU busy until the launch has arrived
    TRY(cudaEventRecord(events.begin, stream));
    if (const int bad = body(i + 3)) return bad;
    TRY(cudaEventRecord(events.end, stream));
    TRY(cudaEventSynchronize(events.end));
    float took = 0.0f;
    TRY(cudaEventElapsedTime(&took, events.begin, events.end));
    if (i >= 0) milliseconds[i] = took;
  }
  return 0;
}

}  // namespace

SDCT_EXPORT const char* sdct_gpu_error() { return error_text; }

// Sizes of the structures, for a check of their copies in Python.
SDCT_EXPORT void sdct_gpu_sizes(size_t* shape, size_t* problem) {
  *shape = sizeof(Shape);
  *problem = sizeof(Problem);
}

// numbers: driver's CUDA version, runtime's CUDA version, major, minor, multiprocessors, bytes of L2, bytes of memory.
SDCT_EXPORT int sdct_gpu_info(char* name, size_t size, int64_t* numbers) {
  cudaDeviceProp properties;
  int device = 0, driver = 0, runtime = 0;
  TRY(cudaGetDevice(&device));
  TRY(cudaGetDeviceProperties(&properties, device));
  TRY(cudaDriverGetVersion(&driver));
  TRY(cudaRuntimeGetVersion(&runtime));
  std::snprintf(name, size, "%s", properties.name);
  const int64_t found[] = {driver, runtime, properties.major, properties.minor, properties.multiProcessorCount,
                           properties.l2CacheSize, int64_t(properties.totalGlobalMem)};
  for (size_t i = 0; i < sizeof found / sizeof *found; ++i) numbers[i] = found[i];
  return 0;
}

SDCT_EXPORT int sdct_gpu_alloc(size_t bytes, void** memory) {
  TRY(cudaMalloc(memory, bytes ? bytes : 1));
  return 0;
}

SDCT_EXPORT void sdct_gpu_free(void* memory) { cudaFree(memory); }

SDCT_EXPORT int sdct_gpu_copy(void* target, const void* source, size_t bytes) {
  TRY(cudaMemcpy(target, source, bytes, cudaMemcpyDefault));
  TRY(cudaDeviceSynchronize());  // it may be under way, and launches go to streams that do not wait for it
  return 0;
}

SDCT_EXPORT int sdct_gpu_create(const Shape* shape, Node** node) {
  auto* made = new Node;
  int bad = check(create_plan(*shape, &made->plan), "create_plan");
  if (!bad) bad = check(cuda_prepare(*made->plan, &made->device_plan), "cuda_prepare");
  if (bad) {
    delete made;
    return bad;
  }
  *node = made;
  return 0;
}

SDCT_EXPORT void sdct_gpu_destroy(Node* node) { delete node; }

// Launches on the caller's stream and returns; sizes that need no workspace only.
SDCT_EXPORT int sdct_gpu_launch(const Node* node, const Problem* problem, void* stream) {
  return launch(node, *problem, nullptr, 0, static_cast<cudaStream_t>(stream));
}

// Runs on a stream of its own and waits; `captured`: through a CUDA graph.
SDCT_EXPORT int sdct_gpu_run(const Node* node, const Problem* problem, int32_t captured) {
  const size_t bytes = workspace_bytes(node, problem, 1);
  Memory workspace;
  Stream own;
  Graph graph;
  if (bytes) TRY(cudaMalloc(&workspace.data, bytes));
  TRY(cudaStreamCreateWithFlags(&own.stream, cudaStreamNonBlocking));
  int bad = captured ? capture(node, problem, 1, 1, workspace.data, bytes, own.stream, &graph)
                     : launch(node, *problem, workspace.data, bytes, own.stream);
  if (bad) return bad;
  if (captured) TRY(cudaGraphLaunch(graph.exec, own.stream));
  TRY(cudaStreamSynchronize(own.stream));
  return 0;
}

// Times a graph of `launches` launches over `problems`; a null node stands for an empty kernel.
SDCT_EXPORT int sdct_gpu_time_run(const Node* node, const Problem* problems, int32_t count, int32_t launches, int32_t repeats,
                                  float* milliseconds) {
  const size_t bytes = workspace_bytes(node, problems, count);
  Memory workspace;
  Stream own;
  Graph graph;
  if (bytes) TRY(cudaMalloc(&workspace.data, bytes));
  TRY(cudaStreamCreateWithFlags(&own.stream, cudaStreamNonBlocking));
  // once outside of a graph: what CUDA loads late is loaded now
  if (const int bad = launch(node, node ? problems[0] : Problem{}, workspace.data, bytes, own.stream)) return bad;
  TRY(cudaStreamSynchronize(own.stream));
  if (const int bad = capture(node, problems, count, launches, workspace.data, bytes, own.stream, &graph)) return bad;
  return time_each(repeats, milliseconds, own.stream, [&](int32_t) {
    TRY(cudaGraphLaunch(graph.exec, own.stream));
    return 0;
  });
}

// Times copies of `bytes` within the device's memory; each reads and writes so many.
SDCT_EXPORT int sdct_gpu_time_copy(size_t bytes, int32_t repeats, float* milliseconds) {
  Memory source, target;
  Stream own;
  TRY(cudaMalloc(&source.data, bytes));
  TRY(cudaMalloc(&target.data, bytes));
  TRY(cudaMemset(source.data, 0x5a, bytes));
  TRY(cudaStreamCreateWithFlags(&own.stream, cudaStreamNonBlocking));
  return time_each(repeats, milliseconds, own.stream, [&](int32_t) {
    TRY(cudaMemcpyAsync(target.data, source.data, bytes, cudaMemcpyDeviceToDevice, own.stream));
    return 0;
  });
}
