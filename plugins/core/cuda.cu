// Launching the kernel on a GPU. What is for the host alone is hidden from NVRTC, which compiles the kernels of toolchains whose nvcc
// cannot be had (plugins/tests/toolchains.py).
#if !defined(__CUDACC_RTC__)
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>
#endif

#include "kernel.h"

#if !defined(__grid_constant__)  // nvcc before 11.7
#define __grid_constant__
#endif

namespace sdct {
namespace {

// grid.x blocks share the tokens, grid.y blocks the projections. A block's threads are its teams' by their y.
// kShared: working memory on chip, `tables` bytes of tables, and for every team its choices and buffers. Else the buffers are a
// slice of `workspace`.
template <class T, bool kShared, bool kDirect>
__global__ void __launch_bounds__(kDirect || !kShared ? kWideThreads : kBlockThreads, 1)
    spectral_delta(const __grid_constant__ KernelArgs args, Complex* workspace, int32_t tables, int32_t step) {
  extern __shared__ __align__(16) unsigned char shared[];
  const kernel::Team team{};
  const int32_t teams = int32_t(blockDim.y), thread = int32_t(threadIdx.y * blockDim.x + threadIdx.x);
  if (tables) {
    const auto copy = [&](const Transform& t) {
      const auto* from = reinterpret_cast<const uint4*>(t.tables);
      auto* to = reinterpret_cast<uint4*>(shared + t.shared_table);
      for (int32_t i = thread; i < t.table_bytes / 16; i += teams * team.threads()) to[i] = from[i];
    };
    for (int32_t j = -1; j < args.projections; ++j) {
      const Transform& t = j < 0 ? args.in : args.out[j];
      bool mine = t.shared_table >= 0;  // transforms of one length share a copy
      for (int32_t k = -1; k < j; ++k) mine = mine && (k < 0 ? args.in : args.out[k]).n != t.n;
      if (mine) copy(t);
    }
    __syncthreads();
  }
  unsigned char* const own = shared + tables + int32_t(threadIdx.y) * (kernel::kChoiceBytes + (kShared ? args.team_bytes : 0));
  kernel::Choice* choice = reinterpret_cast<kernel::Choice*>(own);  // of two, in turns
  kernel::Working memory = {reinterpret_cast<Complex*>(own + kernel::kChoiceBytes), tables ? shared : nullptr};
  if (!kShared) {
    memory.buffers = workspace + (size_t(blockIdx.y) * gridDim.x + blockIdx.x) * (args.team_bytes / sizeof(Complex));
  }
  for (int64_t t = int64_t(blockIdx.x) * teams + int32_t(threadIdx.y); t < args.problem.tokens;) {
    kernel::run_token<T, kShared, kDirect>(team, args, memory, choice, t, int32_t(blockIdx.y) * step, (int32_t(blockIdx.y) + 1) * step);
    t = choice->token + int64_t(gridDim.x) * teams;
    choice = reinterpret_cast<kernel::Choice*>(own) + (choice == reinterpret_cast<kernel::Choice*>(own));
  }
}

}  // namespace
}  // namespace sdct

