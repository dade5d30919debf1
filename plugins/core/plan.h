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

constexpr int kMaxStages = 10;
constexpr int kTeamThreads = 64;    // of a token, at least
// Of a block, at most: 128 registers each; with direct sums or buffers in global memory they need up to 255.
constexpr int kBlockThreads = 512, kWideThreads = 256;
// Odd radices above 9 are direct sums, each thread those of kSums outputs and their mirrors; above kMaxSums they go through scratch
// memory, one butterfly after another.
constexpr int kSums = 9, kMaxSums = 127;

// i / d for i below 2^20 as the upper half of a product (Granlund and Montgomery, 1994). magic 0: d is 1.
struct Divisor {
  uint32_t magic;
  int32_t shift;
};
Divisor divisor(int32_t d);

struct Stage {
  int32_t radix, stride;
  int32_t twiddle;  // of [radix / 2][stride][2] in the table of twiddles: factors 2 i + 1 and 2 i + 2 of every q; of
                    // [radix - 1][stride] for odd radices above 9
  int32_t roots;    // of [(radix - 1) / 2][groups of kSums][kSums, even] there; of [radix] above kMaxSums
  Divisor by_stride;
};

// The real transform of length n, by Makhoul's permutation v = (x_0, x_2, ..., x_3, x_1) and
//   even n: a complex FFT of length m = n / 2 over z_i = v_2i + i v_2i+1
//   odd n:  a complex FFT of length m = n over v
// computed in place with decimation in frequency: bin k ends at position[k]. The inverse runs the same stages backwards.
// Coefficient c lies in the real part of bin c (c < m) or in the imaginary part of bin n - c.
//
// Element i of a buffer lies at i + i / stride_0 * (pitch - stride_0). The pitch is odd: threads that take the first digit fastest
// then meet no bank of shared memory twice, whatever the other strides are.
struct Transform {
  int32_t n, m;
  int32_t stages;
  int32_t pitch;    // of the first stage's stride
  int32_t buffer;   // complex elements of a working buffer
  int32_t scratch;  // complex elements of scratch for radices above kMaxSums
  int32_t direct;   // whether there are direct sums
  int32_t fused;    // kReads: the first stage reads x and adds to y itself; kSplits: the last one does what real input needs
  Divisor by_first;
  Stage stage[kMaxStages];
  // Tables: Complex twiddles and roots; at `split` for even n [m / 2 + 1][2] Complex A, B, for odd n [m] Complex phases; at
  // `place` [n] where a coefficient lies in a buffer seen as floats, uint16 if the buffer has less than 2^16 of them and int32 else.
  // A_k = exp(-i pi k / 2n) / sqrt(2n) is the phase and B_k = -i A_k exp(-2 i pi k / n).
  const unsigned char* tables;
  int32_t split, place;     // bytes from `tables`
  int32_t table_bytes;      // a multiple of 16
  int32_t shared_table;     // bytes from the block's tables to its copy of these, negative where it has none
};
constexpr int32_t kReads = 1, kSplits = 2;

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
  int32_t team_bytes;      // working memory of a token
  int32_t direct;          // whether a transform has direct sums
  Transform in;
  Transform out[kMaxProjections];
};

// Threads of a token in blocks of at most `most`: a butterfly of 16 elements for each, in as many turns as that asks for.
int32_t team_threads(const KernelArgs& args, int32_t most);

// Fills everything but the pointers of the transforms, which start as the host's.
KernelArgs kernel_args(const Plan& plan, const Problem& problem);

}  // namespace sdct

#endif  // SDCT_CORE_PLAN_H_
