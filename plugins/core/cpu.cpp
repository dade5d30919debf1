// Tables, work splitting and the choice of instruction set of the CPU path.
#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "factorise.h"
#include "plan.h"

#if defined(SDCT_X86)
#include <cpuid.h>
#endif

namespace sdct {
namespace {

constexpr double kPi = 3.14159265358979323846;

struct Unit {
  double re, im;
};
Unit unit(double numerator, double denominator) {
  const double angle = -2.0 * kPi * numerator / denominator;
  return {std::cos(angle), std::sin(angle)};
}

int32_t padded_to_widest(int32_t k) { return (k + kWidest - 1) / kWidest * kWidest; }
size_t padded_to_widest(size_t k) { return (k + kWidest - 1) / kWidest * kWidest; }

// The power of two for the second step: vectors along it need a multiple of kWidest; then as little padding as possible, then
// two steps of similar length. 1 where m has too few factors of two.
int32_t second_length(int32_t m) {
  int32_t best = 1;
  double best_cost = 0.0;
  for (int32_t r2 = kWidest; m >= 4 * kWidest && m % r2 == 0 && r2 <= 512; r2 *= 2) {
    const double r1 = m / r2, rows = double(padded_to_widest(m / r2)) * r2;
    const double cost = rows * (8.0 + std::abs(std::log2(r1 / r2)));
    if (best == 1 || cost < best_cost) best = r2, best_cost = cost;
  }
  return best;
}

}  // namespace

struct CpuTransform::Storage {
  std::vector<std::vector<float>> floats;
  std::vector<std::vector<int32_t>> positions;

  const float* keep(std::vector<float> table) {
    floats.push_back(std::move(table));
    return floats.back().data();
  }

  void fill(int32_t length, CpuStages* plan) {
    const std::vector<int32_t> radices = factorise(length);
    plan->length = length;
    plan->stages = int32_t(radices.size());
    for (int32_t s = 0, now = length; s < plan->stages; now /= radices[s], ++s) {
      const int32_t radix = plan->radix[s] = radices[s], stride = now / radix;
      std::vector<float> twiddle, roots;
      for (int32_t j = 1; j < radix; ++j) {
        for (int32_t q = 0; q < stride; ++q) {
          const Unit w = unit(double(j) * q, now);
          twiddle.insert(twiddle.end(), {float(w.re), float(w.im)});
        }
      }
      plan->twiddle[s] = keep(std::move(twiddle));
      if (radix > 8) {
        for (int32_t j = 0; j < radix; ++j) {
          const Unit w = unit(j, radix);
          roots.insert(roots.end(), {float(w.re), float(w.im)});
        }
        plan->roots[s] = keep(std::move(roots));
      }
    }
    std::vector<int32_t> position(length);
    for (int32_t k = 0; k < length; ++k) {
      int32_t rest = k, stride = length;
      for (const int32_t radix : radices) {
        stride /= radix;
        position[k] += rest % radix * stride;
        rest /= radix;
      }
    }
    positions.push_back(std::move(position));
    plan->position = positions.back().data();
  }
};

CpuTransform::CpuTransform(int32_t n) : storage_(new Storage) {
  CpuView& v = view_;
  v.n = n;
  v.m = n % 2 ? n : n / 2;
  v.r2 = n % 2 ? 1 : second_length(v.m);
  v.r1 = v.m / v.r2;
  v.r1_padded = padded_to_widest(v.r1);
  storage_->fill(v.r1, &v.first);
  storage_->fill(v.r2, &v.second);
  const auto table = [&](int32_t count, double scale, auto angle, const float** re, const float** im) {
    std::vector<float> a(count), b(count);
    for (int32_t k = 0; k < count; ++k) {
      const Unit w = angle(k);
      a[k] = float(w.re * scale), b[k] = float(w.im * scale);
    }
    *re = storage_->keep(std::move(a));
    *im = storage_->keep(std::move(b));
  };
  if (v.r2 > 1) {
    table(v.m, 1.0, [&](int32_t i) { return unit(double(i / v.r2) * (i % v.r2), v.m); }, &v.twiddle_re, &v.twiddle_im);
  }
  table(v.m + 1, 1.0 / std::sqrt(2.0 * n), [&](int32_t k) { return unit(k, 4.0 * n); }, &v.phase_re, &v.phase_im);
  if (n % 2 == 0) table(v.m + 1, 1.0, [&](int32_t k) { return unit(k, n); }, &v.omega_re, &v.omega_im);
}

CpuTransform::~CpuTransform() = default;

namespace {

#if defined(SDCT_X86)
// Conversion of half precision; not all compilers' __builtin_cpu_supports knows it.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

const CpuPath& choose_path() {
#if defined(SDCT_X86)
  // SDCT_CPU_ISA lowers the choice, for tests
  const char* wish = std::getenv("SDCT_CPU_ISA");
  const bool any = !wish || !*wish || !std::strcmp(wish, "avx512");
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && any) return cpu_path_avx512();
  if (avx2 && (any || !std::strcmp(wish, "avx2"))) return cpu_path_avx2();
#endif
  return cpu_path_baseline();
}

const CpuPath& path() {
  static const CpuPath& chosen = choose_path();
  return chosen;
}

// Working memory of a thread, kept between calls.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  float* get(size_t floats) {
    if (floats > size_) {
      std::free(memory_);
      memory_ = static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float)));
      size_ = memory_ ? floats : 0;
      // padding lanes are computed with; they must hold numbers
      if (memory_) std::memset(memory_, 0, floats * sizeof(float));
    }
    return memory_;
  }

 private:
  float* memory_ = nullptr;
  size_t size_ = 0;
};

