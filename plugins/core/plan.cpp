#include "plan.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <new>

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

Tables::Tables(int32_t n) {
  Transform& t = transform_;
  t.n = n;
  t.m = n % 2 ? n : n / 2;
  t.buffer = padded(t.m - 1) + 1;
  const std::vector<int32_t> radices = factorise(t.m);
  t.stages = int32_t(radices.size());

  std::vector<Complex> twiddle;
  int32_t length = t.m;
  for (int32_t s = 0; s < t.stages; ++s) {
    const int32_t radix = radices[s], stride = length / radix;
    t.radix[s] = radix;
    t.twiddle_offset[s] = int32_t(twiddle.size());
    for (int32_t j = 1; j < radix; ++j) {
      for (int32_t q = 0; q < stride; ++q) twiddle.push_back(unit(double(j) * q, length));
    }
    if (radix > kMaxRegisterRadix) {
      t.root_offset[s] = int32_t(twiddle.size());
      for (int32_t j = 0; j < radix; ++j) twiddle.push_back(unit(j, radix));
      // enough butterflies at once to keep a block busy
      const int32_t pairs = (radix + 1) / 2, butterflies = t.m / radix;
      const int32_t at_once = std::max((512 / pairs + 7) / 8 * 8, 1);
      t.scratch = std::max(t.scratch, radix * std::min(butterflies, at_once));
    }
    length = stride;
  }
  phase_offset_ = aligned(twiddle.size() * sizeof(Complex));
  omega_offset_ = phase_offset_ + aligned((t.m + 1) * sizeof(Complex));
  position_offset_ = omega_offset_ + (n % 2 ? 0 : aligned((t.m + 1) * sizeof(Complex)));
  blob_.resize(position_offset_ + aligned((t.m + 1) * sizeof(int32_t)));

  std::copy(twiddle.begin(), twiddle.end(), reinterpret_cast<Complex*>(blob_.data()));
  auto* phase = reinterpret_cast<Complex*>(blob_.data() + phase_offset_);
  auto* omega = reinterpret_cast<Complex*>(blob_.data() + omega_offset_);
  auto* position = reinterpret_cast<int32_t*>(blob_.data() + position_offset_);
  for (int32_t k = 0; k <= t.m; ++k) {
    phase[k] = unit(k, 4.0 * n, 1.0 / std::sqrt(2.0 * n));
    if (n % 2 == 0) omega[k] = unit(k, n);
    int32_t rest = k % t.m, place = 0, stride = t.m;
    for (int32_t s = 0; s < t.stages; ++s) {
      stride /= t.radix[s];
      place += rest % t.radix[s] * stride;
      rest /= t.radix[s];
    }
    position[k] = padded(place);
  }
}

Transform Tables::view(const void* base) const {
  Transform t = transform_;
  const auto* bytes = static_cast<const unsigned char*>(base);
  t.twiddle = reinterpret_cast<const Complex*>(bytes);
  t.phase = reinterpret_cast<const Complex*>(bytes + phase_offset_);
  t.omega = reinterpret_cast<const Complex*>(bytes + omega_offset_);
  t.position = reinterpret_cast<const int32_t*>(bytes + position_offset_);
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
  args.scratch = std::max(args.in.scratch, std::min(args.entries, kEntriesAtOnce));
  for (int32_t j = 0; j < args.projections; ++j) {
    args.capacity[j] = plan.shape.capacity[j];
    args.offset[j] = plan.offset[j];
    args.out[j] = plan.out[j]->view(plan.out[j]->blob().data());
    args.acc_buffer = std::max(args.acc_buffer, args.out[j].buffer);
    args.scratch = std::max(args.scratch, args.out[j].scratch);
  }
  return args;
}

size_t block_bytes(const KernelArgs& args) {
  return (size_t(args.in.buffer) + args.acc_buffer + args.scratch) * sizeof(Complex);
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
