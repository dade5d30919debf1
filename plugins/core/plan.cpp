#include "plan.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>

#include "cpu.h"
#include "factorise.h"

namespace sdct {
namespace {

constexpr double kPi = 3.14159265358979323846;

Complex unit(double numerator, double denominator, double scale = 1.0) {
  const double angle = -2.0 * kPi * numerator / denominator;
  return {float(std::cos(angle) * scale), float(std::sin(angle) * scale)};
}

size_t aligned(size_t bytes) { return (bytes + 15) / 16 * 16; }

// One object per length for as long as somebody holds it.
template <class T>
std::shared_ptr<const T> shared_table(int32_t n) {
  static std::mutex mutex;
  static auto* cache = new std::map<int32_t, std::weak_ptr<const T>>;  // outlives every static destructor
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<const T> table = (*cache)[n].lock();
  if (!table) {
    table = std::make_shared<const T>(n);
    (*cache)[n] = table;
  }
  return table;
}

bool stride_ok(int64_t stride, int32_t length, int64_t tokens) {
  return stride >= length && (tokens <= 1 || stride <= INT64_MAX / 8 / tokens);
}

}  // namespace

// Large primes first: their strides are long, so that neighbouring threads touch neighbouring elements.
std::vector<int32_t> factorise(int32_t m) {
  std::vector<int32_t> radices;
  int32_t twos = 0;
  while (m % 2 == 0) m /= 2, ++twos;
  for (int32_t p = 3; m > 1; p += 2) {
    if (int64_t(p) * p > m) p = m;
    while (m % p == 0) radices.push_back(p), m /= p;
  }
  std::sort(radices.rbegin(), radices.rend());
  for (; twos >= 3 && twos != 4; twos -= 3) radices.push_back(8);
  for (; twos >= 2; twos -= 2) radices.push_back(4);
  if (twos) radices.push_back(2);
  return radices;
}

Divisor divisor(int32_t d) {
  if (d == 1) return {0, 0};
  int32_t bits = 1;
  while (int64_t(1) << bits < d) ++bits;
  const uint64_t magic = (uint64_t(1) << (20 + bits)) / uint64_t(d) + 1;
  return {uint32_t(bits <= 12 ? magic << (12 - bits) : magic), bits <= 12 ? 0 : bits - 12};
}

namespace {

// Radices of the GPU's transform: 16 first where it can read quads of x, odd ones next, a power of two last, as few as there can be.
std::vector<int32_t> stage_radices(int32_t m, bool even) {
  std::vector<int32_t> radices, odd;
  int32_t rest = m, twos = 0;
  while (rest % 2 == 0) rest /= 2, ++twos;
  for (; rest % 9 == 0; rest /= 9) odd.push_back(9);
  for (const int32_t radix : factorise(rest)) odd.push_back(radix);
  std::sort(odd.rbegin(), odd.rend());
  if (even && twos >= 4 && m > 16) radices.push_back(16), twos -= 4;
  radices.insert(radices.end(), odd.begin(), odd.end());
  for (int32_t left = (twos + 3) / 4; left > 0; --left) {  // the larger ones before the last
    const int32_t bits = (twos + left - 1) / left;
    radices.push_back(1 << bits);
    twos -= bits;
  }
  return radices;
}

}  // namespace

Tables::Tables(int32_t n) {
  Transform& t = transform_;
  const bool even = n % 2 == 0;
  t.n = n;
  t.m = even ? n / 2 : n;
  const std::vector<int32_t> radices = stage_radices(t.m, even);
  t.stages = int32_t(radices.size());
  if (t.stages > kMaxStages) throw std::length_error("more stages than expected");
  const int32_t first = t.stages ? t.m / radices[0] : 1;  // stride of the first stage
  t.pitch = first | 1;
  t.buffer = t.m / first * t.pitch;
  t.by_first = divisor(t.m / first);
  if (t.stages > 1 && even) {
    const int32_t last = radices.back();
    t.fused = (radices[0] == 16 && n % 32 == 0 ? kReads : 0) | (last <= 16 && last % 2 == 0 ? kSplits : 0);
  }

  std::vector<Complex> twiddle;
  int32_t length = t.m;
  for (int32_t s = 0; s < t.stages; ++s) {
    const int32_t radix = radices[s], stride = length / radix;
    Stage& stage = t.stage[s];
    stage.radix = radix;
    stage.stride = stride;
    stage.by_stride = divisor(stride);
    stage.twiddle = int32_t(twiddle.size());
    const bool direct = radix % 2 && radix > 9;
    t.direct = t.direct || direct;
    for (int32_t j = 1; j < radix && stride > 1; j += direct ? 1 : 2) {
      for (int32_t q = 0; q < stride; ++q) {
        twiddle.push_back(unit(double(j) * q, length));
        if (!direct) twiddle.push_back(unit(double(j + 1) * q, length));
      }
    }
    stage.roots = int32_t(twiddle.size());
    if (radix > kMaxSums) {
      for (int32_t j = 0; j <= radix; ++j) twiddle.push_back(unit(j, radix));  // an even number of them
      t.scratch = std::max(t.scratch, radix);
    } else if (direct) {
      const int32_t groups = ((radix - 1) / 2 + kSums - 1) / kSums;
      for (int64_t j = 1; j <= (radix - 1) / 2; ++j) {
        for (int64_t g = 0; g < groups; ++g) {
          for (int64_t k = 1; k <= (kSums + 1) / 2 * 2; ++k) twiddle.push_back(unit(double(j * (g * kSums + k) % radix), radix));
        }
      }
    }
    length = stride;
  }
  t.split = int32_t(aligned(twiddle.size() * sizeof(Complex)));
  t.place = t.split + int32_t(aligned(size_t(even ? (t.m / 2 + 1) * 2 : t.m) * sizeof(Complex)));
  const bool wide = 2 * t.buffer > UINT16_MAX;
  t.table_bytes = t.place + int32_t(aligned(size_t(n) * (wide ? sizeof(int32_t) : sizeof(uint16_t))));
  blob_.resize(size_t(t.table_bytes));

  std::copy(twiddle.begin(), twiddle.end(), reinterpret_cast<Complex*>(blob_.data()));
  auto* split = reinterpret_cast<Complex*>(blob_.data() + t.split);
  for (int32_t k = 0; k < (even ? t.m / 2 + 1 : t.m); ++k) {
    const double scale = 1.0 / std::sqrt(2.0 * n);
    const Complex phase = unit(k, 4.0 * n, scale);
    if (even) {
      split[2 * k] = phase;
      const Complex turned = unit(5.0 * k, 4.0 * n, scale);  // phase x exp(-2 i pi k / n)
      split[2 * k + 1] = {turned.im, -turned.re};
    } else {
      split[k] = phase;
    }
  }
  for (int32_t c = 0; c < n; ++c) {
    int32_t rest = (c < t.m ? c : n - c) % t.m, place = 0;
    for (int32_t s = 0; s < t.stages; ++s) {
      place += rest % radices[s] * (s ? t.stage[s].stride : t.pitch);
      rest /= radices[s];
    }
    place = 2 * place + (c >= t.m);
    if (wide) {
      reinterpret_cast<int32_t*>(blob_.data() + t.place)[c] = place;
    } else {
      reinterpret_cast<uint16_t*>(blob_.data() + t.place)[c] = uint16_t(place);
    }
  }
}

Transform Tables::view(const void* base) const {
  Transform t = transform_;
  t.tables = static_cast<const unsigned char*>(base);
  return t;
}

Plan::Plan(const Shape& s) : shape(s) {
  in = shared_table<Tables>(s.d_in);
  cpu_in = shared_table<CpuTransform>(s.d_in);
  for (int32_t j = 0; j < s.projections; ++j) {
    out[j] = shared_table<Tables>(s.d_out[j]);
    cpu_out[j] = shared_table<CpuTransform>(s.d_out[j]);
    offset[j + 1] = offset[j] + s.capacity[j];
  }
}

Plan::~Plan() = default;

KernelArgs kernel_args(const Plan& plan, const Problem& problem) {
  KernelArgs args{};
  args.problem = problem;
  args.projections = plan.shape.projections;
  args.entries = plan.offset[plan.shape.projections];
  args.tokens_per_row = problem.rows > 0 ? std::max<int64_t>(problem.tokens / problem.rows, 1) : 1;
  args.in = plan.in->view(plan.in->blob().data());
  int32_t scratch = args.in.scratch;
  args.direct = args.in.direct;
  for (int32_t j = 0; j < args.projections; ++j) {
    args.capacity[j] = plan.shape.capacity[j];
    args.offset[j] = plan.offset[j];
    args.out[j] = plan.out[j]->view(plan.out[j]->blob().data());
    args.acc_buffer = std::max(args.acc_buffer, args.out[j].buffer);
    scratch = std::max(scratch, args.out[j].scratch);
    args.direct = args.direct || args.out[j].direct;
  }
  const auto even = [](int32_t i) { return i + i % 2; };  // 16 bytes
  args.acc_buffer = even(args.acc_buffer);
  args.team_bytes = int32_t(sizeof(Complex)) * (even(args.in.buffer) + args.acc_buffer + even(scratch));
  return args;
}

int32_t team_threads(const KernelArgs& args, int32_t most) {
  int32_t longest = args.in.m;
  for (int32_t j = 0; j < args.projections; ++j) longest = std::max(longest, args.out[j].m);
  const int32_t butterflies = (longest + 15) / 16, turns = (butterflies + most - 1) / most;
  return std::max(kTeamThreads, ((butterflies + turns - 1) / turns + 31) / 32 * 32);
}

const char* status_text(Status status) noexcept {
  switch (status) {
    case Status::kOk: return "ok";
    case Status::kBadShape:
      return "bad group: 1 to 8 projections, lengths from 1 to 1048576 and capacities from 0 with a sum below 2^28 are needed";
    case Status::kBadProblem: return "bad arguments: a null pointer, a size or a stride does not fit the group";
    case Status::kWorkspace: return "the device workspace is missing, too small or not aligned to 16 bytes";
    case Status::kUnavailable: return "this library was built without CUDA";
    case Status::kOutOfMemory: return "out of memory";
    case Status::kCuda: return "a CUDA call failed";
  }
  return "unknown status";
}

size_t element_bytes(DataType type) noexcept { return type == DataType::kFloat32 ? 4 : 2; }

void set_dense_strides(const Shape& shape, Problem* problem) noexcept {
  problem->x_stride = shape.d_in;
  for (int32_t j = 0; j < shape.projections && j < kMaxProjections; ++j) {
    problem->y_in_stride[j] = problem->y_out_stride[j] = shape.d_out[j];
  }
}

Status check_problem(const Shape& shape, const Problem& p) noexcept {
  if (p.type != DataType::kFloat32 && p.type != DataType::kFloat16 && p.type != DataType::kBFloat16) {
    return Status::kBadProblem;
  }
  constexpr int64_t kMany = int64_t(1) << 40;
  if (p.rows < 0 || p.blends < 0 || p.slots < 1 || p.tokens < 0 || p.rows > kMany || p.blends > (1 << 20) ||
      p.slots > kMany || p.tokens > kMany) {
    return Status::kBadProblem;
  }
  if (p.tokens == 0) return Status::kOk;
  if (!p.token_row && (p.rows == 0 || p.tokens % p.rows != 0)) return Status::kBadProblem;
  if (!p.x || !stride_ok(p.x_stride, shape.d_in, p.tokens)) return Status::kBadProblem;
  if (p.rows > 0 && p.blends > 0 && (!p.ids || !p.scales)) return Status::kBadProblem;
  int64_t entries = 0;
  for (int32_t j = 0; j < shape.projections; ++j) {
    entries += shape.capacity[j];
    if (!p.y_in[j] || !p.y_out[j] || !stride_ok(p.y_in_stride[j], shape.d_out[j], p.tokens) ||
        !stride_ok(p.y_out_stride[j], shape.d_out[j], p.tokens)) {
      return Status::kBadProblem;
    }
    if (p.y_in[j] == p.y_out[j] && p.y_in_stride[j] != p.y_out_stride[j]) return Status::kBadProblem;
  }
  if (entries > 0 && (!p.values || !p.indices || p.slots > INT64_MAX / 8 / entries)) return Status::kBadProblem;
  return Status::kOk;
}

Status create_plan(const Shape& shape, Plan** plan) noexcept {
  if (!plan) return Status::kBadShape;
  *plan = nullptr;
  const auto length_ok = [](int32_t n) { return n >= 1 && n <= kMaxLength; };
  if (shape.projections < 1 || shape.projections > kMaxProjections || !length_ok(shape.d_in)) return Status::kBadShape;
  int64_t entries = 0;
  for (int32_t j = 0; j < shape.projections; ++j) {
    if (!length_ok(shape.d_out[j]) || shape.capacity[j] < 0) return Status::kBadShape;
    entries += shape.capacity[j];
  }
  if (entries >= (1 << 28)) return Status::kBadShape;
  try {
    *plan = new Plan(shape);
  } catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
  } catch (...) {
    return Status::kBadShape;
  }
  return Status::kOk;
}

void destroy_plan(Plan* plan) noexcept { delete plan; }

const Shape& plan_shape(const Plan& plan) noexcept { return plan.shape; }

}  // namespace sdct
