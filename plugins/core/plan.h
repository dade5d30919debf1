// What a transform of one length needs, and the plan of a node.
#ifndef SDCT_CORE_PLAN_H_
#define SDCT_CORE_PLAN_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "numerics.h"
#include "sdct/sdct.h"

namespace sdct {

constexpr int kMaxStages = 16;
constexpr int kMaxRegisterRadix = 8;  // larger (prime) radices run as direct sums through scratch memory

// The real transform of length n, by Makhoul's permutation v = (x_0, x_2, ..., x_3, x_1) and
//   even n: a complex FFT of length m = n / 2 over z_i = v_2i + i v_2i+1
//   odd n:  a complex FFT of length m = n over v
// computed in place with decimation in frequency: bin k ends at position[k]. The inverse runs the same stages backwards.
// Coefficient c lies in the real part of bin c (c < m) or in the imaginary part of bin n - c.
// A view: the pointers lead into tables on the host or on a device.
struct Transform {
  int32_t n, m;
  int32_t stages;
  int32_t buffer;   // complex elements of a working buffer, gaps against bank conflicts included
  int32_t scratch;  // complex elements of scratch for radices above kMaxRegisterRadix
  int32_t radix[kMaxStages];
  int32_t twiddle_offset[kMaxStages];  // of a stage's [radix - 1][stride] in twiddle
  int32_t root_offset[kMaxStages];     // of a stage's [radix] in twiddle; radices above kMaxRegisterRadix only
  const Complex* twiddle;
  const Complex* phase;     // [m + 1] exp(-i pi k / 2n) / sqrt(2n)
  const Complex* omega;     // [m + 1] exp(-2 i pi k / n); even n
  const int32_t* position;  // [m + 1], padded; position[m] = position[0]
};

// A complex index with one gap every 16 elements, so that strided accesses spread over the banks of shared memory.
SDCT_HOST_DEVICE int32_t padded(int32_t i) { return i + (i >> 4); }

// Host tables of one length.
class Tables {
 public:
  explicit Tables(int32_t n);
  // The transform over tables at `base`, a copy of blob().
  Transform view(const void* base) const;
  const std::vector<unsigned char>& blob() const { return blob_; }
  int32_t length() const { return transform_.n; }

 private:
  Transform transform_{};
  size_t phase_offset_ = 0, omega_offset_ = 0, position_offset_ = 0;
  std::vector<unsigned char> blob_;
};

class CpuTransform;  // cpu.h

class Plan {
 public:
  explicit Plan(const Shape& shape);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  Shape shape;
  int32_t offset[kMaxProjections + 1] = {};  // first bank column of a projection; the last one is n
  std::shared_ptr<const Tables> in;
  std::shared_ptr<const Tables> out[kMaxProjections];
  std::shared_ptr<const CpuTransform> cpu_in;
  std::shared_ptr<const CpuTransform> cpu_out[kMaxProjections];
};

// What the kernel gets, by value.
struct KernelArgs {
  Problem problem;
  int32_t projections;
  int32_t capacity[kMaxProjections];
  int32_t offset[kMaxProjections];
  int32_t entries;         // n, all capacities
  int64_t tokens_per_row;  // where token_row is null
  int32_t acc_buffer;      // complex elements of the largest output buffer
  int32_t scratch;         // complex elements of scratch
  Transform in;
  Transform out[kMaxProjections];
};

constexpr int32_t kEntriesAtOnce = 1024;  // bank entries staged in scratch, one Complex-sized place each

// Fills everything but the pointers of the transforms, which start as the host's.
KernelArgs kernel_args(const Plan& plan, const Problem& problem);

// Bytes of on-chip (or workspace) memory of one block.
size_t block_bytes(const KernelArgs& args);

}  // namespace sdct

#endif  // SDCT_CORE_PLAN_H_
