// Runs cases from a file through the core, for tests in other languages and under sanitizers.
//
//     sdct_driver CASES RESULTS
//     sdct_driver --isa         names the instruction set of the CPU path
//     sdct_driver --gpu         exits 0 where it can run on a GPU
//
// CASES: cases one after another, each a header of int64
//     path (0 CPU, 1 GPU), type, rows, blends, slots, tokens, ragged, in_place, d_in, x_stride,
//     threads, projections, then d_out, capacity, y_in_stride, y_out_stride of each projection
// followed by token_row (where ragged), x, ids, scales, values, indices, y_in_1 ... as raw arrays. Strided arrays have
// (tokens - 1) * stride + length elements. RESULTS: int64 status of each case, then y_out_1 ..., padding bytes 0xcd.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "sdct/sdct.h"

#if defined(SDCT_WITH_CUDA)
#include <cuda_runtime.h>
#endif

namespace {

using Bytes = std::unique_ptr<unsigned char[]>;

struct Array {
  Bytes bytes;
  size_t size = 0;
};

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "sdct_driver: %s\n", what);
  std::exit(2);
}

Array make(size_t size) {
  return {Bytes(new unsigned char[size]), size};
}

Array read(std::FILE* file, size_t size) {
  Array array = make(size);
  if (size && std::fread(array.bytes.get(), 1, size, file) != size) fail("the case file ends early");
  return array;
}

void run_threads(void* pool, size_t count, void (*body)(void*, size_t), void* context) {
  const size_t threads = *static_cast<const size_t*>(pool);
  std::vector<std::thread> workers;
  for (size_t w = 0; w < threads; ++w) {
    workers.emplace_back([=] {
      for (size_t i = w; i < count; i += threads) body(context, i);
    });
  }
  for (std::thread& worker : workers) worker.join();
}

#if defined(SDCT_WITH_CUDA)
void check(cudaError_t error) {
  if (error != cudaSuccess) fail(cudaGetErrorString(error));
}

struct DeviceArray {
  void* memory = nullptr;
  explicit DeviceArray(size_t size) { check(cudaMalloc(&memory, size ? size : 1)); }
  explicit DeviceArray(const Array& host) : DeviceArray(host.size) {
    check(cudaMemcpy(memory, host.bytes.get(), host.size, cudaMemcpyHostToDevice));
  }
  ~DeviceArray() { cudaFree(memory); }
  DeviceArray(const DeviceArray&) = delete;
};

sdct::Status run_cuda(const sdct::Plan& plan, sdct::Problem problem, const std::vector<Array*>& inputs,
                      std::vector<const void*> pointers, std::vector<Array>& outputs, bool in_place) {
  using namespace sdct;
  std::vector<std::unique_ptr<DeviceArray>> device;
  const auto moved = [&](const void* host) -> void* {
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (host && pointers[i] == host) return device[i]->memory;
    }
    return nullptr;
  };
  for (const Array* input : inputs) device.push_back(std::make_unique<DeviceArray>(*input));
  problem.token_row = static_cast<const int32_t*>(moved(problem.token_row));
  problem.x = moved(problem.x);
  problem.ids = static_cast<const int32_t*>(moved(problem.ids));
  problem.scales = static_cast<const float*>(moved(problem.scales));
  problem.values = static_cast<const float*>(moved(problem.values));
  problem.indices = static_cast<const int32_t*>(moved(problem.indices));
  std::vector<std::unique_ptr<DeviceArray>> results;
  for (size_t j = 0; j < outputs.size(); ++j) {
    results.push_back(std::make_unique<DeviceArray>(outputs[j]));
    problem.y_out[j] = results[j]->memory;
    problem.y_in[j] = in_place ? results[j]->memory : moved(problem.y_in[j]);
  }
  check(cudaDeviceSynchronize());  // the copies; those of the plan are the plan's
  DevicePlan* device_plan = nullptr;
  Status status = cuda_prepare(plan, &device_plan);
  if (status == Status::kOk) {
    // hosts launch on such streams: nothing waits for what was not waited for
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    const size_t bytes = cuda_workspace_bytes(*device_plan, problem.tokens);
    DeviceArray workspace(bytes);
    status = cuda_run(*device_plan, problem, workspace.memory, bytes, stream);
    check(cudaStreamSynchronize(stream));
    check(cudaStreamDestroy(stream));
  }
  cuda_release(device_plan);
  if (status == Status::kCuda) std::fprintf(stderr, "sdct_driver: %s\n", cuda_error());
  for (size_t j = 0; j < outputs.size(); ++j) {
    check(cudaMemcpy(outputs[j].bytes.get(), results[j]->memory, outputs[j].size, cudaMemcpyDeviceToHost));
  }
  return status;
}
#endif

}  // namespace

