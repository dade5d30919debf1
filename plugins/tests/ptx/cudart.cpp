// A stand-in for the CUDA runtime library: what nvcc compiled for a GPU and links against this runs on the CPU.
//
// It takes the PTX that nvcc left in the program (`-gencode arch=compute_90,code=compute_90 --no-compress`). Device memory is memory
// that the kernels may touch and no other. Every call is finished when it returns, but for copies to the device, which are under way
// until something waits for them. A kernel that does something it must not fails its launch with cudaErrorLaunchFailure; the text
// says what and where. Calls that a program does not need are not here: it does not link.
//
//     SDCT_PTX_CAPABILITY     of the device (90): the newest PTX up to it runs
//     SDCT_PTX_RACES=0        leave out the check for races
//     SDCT_PTX_SMS            multiprocessors that a device claims (132)
//     SDCT_PTX_SHARED         bytes of shared memory that a block may ask for (232448)
//     SDCT_PTX_DEVICES        how many devices there are (1); 0: none
//
// Memory and streams belong to the device that was current: another one's kernels fault on the memory and do not run on the stream.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "instructions.h"
#include "machine.h"

#define PTX_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace ptx;

int setting(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::atoi(text) : otherwise;
}

// The number in ".target sm_90".
int capability_of(const std::string& ptx) {
  const size_t at = ptx.find(".target sm_");
  return at == std::string::npos ? 0 : std::atoi(ptx.c_str() + at + 11);
}

// The newest PTX that the device runs, out of the container that nvcc makes: a header, then entries with headers of their own,
// where kind 1 is PTX.
std::string ptx_of(const void* container) {
  const auto* bytes = static_cast<const char*>(container);
  const auto read = [&](auto* value, size_t at) { std::memcpy(value, bytes + at, sizeof *value); };
  const int capability = setting("SDCT_PTX_CAPABILITY", 90);
  std::string best;
  uint32_t magic = 0;
  uint16_t header = 0;
  uint64_t size = 0;
  read(&magic, 0), read(&header, 6), read(&size, 8);
  if (magic != 0xba55ed50u) throw Fault("this is no program of nvcc");
  for (size_t at = header; at < header + size;) {
    uint16_t kind = 0;
    uint32_t entry_header = 0, compressed = 0;
    uint64_t entry = 0;
    read(&kind, at), read(&entry_header, at + 4), read(&entry, at + 8), read(&compressed, at + 16);
    if (kind == 1) {
      if (compressed) throw Fault("the PTX is compressed: compile with --no-compress");
      std::string text(bytes + at + entry_header, size_t(entry));
      text.resize(std::strlen(text.c_str()));
      const int made_for = capability_of(text);
      if (made_for <= capability && (best.empty() || made_for > capability_of(best))) best = text;
    }
    at += entry_header + size_t(entry);
  }
  if (best.empty()) throw Fault("the program holds no PTX for sm_" + std::to_string(capability));
  return best;
}

struct Module {
  std::unique_ptr<Program> program;
  std::string failure;  // why there is none
};

struct Function {
  Module* module = nullptr;
  const Kernel* kernel = nullptr;
  std::map<int, size_t> most_shared;  // by device
};

struct Launch {
  Function* function = nullptr;
  Extent grid, block;
  std::vector<char> parameters;
  size_t shared = 0;
  int device = 0;
};

// What a stream was told while it was captured.
struct Graph {
  std::vector<Launch> launches;
};
struct Stream {
  bool blocking = true;  // takes turns with the default stream
  Graph* capture = nullptr;
  bool broken = false;  // something was called that must not be captured
  int device = 0;
};

// A copy to the device from memory of the host, which CUDA may still be doing when the call returns: what runs on a stream that
// nothing orders behind it finds the old contents.
struct Upload {
  Stream* stream;  // null: the default stream
  char* target;
  std::vector<char> bytes;
};

struct Totals {  // of the launches since sdct_ptx_reset
  int64_t launches, blocks, threads, shared_bytes, barriers, instructions, wavefronts, ideal_wavefronts, sectors;
};

// Everything there is. Not destroyed: programs call in while they end.
struct Runtime {
  std::recursive_mutex mutex;
  Memory memory;
  Machine machine{memory};
  std::vector<Upload> uploads;  // under way
  std::map<const void*, Function> functions;
  Checks checks{setting("SDCT_PTX_RACES", 1) != 0, false};
  Totals totals{};
  std::string last_kernel;
  std::map<std::string, Cost> lines;  // by "file:line"
  cudaError_t refusal = cudaSuccess;  // of the allocation after `granted` more
  int granted = 0;
};
Runtime& runtime() {
  static auto* made = new Runtime;
  return *made;
}

thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string failure_text;
thread_local int current_device = 0;
thread_local Stream* capturing = nullptr;
thread_local struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} configured;

cudaError_t fail(cudaError_t error, const std::string& text = {}) {
  last_error = error;
  failure_text = text;
  return error;
}
cudaError_t launch_failure(const std::string& text) {
  std::fprintf(stderr, "ptx: %s\n", text.c_str());
  return fail(cudaErrorLaunchFailure, text);
}

// Calls that synchronise or allocate break the capture of their thread.
bool breaks_capture() {
  if (!capturing) return false;
  capturing->broken = true;
  return true;
}

// Ends the uploads before what comes next on `stream`; all of them where `every`.
void arrive(Stream* stream, bool every = false) {
  std::vector<Upload>& uploads = runtime().uploads;
  const auto ordered = [&](const Upload& upload) {
    const bool takes_turns = (!upload.stream || upload.stream->blocking) && (!stream || stream->blocking);
    return every || upload.stream == stream || takes_turns;
  };
  for (const Upload& upload : uploads) {
    if (ordered(upload)) std::copy(upload.bytes.begin(), upload.bytes.end(), upload.target);
  }
  uploads.erase(std::remove_if(uploads.begin(), uploads.end(), ordered), uploads.end());
}

cudaError_t run(const Launch& launch, Stream* stream) {
  Runtime& r = runtime();
  const std::lock_guard<std::recursive_mutex> lock(r.mutex);
  arrive(stream);
  const Kernel& kernel = *launch.function->kernel;
  const Program& program = *launch.function->module->program;
  try {
    r.machine.run(program, kernel, launch.grid, launch.block, launch.parameters, launch.shared, r.checks, launch.device);
  } catch (const Fault& fault) {
    return launch_failure(fault.what());
  }
  Totals& t = r.totals;
  ++t.launches;
  t.blocks += int64_t(launch.grid.count());
  t.threads = int64_t(launch.block.count());
  t.shared_bytes = int64_t(kernel.shared_bytes + launch.shared);
  t.barriers = std::max(t.barriers, int64_t(r.machine.barriers()));
  r.last_kernel = kernel.name;
  for (size_t k = 0; k < kernel.code.size(); ++k) {
    const Cost& cost = r.machine.costs()[k];
    t.instructions += int64_t(cost.instructions);
    t.wavefronts += int64_t(cost.wavefronts);
    t.ideal_wavefronts += int64_t(cost.ideal);
    t.sectors += int64_t(cost.sectors);
    if (!r.checks.costs) continue;
    const std::string where = program.where(kernel.code[k]);
    Cost& line = r.lines[where.substr(0, where.find(" (PTX"))];
    line.instructions += cost.instructions;
    line.wavefronts += cost.wavefronts;
    line.ideal += cost.ideal;
    line.sectors += cost.sectors;
  }
  return cudaSuccess;
}

template <class T>
T* of(void* handle) {
  return static_cast<T*>(handle);
}

}  // namespace

// --- what nvcc's own code calls -----------------------------------------------------------------------------------------------

PTX_EXPORT void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int32_t magic, version;
    const void* container;
    void* name;
  };
  auto* module = new Module;
  try {
    module->program = std::make_unique<Program>(ptx_of(static_cast<const Wrapper*>(wrapper)->container));
  } catch (const Fault& fault) {
    module->failure = fault.what();  // a launch tells
  }
  return reinterpret_cast<void**>(module);
}
PTX_EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
PTX_EXPORT void __cudaUnregisterFatBinary(void**) {}
PTX_EXPORT char __cudaInitModule(void**) { return 0; }

PTX_EXPORT void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                       int*) {
  Runtime& r = runtime();
  const std::lock_guard<std::recursive_mutex> lock(r.mutex);
  Function& function = r.functions[host];
  function.module = reinterpret_cast<Module*>(handle);
  if (!function.module->program) return;
  for (const auto& kernel : function.module->program->kernels) {
    if (kernel->name == name) function.kernel = kernel.get();
  }
}

