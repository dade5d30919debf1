#include "emulate.h"

#include <algorithm>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <vector>

#include "kernel.h"

namespace sdct {
namespace {

class EmulatedBlock {
 public:
  EmulatedBlock(int32_t threads, uint32_t seed) : order_(threads), shuffle_(seed != 0), random_(seed) {
    std::iota(order_.begin(), order_.end(), 0);
  }
  int threads() const { return int(order_.size()); }
  template <class F>
  void phase(F f) {
    if (shuffle_) std::shuffle(order_.begin(), order_.end(), random_);
    for (const int32_t thread : order_) f(thread);
  }

 private:
  std::vector<int32_t> order_;
  bool shuffle_;
  std::mt19937 random_;
};

template <class T>
void run(const KernelArgs& args, int32_t threads, uint32_t seed, bool split) {
  EmulatedBlock block(threads, seed);
  const int32_t step = split ? 1 : args.projections;
  for (int64_t token = 0; token < args.problem.tokens; ++token) {
    for (int32_t first = 0; first < args.projections; first += step) {
      // fresh memory of the exact size for every block, so that a sanitizer sees stale reads and overruns
      const std::unique_ptr<Complex[]> memory(new Complex[block_bytes(args) / sizeof(Complex)]);
      kernel::run_token<T>(block, args, memory.get(), token, first, first + step);
    }
  }
}

}  // namespace

Status emulated_run(const Plan& plan, const Problem& problem, int32_t threads, uint32_t seed, bool split) noexcept {
  const Status status = check_problem(plan.shape, problem);
  if (status != Status::kOk) return status;
  try {
    const KernelArgs args = kernel_args(plan, problem);
    switch (problem.type) {
      case DataType::kFloat32: run<float>(args, threads, seed, split); break;
      case DataType::kFloat16: run<Half>(args, threads, seed, split); break;
      case DataType::kBFloat16: run<BFloat16>(args, threads, seed, split); break;
    }
  } catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
  }
  return Status::kOk;
}

}  // namespace sdct