int main(int argc, char** argv) {
  using namespace sdct;
  if (argc == 2 && std::string(argv[1]) == "--isa") {
    std::puts(cpu_isa());
    return 0;
  }
  if (argc == 2 && std::string(argv[1]) == "--gpu") {
#if defined(SDCT_WITH_CUDA)
    int devices = 0;
    return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0 ? 0 : 1;
#else
    return 1;
#endif
  }
  if (argc != 3) fail("usage: sdct_driver CASES RESULTS");
  std::FILE* cases = std::fopen(argv[1], "rb");
  std::FILE* results = std::fopen(argv[2], "wb");
  if (!cases || !results) fail("cannot open the files");
  int64_t head[12];
  while (std::fread(head, sizeof head[0], 12, cases) == 12) {
    Problem p{};
    p.type = DataType(head[1]);
    p.rows = head[2], p.blends = head[3], p.slots = head[4], p.tokens = head[5];
    const bool ragged = head[6], in_place = head[7];
    Shape shape{};
    shape.d_in = int32_t(head[8]);
    p.x_stride = head[9];
    size_t threads = size_t(head[10]);
    shape.projections = int32_t(head[11]);
    if (shape.projections < 1 || shape.projections > kMaxProjections) fail("bad number of projections");
    size_t entries = 0;
    for (int32_t j = 0; j < shape.projections; ++j) {
      int64_t more[4];
      if (std::fread(more, sizeof more[0], 4, cases) != 4) fail("the case file ends early");
      shape.d_out[j] = int32_t(more[0]);
      shape.capacity[j] = int32_t(more[1]);
      p.y_in_stride[j] = more[2], p.y_out_stride[j] = more[3];
      entries += size_t(more[1]);
    }
    const size_t element = element_bytes(p.type);
    const auto span = [&](int64_t stride, int64_t length) {
      return p.tokens ? size_t((p.tokens - 1) * stride + length) * element : 0;
    };
    Array token_row = read(cases, ragged ? size_t(p.tokens) * 4 : 0);
    Array x = read(cases, span(p.x_stride, shape.d_in));
    Array ids = read(cases, size_t(p.rows * p.blends) * 4), scales = read(cases, size_t(p.rows * p.blends) * 4);
    Array values = read(cases, size_t(p.slots) * entries * 4), indices = read(cases, size_t(p.slots) * entries * 8);
    std::vector<Array> y_in, y_out;
    for (int32_t j = 0; j < shape.projections; ++j) {
      y_in.push_back(read(cases, span(p.y_in_stride[j], shape.d_out[j])));
      y_out.push_back(make(span(p.y_out_stride[j], shape.d_out[j])));
      std::memset(y_out[j].bytes.get(), 0xcd, y_out[j].size);
      if (in_place) std::memcpy(y_out[j].bytes.get(), y_in[j].bytes.get(), y_out[j].size);
      p.y_in[j] = (in_place ? y_out : y_in)[j].bytes.get();
      p.y_out[j] = y_out[j].bytes.get();
    }
    if (ragged) p.token_row = reinterpret_cast<const int32_t*>(token_row.bytes.get());
    p.x = x.bytes.get();
    p.ids = reinterpret_cast<const int32_t*>(ids.bytes.get());
    p.scales = reinterpret_cast<const float*>(scales.bytes.get());
    p.values = reinterpret_cast<const float*>(values.bytes.get());
    p.indices = reinterpret_cast<const int32_t*>(indices.bytes.get());

    Plan* plan = nullptr;
    Status status = create_plan(shape, &plan);
    if (status == Status::kOk && head[0] == 0) {
      const Parallel parallel{run_threads, &threads, int32_t(threads)};
      status = cpu_run(*plan, p, threads > 1 ? &parallel : nullptr);
    } else if (status == Status::kOk) {
#if defined(SDCT_WITH_CUDA)
      std::vector<Array*> inputs = {&token_row, &x, &ids, &scales, &values, &indices};
      std::vector<const void*> pointers = {p.token_row, p.x, p.ids, p.scales, p.values, p.indices};
      for (int32_t j = 0; j < shape.projections; ++j) {
        inputs.push_back(&y_in[j]);
        pointers.push_back(y_in[j].bytes.get());
      }
      status = run_cuda(*plan, p, inputs, pointers, y_out, in_place);
#else
      status = Status::kUnavailable;
#endif
    }
    destroy_plan(plan);
    const int64_t code = int64_t(status);
    std::fwrite(&code, sizeof code, 1, results);
    for (const Array& y : y_out) std::fwrite(y.bytes.get(), 1, y.size, results);
  }
  std::fclose(cases);
  if (std::fclose(results) != 0) fail("cannot write the results");
  return 0;
}