PTX_EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configured = {grid, block, shared, stream};
  return 0;
}
PTX_EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configured.grid, *block = configured.block, *shared = configured.shared;
  *static_cast<void**>(stream) = configured.stream;
  return cudaSuccess;
}

PTX_EXPORT cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  Runtime& r = runtime();
  const std::lock_guard<std::recursive_mutex> lock(r.mutex);
  const auto found = r.functions.find(host);
  if (found == r.functions.end()) return fail(cudaErrorInvalidDeviceFunction);
  Function& function = found->second;
  if (!function.module->program) return launch_failure(function.module->failure);
  if (!function.kernel) return fail(cudaErrorInvalidDeviceFunction);
  const Kernel& kernel = *function.kernel;
  Launch launch{&function, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, {}, shared, current_device};
  if (stream && of<Stream>(stream)->device != current_device) return fail(cudaErrorInvalidResourceHandle);
  const uint64_t threads = launch.block.count();
  const auto asked = function.most_shared.find(current_device);
  const size_t most_shared = asked == function.most_shared.end() ? 48 << 10 : asked->second;
  if (threads == 0 || threads > kernel.max_threads || block.z > 64 || launch.grid.count() == 0 || grid.x > INT32_MAX ||
      grid.y > 65535 || grid.z > 65535 || shared + kernel.shared_bytes > most_shared) {
    return fail(cudaErrorInvalidConfiguration);
  }
  launch.parameters.resize(kernel.parameter_bytes);
  for (size_t k = 0; k < kernel.parameters.size(); ++k) {
    std::memcpy(launch.parameters.data() + kernel.parameters[k].offset, arguments[k], kernel.parameters[k].size);
  }
  if (auto* captured = of<Stream>(stream); captured && captured->capture) {
    captured->capture->launches.push_back(launch);
    return cudaSuccess;
  }
  return run(launch, of<Stream>(stream));
}
// nvcc's own stubs call these from CUDA 13 on
PTX_EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                          cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
PTX_EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
PTX_EXPORT cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  Runtime& r = runtime();
  const std::lock_guard<std::recursive_mutex> lock(r.mutex);
  const auto found = r.functions.find(host);
  if (found == r.functions.end()) return fail(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > setting("SDCT_PTX_SHARED", 232448)) {
    return fail(cudaErrorInvalidValue);
  }
  found->second.most_shared[current_device] = size_t(value);
  return cudaSuccess;
}

// --- devices and errors ----------------------------------------------------------------------------------------------------------

PTX_EXPORT cudaError_t cudaGetDeviceCount(int* count) {
  *count = setting("SDCT_PTX_DEVICES", 1);
  return cudaSuccess;
}
PTX_EXPORT cudaError_t cudaGetDevice(int* device) {
  if (setting("SDCT_PTX_DEVICES", 1) == 0) return fail(cudaErrorNoDevice);
  *device = current_device;
  return cudaSuccess;
}
PTX_EXPORT cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= setting("SDCT_PTX_DEVICES", 1)) return fail(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
PTX_EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = setting("SDCT_PTX_SHARED", 232448); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = setting("SDCT_PTX_SHARED", 232448) + 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMultiProcessorCount: *value = setting("SDCT_PTX_SMS", 132); break;
    case cudaDevAttrL2CacheSize: *value = 1 << 20; break;
    default: return launch_failure("device attribute " + std::to_string(attribute) + " is not supported");
  }
  return cudaSuccess;
}
PTX_EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "PTX on a CPU");
  properties->major = setting("SDCT_PTX_CAPABILITY", 90) / 10;
  properties->minor = setting("SDCT_PTX_CAPABILITY", 90) % 10;
  properties->multiProcessorCount = setting("SDCT_PTX_SMS", 132);
  properties->l2CacheSize = 1 << 20;
  properties->totalGlobalMem = size_t(1) << 33;
  return cudaSuccess;
}
PTX_EXPORT cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
PTX_EXPORT cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
PTX_EXPORT cudaError_t cudaDeviceSynchronize() {
  if (breaks_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  const std::lock_guard<std::recursive_mutex> lock(runtime().mutex);
  arrive(nullptr, true);
  return cudaSuccess;
}
PTX_EXPORT cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
PTX_EXPORT const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorDevicesUnavailable: return "CUDA-capable device(s) is/are busy or unavailable";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorLaunchFailure: return failure_text.empty() ? "unspecified launch failure" : failure_text.c_str();
    default: return "an error of the CUDA runtime";
  }
}

// --- memory ------------------------------------------------------------------------------------------------------------------------