enum class Kind : int32_t { kTokens, kSingle, kCopy };

struct Item {
  int64_t row, token, count;
  Kind kind;
};

size_t layout(bool in_lanes, CpuArgs* args) {
  const size_t lanes = in_lanes ? size_t(path().width) : 1;
  size_t z = 0, t = 0, acc = 0, rows = 0;
  const auto include = [&](const CpuView& v) {
    z = std::max(z, (v.m + size_t(kWidest)) * lanes);
    if (v.r2 > 1) t = std::max(t, size_t(v.r2) * v.r1_padded * lanes);
    int32_t radix = 0;
    for (const CpuStages* s : {&v.first, &v.second}) {
      for (int32_t i = 0; i < s->stages; ++i) radix = std::max(radix, s->radix[i]);
    }
    rows = std::max(rows, size_t(std::max(v.r1, v.r2)) + radix);
  };
  include(*args->in);
  for (int32_t j = 0; j < args->projections; ++j) {
    include(*args->out[j]);
    acc = std::max(acc, args->out[j]->n * lanes);
  }
  args->z = padded_to_widest(z);
  args->t = padded_to_widest(t);
  args->spectrum = padded_to_widest(args->in->n * lanes);
  args->acc = padded_to_widest(acc);
  args->local = padded_to_widest(rows * 2 * path().width);
  return 2 * args->z + 2 * args->t + args->spectrum + args->acc + args->local;
}

struct Work {
  const Problem* problem;
  const Shape* shape;
  CpuArgs tokens, single;
  size_t tokens_floats, single_floats;
  std::vector<Item> items;
  std::atomic<bool> out_of_memory{false};
};

void copy(const Work& work, const Item& item) {
  const Problem& p = *work.problem;
  const size_t element = element_bytes(p.type);
  for (int32_t j = 0; j < work.shape->projections; ++j) {
    if (p.y_in[j] == p.y_out[j]) continue;
    for (int64_t t = item.token; t < item.token + item.count; ++t) {
      std::memcpy(static_cast<char*>(p.y_out[j]) + t * p.y_out_stride[j] * element,
                  static_cast<const char*>(p.y_in[j]) + t * p.y_in_stride[j] * element, work.shape->d_out[j] * element);
    }
  }
}