#if !defined(__CUDACC_RTC__)
namespace sdct {
namespace {

thread_local const char* last_error = "";

bool failed(cudaError_t error) {
  if (error == cudaSuccess) return false;
  last_error = cudaGetErrorString(error);
  static_cast<void>(cudaGetLastError());  // reported here; the host's own checks must not meet it again
  return true;
}

// Blocks that work in global memory at once: about two for each multiprocessor of a large GPU. The same number on every GPU, because
// TensorRT asks for the workspace where it builds an engine, and runs the engine on others of the same kind.
constexpr int64_t kSlices = 256;

using Kernel = void (*)(KernelArgs, Complex*, int32_t, int32_t);

Kernel kernel_of(DataType type, bool shared, bool direct) {
  static constexpr Kernel kernels[3][2][2] = {
      {{spectral_delta<float, false, false>, spectral_delta<float, false, true>},
       {spectral_delta<float, true, false>, spectral_delta<float, true, true>}},
      {{spectral_delta<Half, false, false>, spectral_delta<Half, false, true>},
       {spectral_delta<Half, true, false>, spectral_delta<Half, true, true>}},
      {{spectral_delta<BFloat16, false, false>, spectral_delta<BFloat16, false, true>},
       {spectral_delta<BFloat16, true, false>, spectral_delta<BFloat16, true, true>}},
  };
  return kernels[int32_t(type)][shared][direct];
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
  const cudaError_t error = cudaMalloc(&fresh->memory, tables.blob().size());
  if (failed(error)) return error == cudaErrorMemoryAllocation ? Status::kOutOfMemory : Status::kCuda;
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

// A launch's blocks.
struct Blocks {
  int32_t teams = 1;
  int32_t tables = 0;    // bytes of tables in shared memory
  int32_t resident = 1;  // of a multiprocessor
};

class DevicePlan {
 public:
  Shape shape;
  KernelArgs args;  // without a problem
  std::shared_ptr<const DeviceTables> in, out[kMaxProjections];
  bool shared = false;   // working memory is on chip
  Blocks few, many;      // for as many tokens as multiprocessors, and for more
  int32_t most_threads = 0, team_threads = 0;  // of a block, of a token
  int multiprocessors = 0;

  int32_t split(int64_t tokens) const {  // blocks for the projections: apart while the GPU has room, to cut latency
    return tokens * shape.projections <= multiprocessors ? shape.projections : 1;
  }
  const Blocks& blocks(int64_t tokens) const { return tokens <= 2 * int64_t(multiprocessors) ? few : many; }
  int64_t grid(int64_t tokens) const {
    if (!shared) return std::min(tokens, kSlices);
    const Blocks& b = blocks(tokens);
    return std::min<int64_t>((tokens + b.teams - 1) / b.teams, int64_t(multiprocessors) * b.resident);
  }
  int32_t shared_bytes(const Blocks& b) const { return b.tables + b.teams * (kernel::kChoiceBytes + (shared ? args.team_bytes : 0)); }
};

namespace {

// Chooses the lengths whose tables get a copy in `room` bytes of shared memory: those first that are read most. Gives the bytes
// taken, and which share of what a token reads of tables is then there.
struct Placed {
  int32_t bytes;
  double share;
};
Placed place_tables(KernelArgs* args, int32_t room) {
  struct Length {
    std::vector<Transform*> uses;
    int64_t reads() const { return int64_t(uses.size()) * uses[0]->table_bytes; }
  };
  std::map<int32_t, Length> by_length;
  by_length[args->in.n].uses.push_back(&args->in);
  for (int32_t j = 0; j < args->projections; ++j) by_length[args->out[j].n].uses.push_back(&args->out[j]);
  std::vector<Length> lengths;
  for (const auto& [n, length] : by_length) lengths.push_back(length);
  std::stable_sort(lengths.begin(), lengths.end(), [](const Length& a, const Length& b) { return a.reads() > b.reads(); });
  int32_t bytes = 0;
  double here = 0, all = 0;
  for (const Length& length : lengths) {
    const bool fits = bytes + length.uses[0]->table_bytes <= room;
    for (Transform* t : length.uses) t->shared_table = fits ? bytes : -1;
    all += double(length.reads());
    if (!fits) continue;
    here += double(length.reads());
    bytes += length.uses[0]->table_bytes;
  }
  return {bytes, here / all};
}

// How many blocks a multiprocessor holds; 0 where one is too many.
int32_t resident(int32_t threads, int32_t bytes, int32_t most_threads, int most_shared, int all_shared, int all_threads) {
  if (bytes > most_shared) return 0;
  constexpr int32_t kReserved = 1024;  // bytes of shared memory that the driver takes for each block
  return std::max(1, std::min({all_threads / threads, all_shared / (bytes + kReserved), most_threads / threads}));
}

}  // namespace

const char* cuda_error() noexcept { return last_error; }

Status cuda_prepare(const Plan& plan, DevicePlan** device_plan) noexcept {
  if (!device_plan) return Status::kBadProblem;
  *device_plan = nullptr;
  try {
    auto made = std::make_unique<DevicePlan>();
    made->shape = plan.shape;
    made->args = kernel_args(plan, Problem{});
    int device = 0, most_shared = 0, all_shared = 0, all_threads = 0;
    if (failed(cudaGetDevice(&device)) ||
        failed(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) ||
        failed(cudaDeviceGetAttribute(&all_shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)) ||
        failed(cudaDeviceGetAttribute(&all_threads, cudaDevAttrMaxThreadsPerMultiProcessor, device)) ||
        failed(cudaDeviceGetAttribute(&made->multiprocessors, cudaDevAttrMultiProcessorCount, device))) {
      return Status::kCuda;
    }
    KernelArgs& args = made->args;
    Status status = upload(*plan.in, device, &made->in);
    if (status != Status::kOk) return status;
    args.in = plan.in->view(made->in->memory);
    for (int32_t j = 0; j < plan.shape.projections; ++j) {
      status = upload(*plan.out[j], device, &made->out[j]);
      if (status != Status::kOk) return status;
      args.out[j] = plan.out[j]->view(made->out[j]->memory);
    }
    const auto use = [&](bool shared) {
      made->shared = shared;
      made->most_threads = args.direct || !shared ? kWideThreads : kBlockThreads;
      made->team_threads = team_threads(args, made->most_threads);
    };
    const auto fits = [&](const Blocks& b) {
      return resident(b.teams * made->team_threads, made->shared_bytes(b), made->most_threads, most_shared, all_shared, all_threads);
    };
    use(true);
    if (fits(made->few) == 0) use(false);
    made->few.resident = fits(made->few);
    // as many teams on a multiprocessor as can be, where tables on chip, which are read for every token, are worth as much again
    made->many = made->few;
    double best = 0;
    int32_t best_room = 0;
    for (int32_t teams = 1; made->shared && teams * made->team_threads <= made->most_threads; ++teams) {
      Blocks b{teams, 0, 1};
      const int32_t room = std::max(most_shared - made->shared_bytes(b), 0);
      for (const int32_t use_of_it : {0, room}) {
        const Placed placed = place_tables(&args, use_of_it);
        b.tables = placed.bytes;
        b.resident = fits(b);
        const double worth = b.teams * b.resident * (1 + placed.share);
        if (worth < best) continue;
        best = worth, best_room = use_of_it;
        made->many = b;
      }
    }
    place_tables(&args, best_room);
    if (made->shared) {
      for (const DataType type : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
        if (failed(cudaFuncSetAttribute(kernel_of(type, true, args.direct), cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared))) {
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
  return size_t(plan.grid(tokens)) * plan.shape.projections * plan.args.team_bytes;
}

Status cuda_run(const DevicePlan& plan, const Problem& problem, void* workspace, size_t workspace_bytes,
                CUstream_st* stream) noexcept {
  const Status status = check_problem(plan.shape, problem);
  if (status != Status::kOk) return status;
  if (problem.tokens == 0) return Status::kOk;
  const int32_t split = plan.split(problem.tokens);
  const Blocks& blocks = plan.blocks(problem.tokens);
  const int64_t grid_tokens = plan.grid(problem.tokens);
  if (!plan.shared && (!workspace || reinterpret_cast<uintptr_t>(workspace) % 16 != 0 ||
                       workspace_bytes < size_t(grid_tokens) * split * plan.args.team_bytes)) {
    return Status::kWorkspace;
  }
  KernelArgs args = plan.args;
  args.problem = problem;
  args.tokens_per_row = problem.rows > 0 ? std::max<int64_t>(problem.tokens / problem.rows, 1) : 1;
  Complex* memory = static_cast<Complex*>(workspace);
  int32_t tables = blocks.tables, step = plan.shape.projections / split;
  void* parameters[] = {&args, &memory, &tables, &step};
  const dim3 grid{unsigned(grid_tokens), unsigned(split), 1}, block{unsigned(plan.team_threads), unsigned(blocks.teams), 1};
  const auto* kernel = reinterpret_cast<const void*>(kernel_of(problem.type, plan.shared, args.direct));
  if (failed(cudaLaunchKernel(kernel, grid, block, parameters, size_t(plan.shared_bytes(blocks)), stream))) {
    return Status::kCuda;
  }
  return Status::kOk;
}

}  // namespace sdct
#endif
