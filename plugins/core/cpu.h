// What cpu.cpp (plans, dispatch) and cpu_path.cpp (the vector code, compiled once for each instruction set) share.
// No inline functions and nothing from the standard library but sizes: whatever cpu_path.cpp instantiates must never be
// picked by the linker for a machine without its instructions.
#ifndef SDCT_CORE_CPU_H_
#define SDCT_CORE_CPU_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "sdct/sdct.h"

namespace sdct {

constexpr int32_t kCpuStages = 16;
constexpr int32_t kWidest = 16;  // floats in the widest vector

// A complex FFT of `length` over strips of columns, decimation in frequency; bin k ends in row position[k].
struct CpuStages {
  int32_t length;
  int32_t stages;
  int32_t radix[kCpuStages];
  const float* twiddle[kCpuStages];  // [radix - 1][length of the stage / radix][2]
  const float* roots[kCpuStages];    // [radix][2]; radices above 8 only
  const int32_t* position;           // [length]
};

// The real transform of length n = 2m (or n = m, odd) by Makhoul's permutation; its complex FFT of length m = r1 * r2 in two
// steps, over columns and over rows of the [r1, r2] matrix. r2 is 1 or a multiple of kWidest.
struct CpuView {
  int32_t n, m, r1, r2;
  int32_t r1_padded;  // r1 rounded up to kWidest
  CpuStages first, second;
  const float *twiddle_re, *twiddle_im;  // [r1, r2] exp(-2 i pi k1 n2 / m)
  const float *phase_re, *phase_im;      // [m + 1] exp(-i pi k / 2n) / sqrt(2n)
  const float *omega_re, *omega_im;      // [m + 1] exp(-2 i pi k / n)
};

class CpuTransform {
 public:
  explicit CpuTransform(int32_t n);
  ~CpuTransform();
  CpuTransform(const CpuTransform&) = delete;
  CpuTransform& operator=(const CpuTransform&) = delete;
  const CpuView& view() const { return view_; }

 private:
  struct Storage;
  CpuView view_{};
  std::unique_ptr<Storage> storage_;
};

struct CpuArgs {
  const Problem* problem;
  int32_t projections;
  const int32_t* capacity;
  const int32_t* offset;  // [projections + 1]
  const CpuView* in;
  const CpuView* out[kMaxProjections];
  // a scratch area for one task, in floats; every part starts at a multiple of kWidest
  size_t z, t, spectrum, acc, local;
};

// One instruction set: `tokens` handles 1 .. width tokens of one row in the lanes of vectors, `single` one token along its length
// (every length with r2 > 1). Both do the same arithmetic in the same order, so a token's numbers do not depend on the choice.
struct CpuPath {
  const char* name;
  int32_t width;
  void (*tokens)(const CpuArgs& args, int64_t row, int64_t token, int32_t count, float* scratch);
  void (*single)(const CpuArgs& args, int64_t row, int64_t token, float* scratch);
};

const CpuPath& cpu_path_baseline();
#if defined(SDCT_X86)
const CpuPath& cpu_path_avx2();
const CpuPath& cpu_path_avx512();
#endif

}  // namespace sdct

#endif  // SDCT_CORE_CPU_H_
