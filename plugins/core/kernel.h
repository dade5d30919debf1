// The kernel: a token after another through the transforms and the sparse part.
//
// A team of threads works on a token; a block has one team or several, which share its tables and nothing else. Between two
// barriers of a team no thread reads what another one writes, but for lanes of a warp around __syncwarp().
//
// x -> DCT -> gather, multiply, scatter -> IDCT -> y, the transforms as in plan.h. The first stage of the forward transform reads
// quads of x, and the last one of the inverse adds to quads of y: quad i holds element i and element m - 1 - i of the complex
// vector, so that lanes l and 31 - l of a warp, which have butterflies q and S - 1 - q, exchange halves. The last stage of the
// forward one separates the spectra of real and imaginary parts, for which bin k needs bin m - k: args lanes l and 31 - l.
#ifndef SDCT_CORE_KERNEL_H_
#define SDCT_CORE_KERNEL_H_

#include "plan.h"

#define SDCT_DEVICE __device__ __forceinline__
#define SDCT_UNROLL _Pragma("unroll")

namespace sdct {
namespace kernel {

constexpr uint32_t kAll = 0xffffffffu;
constexpr float kRoot2 = 1.41421356237309505f, kHalfRoot2 = 0.707106781186547524f;

// The threads that work on a token: a row of the block's threads, whole warps.
struct Team {
  int32_t thread = int32_t(threadIdx.x);
  SDCT_DEVICE int32_t threads() const { return int32_t(blockDim.x); }
  SDCT_DEVICE int32_t lane() const { return thread & 31; }
  SDCT_DEVICE int32_t warp() const { return thread >> 5; }
  SDCT_DEVICE int32_t warps() const { return threads() >> 5; }
  // Barrier 0 is __syncthreads().
  SDCT_DEVICE void sync() const { asm volatile("bar.sync %0, %1;" ::"r"(threadIdx.y + 1), "r"(blockDim.x) : "memory"); }
};

SDCT_DEVICE int32_t divide(int32_t i, Divisor d) { return d.magic ? int32_t(__umulhi(uint32_t(i), d.magic) >> d.shift) : i; }

struct alignas(16) Two {
  Complex at[2];
};

// A transform with its tables where the block reads them, in shared or in global memory.
struct View {
  const Transform& t;
  const unsigned char* tables;
  SDCT_DEVICE const Complex* complex(int32_t offset) const { return reinterpret_cast<const Complex*>(tables) + offset; }
  SDCT_DEVICE const Two* split() const { return reinterpret_cast<const Two*>(tables + t.split); }
  SDCT_DEVICE const Complex* phases() const { return reinterpret_cast<const Complex*>(tables + t.split); }
  // Where coefficient c lies in a buffer seen as floats.
  template <bool kShared>
  SDCT_DEVICE int32_t place(int32_t c) const {
    if (kShared || 2 * t.buffer <= UINT16_MAX) return reinterpret_cast<const uint16_t*>(tables + t.place)[c];
    return reinterpret_cast<const int32_t*>(tables + t.place)[c];
  }
  // Where bin k < m lies in a buffer.
  template <bool kShared>
  SDCT_DEVICE int32_t position(int32_t k) const {
    return place<kShared>(k) >> 1;
  }
};

// --- discrete Fourier transforms in registers, exp(-2 i pi j k / R) ----------------------------------------------------------

template <int R>
struct OddRoots;  // cos and sin of 2 pi j / R, j = 0 .. (R - 1) / 2
template <>
struct OddRoots<3> {
  float cosine[2] = {1.0f, -0.5f};
  float sine[2] = {0.0f, 0.866025403784438647f};
};
template <>
struct OddRoots<5> {
  float cosine[3] = {1.0f, 0.309016994374947424f, -0.809016994374947424f};
  float sine[3] = {0.0f, 0.951056516295153572f, 0.587785252292473129f};
};
template <>
struct OddRoots<7> {
  float cosine[4] = {1.0f, 0.623489801858733531f, -0.222520933956314404f, -0.900968867902419126f};
  float sine[4] = {0.0f, 0.781831482468029809f, 0.974927912181823607f, 0.433883739117558120f};
};
template <>
struct OddRoots<9> {
  float cosine[5] = {1.0f, 0.766044443118978035f, 0.173648177666930349f, -0.5f, -0.939692620785908384f};
  float sine[5] = {0.0f, 0.642787609686539326f, 0.984807753012208059f, 0.866025403784438647f, 0.342020143325668733f};
};

template <int R>
SDCT_DEVICE void dft(Complex (&u)[R]) {  // odd R
  constexpr int kHalf = (R - 1) / 2;
  const OddRoots<R> roots{};
  Complex sum[kHalf], difference[kHalf], out[R];
  out[0] = u[0];
  SDCT_UNROLL
  for (int j = 0; j < kHalf; ++j) {
    sum[j] = u[j + 1] + u[R - 1 - j];
    difference[j] = u[j + 1] - u[R - 1 - j];
    out[0] = out[0] + sum[j];
  }
  SDCT_UNROLL
  for (int k = 1; k <= kHalf; ++k) {
    Complex a = u[0], b = {0.0f, 0.0f};
    SDCT_UNROLL
    for (int j = 1; j <= kHalf; ++j) {
      const int angle = j * k % R;
      const float c = roots.cosine[angle <= kHalf ? angle : R - angle];
      const float s = angle <= kHalf ? roots.sine[angle] : -roots.sine[R - angle];
      a = {a.re + c * sum[j - 1].re, a.im + c * sum[j - 1].im};
      b = {b.re + s * difference[j - 1].re, b.im + s * difference[j - 1].im};
    }
    out[k] = a - times_i(b);
    out[R - k] = a + times_i(b);
  }
  SDCT_UNROLL
  for (int j = 0; j < R; ++j) u[j] = out[j];
}

template <>
SDCT_DEVICE void dft<2>(Complex (&u)[2]) {
  const Complex a = u[0], b = u[1];
  u[0] = a + b;
  u[1] = a - b;
}

template <>
SDCT_DEVICE void dft<4>(Complex (&u)[4]) {
  const Complex a = u[0] + u[2], b = u[0] - u[2], c = u[1] + u[3], d = times_i(u[1] - u[3]);
  u[0] = a + c;
  u[1] = b - d;
  u[2] = a - c;
  u[3] = b + d;
}

template <>
SDCT_DEVICE void dft<8>(Complex (&u)[8]) {
  Complex even[4] = {u[0], u[2], u[4], u[6]}, odd[4] = {u[1], u[3], u[5], u[7]};
  dft<4>(even);
  dft<4>(odd);
  odd[1] = {kHalfRoot2 * (odd[1].re + odd[1].im), kHalfRoot2 * (odd[1].im - odd[1].re)};   // exp(-i pi / 4)
  odd[2] = {odd[2].im, -odd[2].re};                                                        // -i
  odd[3] = {kHalfRoot2 * (odd[3].im - odd[3].re), -kHalfRoot2 * (odd[3].re + odd[3].im)};  // exp(-3 i pi / 4)
  SDCT_UNROLL
  for (int j = 0; j < 4; ++j) {
    u[j] = even[j] + odd[j];
    u[j + 4] = even[j] - odd[j];
  }
}

template <>
SDCT_DEVICE void dft<16>(Complex (&u)[16]) {  // 4 x 4
  constexpr float kCosine = 0.923879532511286756f, kSine = 0.382683432365089772f;  // of pi / 8
  Complex v[4][4];
  SDCT_UNROLL
  for (int a = 0; a < 4; ++a) {
    Complex w[4] = {u[a], u[a + 4], u[a + 8], u[a + 12]};
    dft<4>(w);
    SDCT_UNROLL
    for (int k = 0; k < 4; ++k) {
      switch (a * k) {  // exp(-i pi a k / 8)
        case 0: v[k][a] = w[k]; break;
        case 1: v[k][a] = w[k] * Complex{kCosine, -kSine}; break;
        case 2: v[k][a] = {kHalfRoot2 * (w[k].re + w[k].im), kHalfRoot2 * (w[k].im - w[k].re)}; break;
        case 3: v[k][a] = w[k] * Complex{kSine, -kCosine}; break;
        case 4: v[k][a] = {w[k].im, -w[k].re}; break;
        case 6: v[k][a] = {kHalfRoot2 * (w[k].im - w[k].re), -kHalfRoot2 * (w[k].re + w[k].im)}; break;
        default: v[k][a] = w[k] * Complex{-kCosine, kSine};  // 9
      }
    }
  }
  SDCT_UNROLL
  for (int k = 0; k < 4; ++k) {
    dft<4>(v[k]);
    SDCT_UNROLL
    for (int l = 0; l < 4; ++l) u[k + 4 * l] = v[k][l];
  }
}

// The inverse transform is the forward one between exchanges of real and imaginary parts, and its stages those in reverse order: it
// works on exchanged numbers from its first stage to its last one.
SDCT_DEVICE Complex exchanged(Complex z) { return {z.im, z.re}; }

// Elements 1 .. R - 1 times their twiddles.
template <int R>
SDCT_DEVICE void twiddle(Complex (&u)[R], const Complex* table, int32_t stride, int32_t q) {
  const Two* pairs = reinterpret_cast<const Two*>(table) + q;
  SDCT_UNROLL
  for (int j = 1; j < R; j += 2) {
    const Two pair = *pairs;
    pairs += stride;
    u[j] = u[j] * pair.at[0];
    if (j + 1 < R) u[j + 1] = u[j + 1] * pair.at[1];
  }
}

// --- stages ------------------------------------------------------------------------------------------------------------------

// Where butterfly i of a stage starts. Of stages after the first the first digit is taken fastest, see `pitch`.
struct Butterfly {
  int32_t first, step, q;
};
SDCT_DEVICE Butterfly butterfly_of(const Transform& t, int32_t s, int32_t i) {
  if (s == 0) return {i, t.pitch, i};
  const Stage& stage = t.stage[s];
  const int32_t radix = t.stage[0].radix, rest = divide(i, t.by_first), digit = i - rest * radix;
  const int32_t sub = divide(rest, stage.by_stride), q = rest - sub * stage.stride;
  return {digit * t.pitch + sub * stage.stride * stage.radix + q, stage.stride, q};
}

// One stage of radix R over every sub-transform: butterfly, then twiddles, or first the twiddles (inverse). A
// barrier follows.
template <int R, bool kInverse>
SDCT_DEVICE void register_stage(const Team& team, const View& view, int32_t s, Complex* buffer) {
  const Transform& t = view.t;
  const Stage& stage = t.stage[s];
  const Complex* table = view.complex(stage.twiddle);
  const int32_t count = t.m / R;
  for (int32_t i = team.thread; i < count; i += team.threads()) {
    const Butterfly b = butterfly_of(t, s, i);
    Complex* const at = buffer + b.first;
    Complex u[R];
    SDCT_UNROLL
    for (int j = 0; j < R; ++j) u[j] = at[j * b.step];
    if (kInverse && stage.stride > 1) twiddle(u, table, stage.stride, b.q);
    dft(u);
    if (!kInverse && stage.stride > 1) twiddle(u, table, stage.stride, b.q);
    SDCT_UNROLL
    for (int j = 0; j < R; ++j) at[j * b.step] = u[j];
  }
  team.sync();
}

// Radices up to kMaxSums as direct sums in registers: a thread has kSums outputs of a butterfly and their mirrors.
template <bool kInverse>
SDCT_DEVICE void direct_stage(const Team& team, const View& view, int32_t s, Complex* buffer) {
  constexpr int K = kSums, kEven = (K + 1) / 2 * 2;
  const Transform& t = view.t;
  const Stage& stage = t.stage[s];
  const int32_t radix = stage.radix, half = (radix - 1) / 2, count = t.m / radix, groups = (half + K - 1) / K;
  const int32_t together = team.threads() / groups, group = team.thread / together, local = team.thread - group * together;
  const bool turns = stage.stride > 1;
  for (int32_t begin = 0; begin < count; begin += together) {
    const bool works = group < groups && begin + local < count;
    Complex a[K], d[K], sum = {0.0f, 0.0f};
    if (works) {
      const Butterfly b = butterfly_of(t, s, begin + local);
      const Complex* x = buffer + b.first;
      const Complex* y = x + radix * b.step;
      const Complex* twiddle_y = view.complex(stage.twiddle) + b.q + (radix - 1) * stage.stride;  // after the last one
      const Complex* twiddle_x = twiddle_y - radix * stage.stride;                               // before the first one
      const Two* roots = reinterpret_cast<const Two*>(view.complex(stage.roots)) + group * (kEven / 2);
      sum = *x;
      SDCT_UNROLL
      for (int k = 0; k < K; ++k) a[k] = sum, d[k] = {0.0f, 0.0f};
      _Pragma("unroll 1")
      for (int32_t j = 1; j <= half; ++j) {
        x += b.step, y -= b.step;
        Complex u = *x, v = *y;
        if (kInverse && turns) {
          twiddle_x += stage.stride, twiddle_y -= stage.stride;
          u = u * *twiddle_x;
          v = v * *twiddle_y;
        }
        const Complex plus = u + v, minus = u - v;
        sum = sum + plus;
        SDCT_UNROLL
        for (int k = 0; k < K; k += 2) {
          const Two root = roots[k / 2];  // cosine and negative sine
          SDCT_UNROLL
          for (int i = 0; i < 2; ++i) {
            if (k + i == K) break;
            a[k + i] = {__fmaf_rn(root.at[i].re, plus.re, a[k + i].re), __fmaf_rn(root.at[i].re, plus.im, a[k + i].im)};
            d[k + i] = {__fmaf_rn(root.at[i].im, minus.re, d[k + i].re), __fmaf_rn(root.at[i].im, minus.im, d[k + i].im)};
          }
        }
        roots += groups * (kEven / 2);
      }
    }
    team.sync();
    if (works) {
      const Butterfly b = butterfly_of(t, s, begin + local);
      const int32_t first = group * K;
      Complex* x = buffer + b.first + first * b.step;
      Complex* y = buffer + b.first + (radix - first) * b.step;
      const Complex* twiddle_x = view.complex(stage.twiddle) + b.q + (first - 1) * stage.stride;
      const Complex* twiddle_y = twiddle_x + (radix - 2 * first) * stage.stride;
      if (group == 0) *x = sum;
      SDCT_UNROLL
      for (int k = 0; k < K; ++k) {
        x += b.step, y -= b.step, twiddle_x += stage.stride, twiddle_y -= stage.stride;
        Complex u = a[k] + times_i(d[k]), v = a[k] - times_i(d[k]);
        if (first + k < half) {
          if (turns && !kInverse) u = u * *twiddle_x, v = v * *twiddle_y;
          *x = u;
          *y = v;
        }
      }
    }
  }
  team.sync();
}

// Larger ones, which no size in use has: one butterfly at a time through scratch memory.
template <bool kInverse>
SDCT_DEVICE void long_stage(const Team& team, const View& view, int32_t s, Complex* buffer, Complex* scratch) {
  const Transform& t = view.t;
  const Stage& stage = t.stage[s];
  const int32_t radix = stage.radix, half = (radix - 1) / 2, count = t.m / radix;
  const Complex* table = view.complex(stage.twiddle);
  const Complex* roots = view.complex(stage.roots);
  const auto factor = [&](int32_t j, int32_t q) { return table[(j - 1) * stage.stride + q]; };
  for (int32_t i = 0; i < count; ++i) {
    const Butterfly b = butterfly_of(t, s, i);
    Complex* const at = buffer + b.first;
    if (kInverse && stage.stride > 1) {
      for (int32_t j = 1 + team.thread; j < radix; j += team.threads()) at[j * b.step] = at[j * b.step] * factor(j, b.q);
      team.sync();
    }
    for (int32_t k = team.thread; k <= half; k += team.threads()) {
      Complex a = at[0], d = {0.0f, 0.0f};
      int32_t angle = 0;
      for (int32_t j = 1; j <= half; ++j) {
        angle += k;
        if (angle >= radix) angle -= radix;
        const Complex root = roots[angle], x = at[j * b.step], y = at[(radix - j) * b.step];
        a = {a.re + root.re * (x.re + y.re), a.im + root.re * (x.im + y.im)};
        d = {d.re + root.im * (x.re - y.re), d.im + root.im * (x.im - y.im)};
      }
      scratch[k] = k ? a + times_i(d) : a;
      if (k) scratch[radix - k] = a - times_i(d);
    }
    team.sync();
    for (int32_t k = team.thread; k < radix; k += team.threads()) {
      Complex value = scratch[k];
      if (!kInverse && k > 0 && stage.stride > 1) value = value * factor(k, b.q);
      at[k * b.step] = value;
    }
    team.sync();
  }
}

template <bool kInverse, bool kDirect>
SDCT_DEVICE void any_stage(const Team& team, const View& view, int32_t s, Complex* buffer, int32_t scratch) {
  const int32_t radix = view.t.stage[s].radix;
  if (kDirect && radix % 2 && radix > 9) {
    if (radix > kMaxSums) return long_stage<kInverse>(team, view, s, buffer, buffer + scratch);
    return direct_stage<kInverse>(team, view, s, buffer);
  }
  switch (radix) {
    case 2: return register_stage<2, kInverse>(team, view, s, buffer);
    case 3: return register_stage<3, kInverse>(team, view, s, buffer);
    case 4: return register_stage<4, kInverse>(team, view, s, buffer);
    case 5: return register_stage<5, kInverse>(team, view, s, buffer);
    case 7: return register_stage<7, kInverse>(team, view, s, buffer);
    case 8: return register_stage<8, kInverse>(team, view, s, buffer);
    case 9: return register_stage<9, kInverse>(team, view, s, buffer);
    default: return register_stage<16, kInverse>(team, view, s, buffer);
  }
}

// --- reading x, writing y -----------------------------------------------------------------------------------------------------

// Lane l's from lane 31 - l. As assembly, because CUDA's own takes floats through integer registers.
SDCT_DEVICE float exchange(float x) {
  float out;
  asm volatile("shfl.sync.bfly.b32 %0, %1, 31, 31, -1;" : "=f"(out) : "f"(x));
  return out;
}
SDCT_DEVICE Complex exchange(Complex z) { return {exchange(z.re), exchange(z.im)}; }

template <class T>
SDCT_DEVICE uint32_t pack(float low, float high) {
  T bits[2];
  from_float(low, bits);
  from_float(high, bits + 1);
  return bits[0].bits | uint32_t(bits[1].bits) << 16;
}
#if __CUDA_ARCH__ >= 800
template <>
SDCT_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
template <>
SDCT_DEVICE uint32_t pack<Half>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
#endif

// Four elements as they lie in memory: pairs of 16 bits, or floats.
template <class T>
struct alignas(8) Quad {
  uint32_t words[2];
  struct Half {
    uint32_t bits;
  };
  SDCT_DEVICE Half odd() const { return {__byte_perm(words[0], words[1], 0x7632)}; }  // elements 1 and 3
  static SDCT_DEVICE Half exchange(Half half) { return {__shfl_xor_sync(kAll, half.bits, 31)}; }
  static SDCT_DEVICE float low(uint32_t word) { return to_float(T{uint16_t(word)}); }
  static SDCT_DEVICE float high(uint32_t word) { return to_float(T{uint16_t(word >> 16)}); }
  SDCT_DEVICE Complex even_parts() const { return {low(words[0]), low(words[1])}; }
  static SDCT_DEVICE Complex odd_parts(Half half) { return {high(half.bits), low(half.bits)}; }  // elements 3 and 1
  SDCT_DEVICE void add(float a, float b, float c, float d) {
    words[0] = pack<T>(low(words[0]) + a, high(words[0]) + b);
    words[1] = pack<T>(low(words[1]) + c, high(words[1]) + d);
  }
};
template <>
SDCT_DEVICE float Quad<BFloat16>::low(uint32_t word) {
  float out;
  asm("shl.b32 %0, %1, 16;" : "=f"(out) : "r"(word));
  return out;
}
template <>
SDCT_DEVICE float Quad<BFloat16>::high(uint32_t word) {
  float out;
  asm("and.b32 %0, %1, 0xffff0000;" : "=f"(out) : "r"(word));
  return out;
}
template <>
struct alignas(16) Quad<float> {
  float at[4];
  using Half = Complex;
  SDCT_DEVICE Half odd() const { return {at[1], at[3]}; }
  static SDCT_DEVICE Half exchange(Half half) {
    return kernel::exchange(half);
  }
  SDCT_DEVICE Complex even_parts() const { return {at[0], at[2]}; }
  static SDCT_DEVICE Complex odd_parts(Half half) { return {half.im, half.re}; }
  SDCT_DEVICE void add(float a, float b, float c, float d) {
    at[0] += a;
    at[1] += b;
    at[2] += c;
    at[3] += d;
  }
};

template <class T>
SDCT_DEVICE bool quads(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Quad<T>) == 0;
}

// Butterflies q and S - 1 - q in lanes l and 31 - l, `works` once each. Lanes beyond the last pair repeat it.
struct Mirror {
  int32_t q;
  bool works;
};
SDCT_DEVICE Mirror mirror(const Team& team, int32_t begin, int32_t count) {
  const int32_t lane = team.lane(), pairs = (count + 1) / 2;
  const bool upper = lane >= 16;
  const int32_t at = begin + (upper ? 31 - lane : lane), pair = at < pairs ? at : pairs - 1;
  return {upper ? count - 1 - pair : pair, at < pairs && !(upper && 2 * pair == count - 1)};
}

// x -> the first stage's output. A barrier follows.
template <class T>
SDCT_DEVICE void reading_stage(const Team& team, const View& view, const T* x, Complex* buffer) {
  const Stage& stage = view.t.stage[0];
  const int32_t stride = stage.stride, pitch = view.t.pitch;
  for (int32_t begin = 16 * team.warp(); 2 * begin < stride; begin += 16 * team.warps()) {
    const Mirror lane = mirror(team, begin, stride);
    const Quad<T>* quad = reinterpret_cast<const Quad<T>*>(x) + lane.q;
    Quad<T> four[8];
    SDCT_UNROLL
    for (int j = 0; j < 8; ++j) four[j] = quad[j * stride];
    Complex u[16];
    SDCT_UNROLL
    for (int j = 0; j < 8; ++j) {
      u[j] = four[j].even_parts();
      u[15 - j] = Quad<T>::odd_parts(Quad<T>::exchange(four[j].odd()));
    }
    dft(u);
    twiddle(u, view.complex(stage.twiddle), stride, lane.q);
    if (lane.works) {
      Complex* const at = buffer + lane.q;
      SDCT_UNROLL
      for (int j = 0; j < 16; ++j) at[j * pitch] = u[j];
    }
  }
  team.sync();
}

// The first stage of the inverse transform, its last one, and y_in + that -> y_out.
template <class T>
SDCT_DEVICE void adding_stage(const Team& team, const View& view, const Complex* buffer, const T* y_in, T* y_out) {
  const Stage& stage = view.t.stage[0];
  const int32_t stride = stage.stride, pitch = view.t.pitch;
  for (int32_t begin = 16 * team.warp(); 2 * begin < stride; begin += 16 * team.warps()) {
    const Mirror lane = mirror(team, begin, stride);
    const Complex* at = buffer + lane.q;
    Complex u[16];
    SDCT_UNROLL
    for (int j = 0; j < 16; ++j) u[j] = at[j * pitch];
    twiddle(u, view.complex(stage.twiddle), stride, lane.q);
    dft(u);
    const Quad<T>* from = reinterpret_cast<const Quad<T>*>(y_in) + lane.q;
    Quad<T>* to = reinterpret_cast<Quad<T>*>(y_out) + lane.q;
    SDCT_UNROLL
    for (int j = 0; j < 8; ++j) {
      const Complex low = exchanged(u[j]), high = exchanged(exchange(u[15 - j]));
      if (lane.works) {
        Quad<T> four = from[j * stride];
        four.add(low.re, high.im, low.im, high.re);
        to[j * stride] = four;
      }
    }
  }
}

// The same where lengths or addresses do not allow it: element after element, and the stage on its own.

// Place of element i of a vector in Makhoul's order.
SDCT_DEVICE int32_t makhoul(int32_t i, int32_t n) { return i % 2 ? n - 1 - i / 2 : i / 2; }

// Place in the buffer of complex element i.
SDCT_DEVICE int32_t padded(const Transform& t, int32_t i) {
  return t.stages ? i + divide(i, t.stage[0].by_stride) * (t.pitch - t.stage[0].stride) : i;
}

template <class T>
SDCT_DEVICE void read_vector(const Team& team, const Transform& t, const T* x, Complex* buffer) {
  for (int32_t i = team.thread; i < t.n; i += team.threads()) {
    const int32_t place = makhoul(i, t.n);
    if (t.n % 2) {
      buffer[padded(t, place)] = {to_float(x[i]), 0.0f};
    } else {
      Complex& z = buffer[padded(t, place / 2)];
      (place % 2 ? z.im : z.re) = to_float(x[i]);
    }
  }
  team.sync();
}

template <class T>
SDCT_DEVICE void add_vector(const Team& team, const Transform& t, const Complex* buffer, const T* y_in, T* y_out) {
  for (int32_t i = team.thread; i < t.n; i += team.threads()) {
    const int32_t place = makhoul(i, t.n);
    const Complex z = exchanged(buffer[padded(t, t.n % 2 ? place : place / 2)]);
    from_float(to_float(y_in[i]) + (t.n % 2 || place % 2 == 0 ? z.re : z.im), y_out + i);
  }
}

template <class T>
SDCT_DEVICE void copy_vector(const Team& team, int32_t n, const T* y_in, T* y_out) {
  if (n % 4 == 0 && quads(y_in) && quads(y_out)) {
    for (int32_t i = team.thread; i < n / 4; i += team.threads()) {
      reinterpret_cast<Quad<T>*>(y_out)[i] = reinterpret_cast<const Quad<T>*>(y_in)[i];
    }
  } else {
    for (int32_t i = team.thread; i < n; i += team.threads()) y_out[i] = y_in[i];
  }
}

// --- between complex bins and cosine coefficients -----------------------------------------------------------------------------

// Even n, bin k and bin m - k, 0 < k < m / 2: z of the complex transform to coefficients.
SDCT_DEVICE void separate(Two table, Complex z, Complex mirrored, Complex* low, Complex* high) {
  const Complex even = table.at[0] * (z + conj(mirrored)), odd = table.at[1] * (z - conj(mirrored)), d = even - odd;
  *low = conj(even + odd);
  *high = {kHalfRoot2 * (d.re - d.im), kHalfRoot2 * (d.re + d.im)};  // times exp(i pi / 4)
}

// The mirror of that.
SDCT_DEVICE void join(Two table, Complex low, Complex high, Complex* z, Complex* mirrored) {
  const Complex turned = {kHalfRoot2 * (high.re + high.im), kHalfRoot2 * (high.im - high.re)};  // times exp(-i pi / 4)
  const Complex even = conj(table.at[0]) * (conj(low) + turned), odd = conj(table.at[1]) * (conj(low) - turned);
  *z = even + odd;
  *mirrored = conj(even - odd);
}

// Bin 0 and what would be bin m, coefficients 0 and m: both ways.
SDCT_DEVICE Complex ends(Two table, Complex z) {
  const float g = kRoot2 * table.at[0].re;
  return {g * (z.re + z.im), g * (z.re - z.im)};
}

// Lanes l and 31 - l have the butterflies of bins b and S - b of a last stage, which are each other's mirrors: bin b + j S and bin
// S - b + (R - 1 - j) S. Those of bins 0 and S / 2 are their own and share lanes 0 and 31 of the first warp.
struct Split {
  int32_t bin, place;
  bool works, first, middle;  // first: bin 0, middle: bin S / 2
};
template <bool kShared>
SDCT_DEVICE Split split_of(const Team& team, const View& view, int32_t begin, int32_t count) {
  const int32_t lane = team.lane(), pairs = (count + 1) / 2;
  const bool upper = lane >= 16;
  const int32_t at = begin + (upper ? 31 - lane : lane), pair = at < pairs ? at : pairs - 1;
  Split out;
  out.first = pair == 0 && !upper;
  out.middle = pair == 0 && upper;
  out.bin = !upper ? pair : pair ? count - pair : count % 2 ? 0 : count / 2;
  out.works = at < pairs && !(out.middle && count % 2);
  out.place = view.position<kShared>(out.bin);
  return out;
}

// The last stage of a forward transform, and its bins to coefficients. No barrier follows.
template <int R, bool kShared>
SDCT_DEVICE void splitting_stage(const Team& team, const View& view, Complex* buffer) {
  constexpr int kHalf = R / 2;
  const int32_t count = view.t.m / R;
  for (int32_t begin = 16 * team.warp(); 2 * begin < count; begin += 16 * team.warps()) {
    const Split lane = split_of<kShared>(team, view, begin, count);
    Complex* const at = buffer + lane.place;
    int32_t opposite = __shfl_xor_sync(kAll, lane.place, 31);
    const Two* table = view.split() + lane.bin;
    Complex u[R], other[kHalf];
    SDCT_UNROLL
    for (int j = 0; j < R; ++j) u[j] = at[j];
    dft(u);
    SDCT_UNROLL
    for (int j = 0; j < kHalf; ++j) other[j] = exchange(u[R - 1 - j]);
    const Complex zero = u[0];
    if (begin == 0) {
      SDCT_UNROLL
      for (int j = 0; j < kHalf; ++j) {
        if (lane.first) other[j] = u[j ? R - j : kHalf];
        if (lane.middle) other[j] = u[R - 1 - j];
      }
      if (lane.first) u[0] = u[kHalf];
      if (lane.first) opposite = lane.place + 1;
      if (lane.middle) opposite = lane.place;
    }
    __syncwarp();
    if (lane.works) {
      Complex* const mirrored = buffer + opposite;
      SDCT_UNROLL
      for (int j = 0; j < kHalf; ++j) {
        Complex low, high;
        const bool is_centre = j == 0 && lane.first;  // bin m / 2, its own mirror
        separate(table[is_centre ? kHalf * count : j * count], u[j], other[j], &low, &high);
        at[is_centre ? kHalf : j] = low;
        if (!is_centre) mirrored[R - 1 - j] = high;
      }
      if (lane.first) at[0] = ends(*table, zero);
    }
  }
}

// The mirror: coefficients to bins, exchanged, and the first stage of an inverse transform. A barrier follows.
template <int R, bool kShared>
SDCT_DEVICE void joining_stage(const Team& team, const View& view, Complex* buffer) {
  constexpr int kHalf = R / 2;
  const int32_t count = view.t.m / R;
  for (int32_t begin = 16 * team.warp(); 2 * begin < count; begin += 16 * team.warps()) {
    const Split lane = split_of<kShared>(team, view, begin, count);
    Complex* const at = buffer + lane.place;
    int32_t opposite = __shfl_xor_sync(kAll, lane.place, 31);
    if (lane.first) opposite = lane.place + 1;
    if (lane.middle) opposite = lane.place;
    const Two* table = view.split() + lane.bin;
    const Complex* const mirrored = buffer + opposite;
    Complex u[R], other[kHalf];
    SDCT_UNROLL
    for (int j = 0; j < kHalf; ++j) {
      const bool is_centre = j == 0 && lane.first;
      const Complex low = at[is_centre ? kHalf : j], high = is_centre ? low : mirrored[R - 1 - j];
      join(table[is_centre ? kHalf * count : j * count], low, high, &u[j], &other[j]);
    }
    const Complex zero = lane.first ? ends(*table, at[0]) : Complex{0.0f, 0.0f};
    SDCT_UNROLL
    for (int j = 0; j < kHalf; ++j) u[R - 1 - j] = exchange(other[j]);
    if (begin == 0) {
      SDCT_UNROLL
      for (int j = 0; j < kHalf; ++j) {
        if (lane.middle) u[R - 1 - j] = other[j];
        if (lane.first && j > 0) u[R - j] = other[j];
      }
      if (lane.first) u[kHalf] = u[0], u[0] = zero;
    }
    SDCT_UNROLL
    for (int j = 0; j < R; ++j) u[j] = exchanged(u[j]);
    dft(u);
    __syncwarp();
    if (lane.works) {
      SDCT_UNROLL
      for (int j = 0; j < R; ++j) at[j] = u[j];
    }
  }
  team.sync();
}

// The same apart from the stages.
template <bool kShared>
SDCT_DEVICE void split_bins(const Team& team, const View& view, Complex* buffer) {
  const Transform& t = view.t;
  if (t.n % 2) {
    for (int32_t k = team.thread; k < t.m; k += team.threads()) {
      Complex& z = buffer[view.position<kShared>(k)];
      z.re = (view.phases()[k] * z).re * (k ? 2.0f : kRoot2);
    }
    return;
  }
  for (int32_t k = team.thread; k <= t.m / 2; k += team.threads()) {
    Complex& low = buffer[view.position<kShared>(k)];
    Complex& high = buffer[view.position<kShared>(k ? t.m - k : 0)];
    if (k == 0) {
      low = ends(view.split()[0], low);
    } else {
      Complex a, b;
      separate(view.split()[k], low, high, &a, &b);
      low = a;
      if (2 * k < t.m) high = b;
    }
  }
}

template <bool kShared>
SDCT_DEVICE void join_bins(const Team& team, const View& view, Complex* buffer) {
  const Transform& t = view.t;
  for (int32_t k = team.thread; k <= t.m / 2; k += team.threads()) {
    Complex& low = buffer[view.position<kShared>(k)];
    Complex& high = buffer[view.position<kShared>(k ? t.m - k : 0)];
    if (t.n % 2) {
      const Complex phase = view.phases()[k];
      if (k == 0) {
        low = {0.0f, kRoot2 * phase.re * low.re};
      } else {
        const Complex z = conj(phase) * Complex{low.re, -high.re};
        low = exchanged(z);
        high = exchanged(conj(z));
      }
    } else if (k == 0) {
      low = exchanged(ends(view.split()[0], low));
    } else {
      Complex a, b;
      join(view.split()[k], low, high, &a, &b);
      low = exchanged(a);
      if (2 * k < t.m) high = exchanged(b);
    }
  }
  team.sync();
}

// --- the two cosine transforms ------------------------------------------------------------------------------------------------

// x -> its coefficients, coefficient c at place(c). No barrier follows.
template <class T, bool kShared, bool kDirect>
SDCT_DEVICE void forward(const Team& team, const View& view, const T* x, Complex* buffer, int32_t scratch) {
  const Transform& t = view.t;
  int32_t s = 0, end = t.stages;
  if (t.fused & kReads && quads(x)) {
    reading_stage(team, view, x, buffer);
    s = 1;
  } else {
    read_vector(team, t, x, buffer);
  }
  if (t.fused & kSplits) --end;
  for (; s < end; ++s) any_stage<false, kDirect>(team, view, s, buffer, scratch);
  if (t.fused & kSplits) {
    switch (t.stage[end].radix) {
      case 2: return splitting_stage<2, kShared>(team, view, buffer);
      case 4: return splitting_stage<4, kShared>(team, view, buffer);
      case 8: return splitting_stage<8, kShared>(team, view, buffer);
      default: return splitting_stage<16, kShared>(team, view, buffer);
    }
  }
  split_bins<kShared>(team, view, buffer);
}

// The mirror: coefficients -> y_in + the vector -> y_out. No barrier follows.
template <class T, bool kShared, bool kDirect>
SDCT_DEVICE void inverse(const Team& team, const View& view, Complex* buffer, int32_t scratch, const T* y_in,
                         T* y_out) {
  const Transform& t = view.t;
  const bool adds = t.fused & kReads && quads(y_in) && quads(y_out);
  int32_t s = t.stages - 1;
  if (t.fused & kSplits) {
    switch (t.stage[s].radix) {
      case 2: joining_stage<2, kShared>(team, view, buffer); break;
      case 4: joining_stage<4, kShared>(team, view, buffer); break;
      case 8: joining_stage<8, kShared>(team, view, buffer); break;
      default: joining_stage<16, kShared>(team, view, buffer);
    }
    --s;
  } else {
    join_bins<kShared>(team, view, buffer);
  }
  for (; s >= (adds ? 1 : 0); --s) any_stage<true, kDirect>(team, view, s, buffer, scratch);
  if (adds) {
    adding_stage(team, view, buffer, y_in, y_out);
  } else {
    add_vector(team, t, buffer, y_in, y_out);
  }
}

// --- the sparse part ------------------------------------------------------------------------------------------------------------

template <bool kShared>
struct Places {  // View::place
  const unsigned char* table;
  bool wide;
  SDCT_DEVICE explicit Places(const View& view) : table(view.tables + view.t.place), wide(2 * view.t.buffer > UINT16_MAX) {}
  SDCT_DEVICE int32_t operator()(int32_t c) const {
    if (kShared || !wide) return reinterpret_cast<const uint16_t*>(table)[c];
    return reinterpret_cast<const int32_t*>(table)[c];
  }
};

// acc[row] += scale * sum of value * spectrum[col] over the entries of a row, those with value 0 left out. Warps take ranges of
// entries, 32 at a time; a row belongs to the warp in whose range it starts.
template <bool kShared>
SDCT_DEVICE void sparse(const Team& team, const View& in, const View& out, const Complex* spectrum, Complex* acc,
                        const float* values, const int32_t* indices, int32_t count, float scale) {
  const float* coefficients = reinterpret_cast<const float*>(spectrum);
  float* sums = reinterpret_cast<float*>(acc);
  const int32_t lane = team.lane(), share = (count + team.threads() - 1) / team.threads() * 32;
  int32_t e = share * team.warp(), end = e + share < count ? e + share : count;
  if (e >= count) return;
  const uint32_t columns = uint32_t(in.t.n);
  const auto* pairs = reinterpret_cast<const int2*>(indices) + e;
  // rows that are this warp's: the last one before the range is the warp's before this one
  const int32_t before = e > 0 ? pairs[-1].x : -1, rows = out.t.n;
  const int32_t low = before < 0 ? 0 : before < rows ? before + 1 : rows;
  uint32_t width = uint32_t(rows - low);
  values += e + lane;
  pairs += lane;
  const Places<kShared> to_column(in), to_row(out);
  for (;;) {
    int2 pair = {0, 0};
    float value = 0.0f;
    if (e + lane < end) {
      pair = *pairs;
      value = *values;
    }
    values += 32;
    pairs += 32;
    // unused places, with value 0, follow at the end and repeat the last row: they must not lengthen its sum
    const uint32_t used = __ballot_sync(kAll, value != 0.0f);
    const bool counts = used >> lane != 0 && uint32_t(pair.x - low) < width;
    float sum = 0.0f;
    if (counts && uint32_t(pair.y) < columns) sum = value * coefficients[to_column(pair.y)];
    // the first entry of a row gets the sum of those that follow among these 32: twice as many at each turn
    const int32_t previous = __shfl_up_sync(kAll, pair.x, 1);
    const uint32_t following = __ballot_sync(kAll, counts && pair.x == previous) & ~1u, above = following >> lane;
    if (following) {
      const int32_t length = __popc((above >> 1) & ~((above >> 1) + 1));  // lowest bits that are set in a row
      uint32_t more = following;
      for (int32_t d = 1; more; more &= more >> d, d *= 2) {
        float other;
        asm volatile("shfl.sync.down.b32 %0, %1, %2, 31, -1;" : "=f"(other) : "f"(sum), "r"(d));
        if (d <= length) sum += other;
      }
    }
    if (counts && !(above & 1)) sums[to_row(pair.x)] += scale * sum;
    __syncwarp();
    e += 32;
    if (e < end) continue;
    // does the last row go on behind the range? Windows of zeros there have nothing, and may be all that is left
    if (end == count) break;
    const int32_t last = __shfl_sync(kAll, pair.x, 31);
    if (uint32_t(last - low) >= width) break;
    while (!used && e < count) {
      bool any = false;
      SDCT_UNROLL
      for (int i = 0; i < 128; i += 32) any = any || (e + i + lane < count && values[i] != 0.0f);
      if (__any_sync(kAll, any)) break;
      e += 128;
      values += 128;
      pairs += 128;
    }
    if (e >= count || indices[2 * int64_t(e)] != last) break;
    width = uint32_t(last - low) + 1;
    end = e + 32 < count ? e + 32 : count;
  }
}

// --- one token --------------------------------------------------------------------------------------------------------------------

// What a team must agree on though other streams may write it meanwhile: read by one warp.
constexpr int32_t kBlends = 32;
struct Choice {
  int64_t token, row;    // here, and not in registers, which are scarce
  int32_t ids[kBlends];  // 0: none
  float scales[kBlends];
  int32_t active;
};
constexpr int32_t kChoiceBytes = int32_t(2 * sizeof(Choice) + 15) / 16 * 16;

// A team's buffers, and the tables.
struct Working {
  Complex* buffers;
  const unsigned char* tables;  // in shared memory, or null
  SDCT_DEVICE Complex* spectrum() const { return buffers; }
  SDCT_DEVICE Complex* acc(const KernelArgs& args) const { return buffers + (args.in.buffer + 1) / 2 * 2; }
};

SDCT_DEVICE View view_of(const Transform& t, const unsigned char* shared) {
  return {t, shared && t.shared_table >= 0 ? shared + t.shared_table : t.tables};
}

// ids and scales of blends first .. first + kBlends - 1 of a row. A barrier must follow.
SDCT_DEVICE void choose(const Team& team, const Problem& p, int64_t row, int64_t first, Choice* choice) {
  if (team.warp() > 0) return;
  const int64_t k = first + team.lane();
  int32_t id = 0;
  float scale = 0.0f;
  if (row >= 0 && row < p.rows && k < p.blends) {
    id = p.ids[row * p.blends + k];
    scale = p.scales[row * p.blends + k];
  }
  choice->ids[team.lane()] = id > 0 && id < p.slots ? id : 0;
  choice->scales[team.lane()] = scale;
}

// Token `token` through the projections first .. last - 1.
template <class T, bool kShared, bool kDirect>
SDCT_DEVICE void run_token(const Team& team, const KernelArgs& args, const Working& memory, Choice* choice, int64_t token,
                           int32_t first, int32_t last) {
  const Problem& p = args.problem;
  if (team.warp() == 0) {
    const int64_t row = p.token_row ? int64_t(p.token_row[token]) : token / args.tokens_per_row;
    bool any = false;
    for (int64_t k = team.lane(); row >= 0 && row < p.rows && k < p.blends; k += 32) {
      const int32_t id = p.ids[row * p.blends + k];
      any = any || (id > 0 && id < p.slots);
    }
    any = __any_sync(kAll, any);
    if (team.lane() == 0) {
      choice->token = token;
      choice->row = row;
      choice->active = any;
    }
    choose(team, p, row, 0, choice);
  }
  team.sync();
  const bool active = choice->active;
  if (active) {
    const T* x = static_cast<const T*>(p.x) + token * p.x_stride;
    forward<T, kShared, kDirect>(team, view_of(args.in, memory.tables), x, memory.spectrum(),
                        (args.in.buffer + 1) / 2 * 2 + args.acc_buffer);
  }
  for (int32_t j = first; j < last; ++j) {
    const View out = view_of(args.out[j], memory.tables);
    if (active) {
      if (j > first) team.sync();
      Complex* const acc = memory.acc(args);
      float4* zero = reinterpret_cast<float4*>(acc) + team.thread;
      const float4* const zeros = reinterpret_cast<float4*>(acc + out.t.buffer);  // an odd one has a place behind it
      _Pragma("unroll 1")
      for (; zero < zeros; zero += team.threads()) *zero = {0.0f, 0.0f, 0.0f, 0.0f};
      team.sync();
      for (int32_t k = 0; k < p.blends; ++k) {
        if (k > 0 && k % kBlends == 0) {
          team.sync();
          choose(team, p, choice->row, k, choice);
          team.sync();
        }
        const int32_t id = choice->ids[k % kBlends];
        if (id == 0) continue;
        const int64_t at = int64_t(id) * args.entries + args.offset[j];
        sparse<kShared>(team, view_of(args.in, memory.tables), out, memory.spectrum(), acc, p.values + at, p.indices + 2 * at,
                        args.capacity[j], choice->scales[k % kBlends]);
        team.sync();
      }
      if (p.blends > kBlends && j + 1 < last) {
        team.sync();
        choose(team, p, choice->row, 0, choice);  // for the next projection, behind its barrier
      }
    }
    const T* y_in = static_cast<const T*>(p.y_in[j]) + choice->token * p.y_in_stride[j];
    T* y_out = static_cast<T*>(p.y_out[j]) + choice->token * p.y_out_stride[j];
    if (active) {
      inverse<T, kShared, kDirect>(team, out, memory.acc(args), args.acc_buffer, y_in, y_out);
    } else if (y_in != y_out) {
      copy_vector(team, out.t.n, y_in, y_out);
    }
  }
}

}  // namespace kernel
}  // namespace sdct

#endif  // SDCT_CORE_KERNEL_H_