PTX_EXPORT cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  if (breaks_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  Runtime& r = runtime();
  const std::lock_guard<std::recursive_mutex> lock(r.mutex);
  if (r.refusal != cudaSuccess && r.granted-- == 0) {
    const cudaError_t refusal = r.refusal;
    r.refusal = cudaSuccess;
    return fail(refusal);
  }
  *pointer = bytes ? r.memory.allocate(bytes, current_device) : nullptr;
  return *pointer || !bytes ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
PTX_EXPORT cudaError_t cudaFree(void* pointer) {
  if (!pointer) return cudaSuccess;
  if (breaks_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  Runtime& r = runtime();
  const std::lock_guard<std::recursive_mutex> lock(r.mutex);
  arrive(nullptr, true);
  return r.memory.release(pointer) ? cudaSuccess : fail(cudaErrorInvalidValue);
}

namespace {

// A copy or a fill that begins in an allocation stays in it. Memory of the host is nobody's here.
cudaError_t inside(const void* pointer, size_t bytes, bool device) {
  Runtime& r = runtime();
  const auto address = reinterpret_cast<uint64_t>(pointer);
  const bool begins = r.memory.find(address, 1) != nullptr;
  return (begins && !r.memory.find(address, bytes)) || (device && bytes && !begins) ? fail(cudaErrorInvalidValue) : cudaSuccess;
}
cudaError_t copy(void* target, const void* source, size_t bytes, cudaMemcpyKind kind, Stream* stream) {
  Runtime& r = runtime();
  const std::lock_guard<std::recursive_mutex> lock(r.mutex);
  arrive(stream);
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (const cudaError_t error = inside(target, bytes, to_device)) return error;
  if (const cudaError_t error = inside(source, bytes, from_device)) return error;
  const auto* from = static_cast<const char*>(source);
  const auto is_device = [&](const void* pointer) { return r.memory.find(reinterpret_cast<uint64_t>(pointer), 1) != nullptr; };
  if (bytes && is_device(target) && !is_device(source)) {
    r.uploads.push_back({stream, static_cast<char*>(target), {from, from + bytes}});
  } else if (bytes) {
    std::memcpy(target, from, bytes);
  }
  return cudaSuccess;
}
cudaError_t set(void* target, int value, size_t bytes, Stream* stream) {
  const std::lock_guard<std::recursive_mutex> lock(runtime().mutex);
  arrive(stream);
  if (const cudaError_t error = inside(target, bytes, true)) return error;
  if (bytes) std::memset(target, value, bytes);
  return cudaSuccess;
}
// only launches are recorded
bool captured(cudaStream_t stream) { return stream && of<Stream>(stream)->capture; }

}  // namespace

PTX_EXPORT cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind kind) {
  return breaks_capture() ? fail(cudaErrorStreamCaptureUnsupported) : copy(target, source, bytes, kind, nullptr);
}
PTX_EXPORT cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return captured(stream) ? launch_failure("copies in a graph are not supported") : copy(target, source, bytes, kind, of<Stream>(stream));
}
PTX_EXPORT cudaError_t cudaMemset(void* target, int value, size_t bytes) {
  return breaks_capture() ? fail(cudaErrorStreamCaptureUnsupported) : set(target, value, bytes, nullptr);
}
PTX_EXPORT cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t stream) {
  return captured(stream) ? launch_failure("fills in a graph are not supported") : set(target, value, bytes, of<Stream>(stream));
}

// --- streams, graphs, events ---------------------------------------------------------------------------------------------------------