void run_item(void* context, size_t index) {
  thread_local Scratch scratch;
  Work& work = *static_cast<Work*>(context);
  const Item& item = work.items[index];
  if (item.kind == Kind::kCopy) {
    copy(work, item);
    return;
  }
  float* memory = scratch.get(std::max(work.tokens_floats, work.single_floats));
  if (!memory) {
    work.out_of_memory = true;
  } else if (item.kind == Kind::kTokens) {
    path().tokens(work.tokens, item.row, item.token, int32_t(item.count), memory);
  } else {
    path().single(work.single, item.row, item.token, memory);
  }
}

// Beyond this length vectors of tokens leave the second-level cache, and one token at a time is faster.
constexpr int32_t kLongestInLanes = 2560;

// Cuts tokens first .. last - 1, all of one row, into items.
void add_items(const Problem& p, bool can_single, bool long_vectors, bool in_place, int64_t row, int64_t first, int64_t last,
               std::vector<Item>* items) {
  bool active = false;
  if (row >= 0 && row < p.rows) {
    for (int64_t k = 0; k < p.blends; ++k) {
      const int32_t id = p.ids[row * p.blends + k];
      active = active || (id > 0 && id < p.slots);
    }
  }
  if (!active) {
    constexpr int64_t kCopyAtOnce = 64;
    for (; !in_place && first < last; first += kCopyAtOnce) {
      items->push_back({row, first, std::min(kCopyAtOnce, last - first), Kind::kCopy});
    }
    return;
  }
  const int64_t width = path().width;
  while (first < last) {
    const int64_t count = std::min(width, last - first);
    if (can_single && (long_vectors || count < width / 2)) {
      items->push_back({row, first++, 1, Kind::kSingle});
    } else {
      items->push_back({row, first, count, Kind::kTokens});
      first += count;
    }
  }
}

}  // namespace

const char* cpu_isa() noexcept { return path().name; }

Status cpu_run(const Plan& plan, const Problem& problem, const Parallel* parallel) noexcept {
  const Status status = check_problem(plan.shape, problem);
  if (status != Status::kOk || problem.tokens == 0) return status;
  try {
    Work work{};
    work.problem = &problem;
    work.shape = &plan.shape;
    CpuArgs args{};
    args.problem = &problem;
    args.projections = plan.shape.projections;
    args.capacity = plan.shape.capacity;
    args.offset = plan.offset;
    args.in = &plan.cpu_in->view();
    bool can_single = args.in->r2 > 1, in_place = true;
    int32_t longest = args.in->n;
    for (int32_t j = 0; j < args.projections; ++j) {
      args.out[j] = &plan.cpu_out[j]->view();
      can_single = can_single && args.out[j]->r2 > 1;
      longest = std::max(longest, args.out[j]->n);
      in_place = in_place && problem.y_in[j] == problem.y_out[j];
    }
    if (problem.token_row) {
      for (int64_t first = 0, last; first < problem.tokens; first = last) {
        const int32_t row = problem.token_row[first];
        for (last = first + 1; last < problem.tokens && problem.token_row[last] == row;) ++last;
        add_items(problem, can_single, longest > kLongestInLanes, in_place, row, first, last, &work.items);
      }
    } else {
      const int64_t each = problem.tokens / problem.rows;
      for (int64_t row = 0; row < problem.rows; ++row) {
        add_items(problem, can_single, longest > kLongestInLanes, in_place, row, row * each, (row + 1) * each, &work.items);
      }
    }
    if (work.items.empty()) return Status::kOk;
    work.tokens = work.single = args;
    work.tokens_floats = layout(true, &work.tokens);
    work.single_floats = can_single ? layout(false, &work.single) : 0;
    if (parallel && parallel->threads > 1 && work.items.size() > 1) {
      parallel->run(parallel->pool, work.items.size(), run_item, &work);
    } else {
      for (size_t i = 0; i < work.items.size(); ++i) run_item(&work, i);
    }
    return work.out_of_memory ? Status::kOutOfMemory : Status::kOk;
  } catch (...) {
    return Status::kOutOfMemory;
  }
}

}  // namespace sdct