PTX_EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  auto* made = new Stream;
  made->blocking = !(flags & cudaStreamNonBlocking);
  made->device = current_device;
  *stream = reinterpret_cast<cudaStream_t>(made);
  return cudaSuccess;
}
PTX_EXPORT cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  static auto* gone = new Stream{false};  // nothing waits for what a destroyed stream still does, and it goes on
  const std::lock_guard<std::recursive_mutex> lock(runtime().mutex);
  for (Upload& upload : runtime().uploads) {
    if (upload.stream == of<Stream>(stream)) upload.stream = gone;
  }
  delete of<Stream>(stream);
  return cudaSuccess;
}
PTX_EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (captured(stream) || breaks_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  const std::lock_guard<std::recursive_mutex> lock(runtime().mutex);
  arrive(of<Stream>(stream));
  return cudaSuccess;
}
PTX_EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  of<Stream>(stream)->capture = new Graph;
  capturing = of<Stream>(stream);
  return cudaSuccess;
}
PTX_EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  auto* s = of<Stream>(stream);
  *graph = reinterpret_cast<cudaGraph_t>(s->capture);
  s->capture = nullptr;
  capturing = nullptr;
  if (!s->broken) return cudaSuccess;
  s->broken = false;
  return fail(cudaErrorStreamCaptureInvalidated);
}
PTX_EXPORT cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = reinterpret_cast<cudaGraphExec_t>(new Graph(*of<Graph>(graph)));
  return cudaSuccess;
}
PTX_EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  for (const Launch& launch : of<Graph>(exec)->launches) {
    if (const cudaError_t error = run(launch, of<Stream>(stream))) return error;
  }
  return cudaSuccess;
}
PTX_EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete of<Graph>(graph);
  return cudaSuccess;
}
PTX_EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete of<Graph>(exec);
  return cudaSuccess;
}
// Events tell the time of this machine, which is of no use but to run the code that asks for it.
using Moment = std::chrono::steady_clock::time_point;
PTX_EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = reinterpret_cast<cudaEvent_t>(new Moment);
  return cudaSuccess;
}
PTX_EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  *of<Moment>(event) = std::chrono::steady_clock::now();
  return cudaSuccess;
}
PTX_EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
PTX_EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(*of<Moment>(end) - *of<Moment>(begin)).count();
  return cudaSuccess;
}
PTX_EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete of<Moment>(event);
  return cudaSuccess;
}

// --- for tests and kernel_counts.py ------------------------------------------------------------------------------------------------------

// Runs the first kernel of a PTX text. What was wrong, or an empty text; valid until the thread's next call.
PTX_EXPORT const char* sdct_ptx_run(const char* text, uint32_t blocks, uint32_t threads, size_t shared, const void* parameters,
                                    size_t bytes) {
  Runtime& r = runtime();
  const std::lock_guard<std::recursive_mutex> lock(r.mutex);
  static thread_local std::string failure;
  failure.clear();
  arrive(nullptr, true);
  try {
    const Program program(text);
    const auto* first = static_cast<const char*>(parameters);
    r.machine.run(program, *program.kernels.at(0), {blocks, 1, 1}, {threads, 1, 1}, {first, first + bytes}, shared, r.checks);
  } catch (const Fault& fault) {
    failure = fault.what();
  }
  return failure.c_str();
}
// "name signature" of every instruction, a line each, as in instructions.h.
PTX_EXPORT const char* sdct_ptx_instructions() {
  static const std::string names = list_entries();
  return names.c_str();
}

// The allocation after `granted` more fails with `error`.
PTX_EXPORT void sdct_ptx_refuse_allocation(int error, int granted) {
  Runtime& r = runtime();
  const std::lock_guard<std::recursive_mutex> lock(r.mutex);
  r.refusal = static_cast<cudaError_t>(error);
  r.granted = granted;
}

// Starts counting anew; wavefronts and sectors where `costs`.
PTX_EXPORT void sdct_ptx_reset(int costs) {
  Runtime& r = runtime();
  const std::lock_guard<std::recursive_mutex> lock(r.mutex);
  r.totals = {};
  r.lines.clear();
  r.checks.costs = costs != 0;
}
// totals: as struct Totals. The kernel's name is that of the last launch and stays until the next one.
PTX_EXPORT const char* sdct_ptx_totals(int64_t* totals) {
  Runtime& r = runtime();
  const std::lock_guard<std::recursive_mutex> lock(r.mutex);
  std::memcpy(totals, &r.totals, sizeof r.totals);
  return r.last_kernel.c_str();
}
// "file:line instructions wavefronts ideal sectors" for each line of source, since the reset.
PTX_EXPORT int sdct_ptx_lines(const char* path) {
  Runtime& r = runtime();
  const std::lock_guard<std::recursive_mutex> lock(r.mutex);
  std::FILE* file = std::fopen(path, "w");
  if (!file) return 1;
  for (const auto& [where, cost] : r.lines) {
    std::fprintf(file, "%s %llu %llu %llu %llu\n", where.c_str(), static_cast<unsigned long long>(cost.instructions),
                 static_cast<unsigned long long>(cost.wavefronts), static_cast<unsigned long long>(cost.ideal),
                 static_cast<unsigned long long>(cost.sectors));
  }
  return std::fclose(file);
}
