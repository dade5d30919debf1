// The CPU path. Compiled once for each instruction set, with SDCT_ISA naming it and its compiler flags set; -ffp-contract=off keeps
// the arithmetic the one written here, so that both forms below agree bit for bit.
//
// The same functions serve two forms, chosen by a policy:
//     Tokens  the lanes of a vector are tokens of one row; arrays are [length][kWidth]
//     Single  one token; vectors run along the length
#include "cpu.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sdct {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float V __attribute__((vector_size(kWidth * 4)));
typedef uint32_t U __attribute__((vector_size(kWidth * 4)));
typedef uint16_t S __attribute__((vector_size(kWidth * 2)));

#define SDCT_INLINE inline __attribute__((always_inline))
// large loops stand alone: within one function they take each other's registers
#define SDCT_APART __attribute__((noinline))

// --- vectors --------------------------------------------------------------------------------------------------------------------

SDCT_INLINE V load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
SDCT_INLINE void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
SDCT_INLINE V broadcast(float x) { return x - V{}; }

SDCT_INLINE float fma(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
SDCT_INLINE V fma(V a, V b, V c) {
#if defined(__AVX512F__)
  return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
SDCT_INLINE V fnma(V a, V b, V c) {  // c - a b
#if defined(__AVX512F__)
  return (V)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (V)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return c - a * b;
#endif
}

#if defined(__AVX512F__)
SDCT_INLINE V reverse(V a) {
  return __builtin_shufflevector(a, a, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
}
SDCT_INLINE V zip_low(V a, V b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
SDCT_INLINE V zip_high(V a, V b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
SDCT_INLINE V even(V a, V b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
SDCT_INLINE V odd(V a, V b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
#elif defined(__AVX2__)
SDCT_INLINE V reverse(V a) { return __builtin_shufflevector(a, a, 7, 6, 5, 4, 3, 2, 1, 0); }
SDCT_INLINE V zip_low(V a, V b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
SDCT_INLINE V zip_high(V a, V b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
SDCT_INLINE V even(V a, V b) { return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14); }
SDCT_INLINE V odd(V a, V b) { return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15); }
#else
SDCT_INLINE V reverse(V a) { return __builtin_shufflevector(a, a, 3, 2, 1, 0); }
SDCT_INLINE V zip_low(V a, V b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
SDCT_INLINE V zip_high(V a, V b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
SDCT_INLINE V even(V a, V b) { return __builtin_shufflevector(a, b, 0, 2, 4, 6); }
SDCT_INLINE V odd(V a, V b) { return __builtin_shufflevector(a, b, 1, 3, 5, 7); }
#endif

SDCT_INLINE void transpose(V (&a)[kWidth]) {
  for (int round = 1; round < kWidth; round *= 2) {
    V b[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth / 2; ++i) {
      b[2 * i] = zip_low(a[i], a[i + kWidth / 2]);
      b[2 * i + 1] = zip_high(a[i], a[i + kWidth / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) a[i] = b[i];
  }
}

// --- elements -------------------------------------------------------------------------------------------------------------------

struct F32 {
  float value;
};
struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

SDCT_INLINE V read(const F32* p) { return load(&p->value); }
SDCT_INLINE void write(F32* p, V v) { store(&p->value, v); }

SDCT_INLINE S load_bits(const void* p) {
  S s;
  __builtin_memcpy(&s, p, sizeof s);
  return s;
}
SDCT_INLINE void store_bits(void* p, U u) {
  const S s = __builtin_convertvector(u, S);
  __builtin_memcpy(p, &s, sizeof s);
}

SDCT_INLINE V read(const BF16* p) { return (V)(__builtin_convertvector(load_bits(p), U) << 16); }
SDCT_INLINE void write(BF16* p, V v) {
  const U u = (U)v;
  const U rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16, nan = u >> 16 | 0x40u;
  store_bits(p, (u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

SDCT_INLINE V read(const F16* p) {
#if defined(__AVX512F__)
  __m256i h;
  __builtin_memcpy(&h, p, sizeof h);
  return (V)_mm512_cvtph_ps(h);
#elif defined(__AVX2__)
  __m128i h;
  __builtin_memcpy(&h, p, sizeof h);
  return (V)_mm256_cvtph_ps(h);
#else
  const U h = __builtin_convertvector(load_bits(p), U);
  const U sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  typedef int32_t I __attribute__((vector_size(kWidth * 4)));
  const U small = (U)(__builtin_convertvector((I)magnitude, V) * 5.960464477539063e-8f);  // 2^-24
  const U normal = (magnitude << 13) + 0x38000000u, special = magnitude << 13 | 0x7f800000u;
  return (V)(sign | (magnitude < 0x400u ? small : magnitude >= 0x7c00u ? special : normal));
#endif
}
SDCT_INLINE void write(F16* p, V v) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __builtin_memcpy(p, &h, sizeof h);
#elif defined(__AVX2__)
  const __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __builtin_memcpy(p, &h, sizeof h);
#else
  const U u = (U)v, sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  const U small = (U)((V)magnitude + 0.5f) - 0x3f000000u;
  const U normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const U zero = {};
  const U big = magnitude > 0x7f800000u ? zero + 0x7e00u : zero + 0x7c00u;
  store_bits(p, sign | (magnitude >= 0x477ff000u ? big : magnitude < 0x38800000u ? small : normal));
#endif
}

// The first `count` < kWidth elements; the rest 0.
template <class T>
SDCT_INLINE V read_some(const T* p, int count) {
  T whole[kWidth] = {};
  for (int i = 0; i < count; ++i) whole[i] = p[i];
  return read(whole);
}
template <class T>
SDCT_INLINE void write_some(T* p, V v, int count) {
  T whole[kWidth];
  write(whole, v);
  for (int i = 0; i < count; ++i) p[i] = whole[i];
}

// --- complex butterflies, exp(-2 i pi j k / R) ------------------------------------------------------------------------------------

struct C {
  V re, im;
};

SDCT_INLINE C add(C a, C b) { return {a.re + b.re, a.im + b.im}; }
SDCT_INLINE C sub(C a, C b) { return {a.re - b.re, a.im - b.im}; }
SDCT_INLINE C mul(C a, V re, V im) { return {fnma(a.im, im, a.re * re), fma(a.im, re, a.re * im)}; }

template <int R>
struct Roots;  // cos and sin of 2 pi j / R
template <>
struct Roots<3> {
  static constexpr float cosine[2] = {1.0f, -0.5f};
  static constexpr float sine[2] = {0.0f, 0.866025403784438647f};
};
template <>
struct Roots<5> {
  static constexpr float cosine[3] = {1.0f, 0.309016994374947424f, -0.809016994374947424f};
  static constexpr float sine[3] = {0.0f, 0.951056516295153572f, 0.587785252292473129f};
};
template <>
struct Roots<7> {
  static constexpr float cosine[4] = {1.0f, 0.623489801858733531f, -0.222520933956314404f, -0.900968867902419126f};
  static constexpr float sine[4] = {0.0f, 0.781831482468029809f, 0.974927912181823607f, 0.433883739117558120f};
};

template <int R>
SDCT_INLINE void dft(C (&u)[R]) {  // odd R
  constexpr int kHalf = (R - 1) / 2;
  C sum[kHalf], difference[kHalf], total = u[0];
#pragma GCC unroll 4
  for (int j = 0; j < kHalf; ++j) {
    sum[j] = add(u[j + 1], u[R - 1 - j]);
    difference[j] = sub(u[j + 1], u[R - 1 - j]);
    total = add(total, sum[j]);
  }
  const C first = u[0];
  u[0] = total;
#pragma GCC unroll 4
  for (int k = 1; k <= kHalf; ++k) {
    C a = first, b = {};
#pragma GCC unroll 4
    for (int j = 1; j <= kHalf; ++j) {
      const int angle = j * k % R;
      const V c = broadcast(Roots<R>::cosine[angle <= kHalf ? angle : R - angle]);
      const V s = broadcast(angle <= kHalf ? Roots<R>::sine[angle] : -Roots<R>::sine[R - angle]);
      a = {fma(c, sum[j - 1].re, a.re), fma(c, sum[j - 1].im, a.im)};
      b = {fma(s, difference[j - 1].re, b.re), fma(s, difference[j - 1].im, b.im)};
    }
    u[k] = {a.re + b.im, a.im - b.re};
    u[R - k] = {a.re - b.im, a.im + b.re};
  }
}
template <>
SDCT_INLINE void dft<2>(C (&u)[2]) {
  const C a = u[0], b = u[1];
  u[0] = add(a, b);
  u[1] = sub(a, b);
}
template <>
SDCT_INLINE void dft<4>(C (&u)[4]) {
  const C a = add(u[0], u[2]), b = sub(u[0], u[2]), c = add(u[1], u[3]), d = sub(u[1], u[3]);
  u[0] = add(a, c);
  u[1] = {b.re + d.im, b.im - d.re};
  u[2] = sub(a, c);
  u[3] = {b.re - d.im, b.im + d.re};
}
template <>
SDCT_INLINE void dft<8>(C (&u)[8]) {
  const V root = broadcast(0.707106781186547524f);
  C low[4] = {u[0], u[2], u[4], u[6]}, high[4] = {u[1], u[3], u[5], u[7]};
  dft<4>(low);
  dft<4>(high);
  high[1] = {root * (high[1].re + high[1].im), root * (high[1].im - high[1].re)};
  high[2] = {high[2].im, -high[2].re};
  high[3] = {root * (high[3].im - high[3].re), -root * (high[3].re + high[3].im)};
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    u[j] = add(low[j], high[j]);
    u[j + 4] = sub(low[j], high[j]);
  }
}

// One stage of a strip: rows of kWidth columns, `length` rows in each sub-transform. source(i) is row i of what goes in.
template <int R, class Source>
SDCT_INLINE void register_stage(C* z, int32_t rows, int32_t length, const float* twiddle, Source source) {
  const int32_t stride = length / R;
  for (int32_t first = 0; first < rows; first += length) {
    for (int32_t q = 0; q < stride; ++q) {
      C* const at = z + first + q;
      C u[R];
#pragma GCC unroll 8
      for (int j = 0; j < R; ++j) u[j] = source(first + q + j * stride);
      dft<R>(u);
      at[0] = u[0];
      if (stride > 1) {
#pragma GCC unroll 8
        for (int j = 1; j < R; ++j) {
          const float* w = twiddle + 2 * ((j - 1) * stride + q);
          at[j * stride] = mul(u[j], broadcast(w[0]), broadcast(w[1]));
        }
      } else {
#pragma GCC unroll 8
        for (int j = 1; j < R; ++j) at[j] = u[j];
      }
    }
  }
}

// kBins pairs of bins k, radix - k of a direct sum.
template <int kBins>
SDCT_INLINE void direct_bins(C* at, int32_t stride, int32_t radix, int32_t k, const C* sum, const C* difference, C first,
                             const float* roots, const float* twiddle, int32_t q) {
  C a[kBins], b[kBins] = {};
  int32_t angle[kBins] = {};
  for (int i = 0; i < kBins; ++i) a[i] = first;
  for (int32_t j = 1; j <= radix / 2; ++j) {
    const C s = sum[j - 1], d = difference[j - 1];
#pragma GCC unroll 4
    for (int i = 0; i < kBins; ++i) {
      angle[i] += k + i;
      if (angle[i] >= radix) angle[i] -= radix;
      const V cosine = broadcast(roots[2 * angle[i]]), sine = broadcast(roots[2 * angle[i] + 1]);  // sine negative
      a[i] = {fma(cosine, s.re, a[i].re), fma(cosine, s.im, a[i].im)};
      b[i] = {fma(sine, d.re, b[i].re), fma(sine, d.im, b[i].im)};
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kBins; ++i) {
    C low = {a[i].re - b[i].im, a[i].im + b[i].re}, high = {a[i].re + b[i].im, a[i].im - b[i].re};
    if (stride > 1) {
      const float* w = twiddle + 2 * ((k + i - 1) * stride + q);
      low = mul(low, broadcast(w[0]), broadcast(w[1]));
      w = twiddle + 2 * ((radix - k - i - 1) * stride + q);
      high = mul(high, broadcast(w[0]), broadcast(w[1]));
    }
    at[(k + i) * stride] = low;
    at[(radix - k - i) * stride] = high;
  }
}

// The same for any odd radix. `spare`: radix - 1 rows.
void direct_stage(C* z, int32_t rows, int32_t length, int32_t radix, const float* twiddle, const float* roots, C* spare) {
  const int32_t stride = length / radix, half = radix / 2;
  C* const sum = spare;
  C* const difference = spare + half;
  for (int32_t first = 0; first < rows; first += length) {
    for (int32_t q = 0; q < stride; ++q) {
      C* const at = z + first + q;
      const C start = at[0];
      C total = start;
      for (int32_t j = 1; j <= half; ++j) {
        const C low = at[j * stride], high = at[(radix - j) * stride];
        sum[j - 1] = add(low, high);
        difference[j - 1] = sub(low, high);
        total = add(total, sum[j - 1]);
      }
      at[0] = total;
      int32_t k = 1;
      for (; k + 3 <= half; k += 4) direct_bins<4>(at, stride, radix, k, sum, difference, start, roots, twiddle, q);
      for (; k <= half; ++k) direct_bins<1>(at, stride, radix, k, sum, difference, start, roots, twiddle, q);
    }
  }
}

template <class Source>
SDCT_INLINE void stage(const CpuStages& plan, int32_t s, int32_t length, C* z, Source source) {
  const float* twiddle = plan.twiddle[s];
  switch (plan.radix[s]) {
    case 2: return register_stage<2>(z, plan.length, length, twiddle, source);
    case 3: return register_stage<3>(z, plan.length, length, twiddle, source);
    case 4: return register_stage<4>(z, plan.length, length, twiddle, source);
    case 5: return register_stage<5>(z, plan.length, length, twiddle, source);
    case 7: return register_stage<7>(z, plan.length, length, twiddle, source);
    case 8: return register_stage<8>(z, plan.length, length, twiddle, source);
    default:
      for (int32_t i = 0; i < plan.length; ++i) z[i] = source(i);
      return direct_stage(z, plan.length, length, plan.radix[s], twiddle, plan.roots[s], z + plan.length);
  }
}

// The stages after the first.
SDCT_APART void later_stages(const CpuStages& plan, C* z) {
  int32_t length = plan.length / plan.radix[0];
  for (int32_t s = 1; s < plan.stages; ++s) {
    if (plan.radix[s] > 8) {
      direct_stage(z, plan.length, length, plan.radix[s], plan.twiddle[s], plan.roots[s], z + plan.length);
    } else {
      stage(plan, s, length, z, [z](int32_t i) __attribute__((always_inline)) { return z[i]; });
    }
    length /= plan.radix[s];
  }
}

// z = FFT of the rows of source, bin k in row position[k].
template <class Source>
SDCT_INLINE void run_stages(const CpuStages& plan, C* z, Source source) {
  if (plan.stages == 0) {
    z[0] = source(0);
    return;
  }
  stage(plan, 0, plan.length, z, source);
  if (plan.stages > 1) later_stages(plan, z);
}

// --- the two forms ------------------------------------------------------------------------------------------------------------------

struct Tokens {
  static constexpr bool kTokens = true;
  static constexpr int kStep = 1;        // places a vector covers
  static constexpr int kLanes = kWidth;  // floats of a place
  static SDCT_INLINE V get(const float* p, int32_t k) { return load(p + int64_t(k) * kWidth); }
  static SDCT_INLINE V get_down(const float* p, int32_t k) { return get(p, k); }  // k, k - 1, ...
  static SDCT_INLINE void put(float* p, int32_t k, V v) { store(p + int64_t(k) * kWidth, v); }
  static SDCT_INLINE void put_down(float* p, int32_t k, V v) { put(p, k, v); }
  static SDCT_INLINE V table(const float* p, int32_t k) { return broadcast(p[k]); }
  static SDCT_INLINE V table_down(const float* p, int32_t k) { return broadcast(p[k]); }
};

struct Single {
  static constexpr bool kTokens = false;
  static constexpr int kStep = kWidth;
  static constexpr int kLanes = 1;
  static SDCT_INLINE V get(const float* p, int32_t k) { return load(p + k); }
  static SDCT_INLINE V get_down(const float* p, int32_t k) { return reverse(load(p + k - kWidth + 1)); }
  static SDCT_INLINE void put(float* p, int32_t k, V v) { store(p + k, v); }
  static SDCT_INLINE void put_down(float* p, int32_t k, V v) { store(p + k - kWidth + 1, reverse(v)); }
  static SDCT_INLINE V table(const float* p, int32_t k) { return load(p + k); }
  static SDCT_INLINE V table_down(const float* p, int32_t k) { return get_down(p, k); }
};

// Calls f(k) for starts k of vectors that cover 1 .. last. The last may overlap its predecessor, so f must not read what it writes.
template <class Form, class F>
SDCT_INLINE void cover(int32_t last, F f) {
  if (Form::kTokens) {
    for (int32_t k = 1; k <= last; ++k) f(k);
  } else {
    int32_t k = 1;
    for (; k + kWidth - 1 <= last; k += kWidth) f(k);
    if (k <= last) f(last - kWidth + 1);
  }
}

// out = FFT(z) of length m, both in natural order. t: [r2][r1_padded] places, each of re and im.
template <class Form>
SDCT_APART void fft(const CpuView& v, const float* z_re, const float* z_im, float* t_re, float* t_im, float* out_re,
                     float* out_im, C* local) {
  const int32_t r1 = v.r1, r2 = v.r2;
  if (Form::kTokens && r2 == 1) {
    run_stages(v.first, local, [&](int32_t i) __attribute__((always_inline)) {
      return C{Form::get(z_re, i), Form::get(z_im, i)};
    });
    for (int32_t k = 0; k < r1; ++k) {
      const C u = local[v.first.position[k]];
      Form::put(out_re, k, u.re);
      Form::put(out_im, k, u.im);
    }
    return;
  }
  for (int32_t n2 = 0; n2 < r2; n2 += Form::kStep) {
    run_stages(v.first, local, [&](int32_t n1) __attribute__((always_inline)) {
      return C{Form::get(z_re, n1 * r2 + n2), Form::get(z_im, n1 * r2 + n2)};
    });
    const auto turned = [&](int32_t k1) __attribute__((always_inline)) {
      return mul(local[v.first.position[k1]], Form::table(v.twiddle_re, k1 * r2 + n2),
                 Form::table(v.twiddle_im, k1 * r2 + n2));
    };
    if (Form::kTokens) {
      for (int32_t k1 = 0; k1 < r1; ++k1) {
        const C u = turned(k1);
        Form::put(t_re, n2 * r1 + k1, u.re);
        Form::put(t_im, n2 * r1 + k1, u.im);
      }
    } else {
      for (int32_t first = 0; first < r1; first += kWidth) {
        V re[kWidth], im[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) {
          const C u = first + i < r1 ? turned(first + i) : C{};
          re[i] = u.re;
          im[i] = u.im;
        }
        transpose(re);
        transpose(im);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) {
          store(t_re + (n2 + i) * v.r1_padded + first, re[i]);
          store(t_im + (n2 + i) * v.r1_padded + first, im[i]);
        }
      }
    }
  }
  const int32_t row = Form::kTokens ? r1 : v.r1_padded;
  const int32_t last = Form::kTokens ? r1 - 1 : (r1 - 1) / kWidth * kWidth;
  // downwards, rows ascending: a last strip wider than what is left writes into the next row before that is written itself
  for (int32_t k1 = last; k1 >= 0; k1 -= Form::kStep) {
    run_stages(v.second, local, [&](int32_t n2) __attribute__((always_inline)) {
      return C{Form::get(t_re, n2 * row + k1), Form::get(t_im, n2 * row + k1)};
    });
    for (int32_t k2 = 0; k2 < r2; ++k2) {
      const C u = local[v.second.position[k2]];
      Form::put(out_re, k2 * r1 + k1, u.re);
      Form::put(out_im, k2 * r1 + k1, u.im);
    }
  }
}

constexpr float kRoot2 = 1.41421356237309505f;

template <class Form>
SDCT_INLINE void mix_zero(const float* a, const float* b, float* sum, float* difference, float g) {
  for (int lane = 0; lane < Form::kLanes; ++lane) {
    const float x = a[lane], y = b[lane];
    sum[lane] = g * (x + y);
    difference[lane] = g * (x - y);
  }
}

// Bins of the complex FFT -> coefficients c[0 .. n - 1].
template <class Form>
SDCT_APART void to_coefficients(const CpuView& v, const float* z_re, const float* z_im, float* c) {
  const int32_t n = v.n, m = v.m;
  if (Form::kTokens && n % 2) {
    for (int32_t k = 0; k < n; ++k) {
      const C z = mul({Form::get(z_re, k), Form::get(z_im, k)}, Form::table(v.phase_re, k), Form::table(v.phase_im, k));
      Form::put(c, k, z.re * broadcast(k ? 2.0f : kRoot2));
    }
    return;
  }
  mix_zero<Form>(z_re, z_im, c, c + int64_t(m) * Form::kLanes, kRoot2 * v.phase_re[0]);
  cover<Form>(m / 2, [&](int32_t k) __attribute__((always_inline)) {
    const C a = {Form::get(z_re, k), Form::get(z_im, k)}, b = {Form::get_down(z_re, m - k), Form::get_down(z_im, m - k)};
    const C e = {a.re + b.re, a.im - b.im};
    const C o = mul({a.im + b.im, b.re - a.re}, Form::table(v.omega_re, k), Form::table(v.omega_im, k));
    const C low = mul(add(e, o), Form::table(v.phase_re, k), Form::table(v.phase_im, k));
    const C high = mul({e.re - o.re, o.im - e.im}, Form::table_down(v.phase_re, m - k), Form::table_down(v.phase_im, m - k));
    Form::put(c, k, low.re);
    Form::put_down(c, n - k, -low.im);
    Form::put_down(c, m - k, high.re);
    Form::put(c, m + k, -high.im);
  });
}

// The mirror.
template <class Form>
SDCT_APART void from_coefficients(const CpuView& v, const float* c, float* z_re, float* z_im) {
  const int32_t n = v.n, m = v.m;
  if (Form::kTokens && n % 2) {
    Form::put(z_re, 0, Form::get(c, 0) * broadcast(kRoot2 * v.phase_re[0]));
    Form::put(z_im, 0, V{});
    for (int32_t k = 1; k <= m / 2; ++k) {
      const C z = mul({Form::get(c, k), Form::get(c, n - k)}, Form::table(v.phase_re, k), Form::table(v.phase_im, k));
      Form::put(z_re, k, z.re);
      Form::put(z_im, k, -z.im);
      Form::put(z_re, n - k, z.re);
      Form::put(z_im, n - k, z.im);
    }
    return;
  }
  mix_zero<Form>(c, c + int64_t(m) * Form::kLanes, z_re, z_im, kRoot2 * v.phase_re[0]);
  cover<Form>(m / 2, [&](int32_t k) __attribute__((always_inline)) {
    const C a = mul({Form::get(c, k), Form::get_down(c, n - k)}, Form::table(v.phase_re, k), Form::table(v.phase_im, k));
    const C b = mul({Form::get_down(c, m - k), Form::get(c, m + k)}, Form::table_down(v.phase_re, m - k),
                    Form::table_down(v.phase_im, m - k));
    const C e = {a.re + b.re, b.im - a.im};
    const C d = mul({a.re - b.re, -a.im - b.im}, Form::table(v.omega_re, k), -Form::table(v.omega_im, k));
    Form::put(z_re, k, e.re - d.im);
    Form::put(z_im, k, e.im + d.re);
    Form::put_down(z_re, m - k, e.re + d.im);
    Form::put_down(z_im, m - k, d.re - e.im);
  });
}

// --- reading x, writing y ---------------------------------------------------------------------------------------------------------------

// Where element i of a vector lies in Makhoul's order, packed to complex where n is even.
SDCT_INLINE float* makhoul(float* re, float* im, int32_t i, int32_t n, int32_t lanes) {
  const int64_t place = i % 2 ? n - 1 - i / 2 : i / 2;
  if (n % 2) return re + place * lanes;
  return (place % 2 ? im : re) + place / 2 * lanes;
}

template <class T>
SDCT_INLINE void read_tokens(const CpuView& v, const T* x, int64_t stride, int32_t count, float* re, float* im) {
  const int32_t n = v.n;
  for (int32_t first = 0; first < n; first += kWidth) {
    const int32_t now = n - first < kWidth ? n - first : kWidth;
    V a[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) {
      const T* p = x + (lane < count ? lane : count - 1) * stride + first;
      a[lane] = now == kWidth ? read(p) : read_some(p, now);
    }
    transpose(a);
    for (int32_t i = 0; i < now; ++i) store(makhoul(re, im, first + i, n, kWidth), a[i]);
  }
  if (n % 2) {
    for (int32_t i = 0; i < n; ++i) store(im + int64_t(i) * kWidth, V{});
  }
}

template <class T>
SDCT_INLINE void add_tokens(const CpuView& v, float* re, float* im, const T* y_in, int64_t in_stride, T* y_out,
                            int64_t out_stride, int32_t count) {
  const int32_t n = v.n;
  for (int32_t first = 0; first < n; first += kWidth) {
    const int32_t now = n - first < kWidth ? n - first : kWidth;
    V a[kWidth];
    for (int32_t i = 0; i < kWidth; ++i) a[i] = i < now ? load(makhoul(re, im, first + i, n, kWidth)) : V{};
    transpose(a);
    for (int lane = 0; lane < count; ++lane) {
      const T* from = y_in + lane * in_stride + first;
      T* to = y_out + lane * out_stride + first;
      if (now == kWidth) {
        write(to, read(from) + a[lane]);
      } else {
        write_some(to, read_some(from, now) + a[lane], now);
      }
    }
  }
}

// n is a multiple of 4 here: x[4i], x[4i + 2] are place i, x[4i + 3], x[4i + 1] place m - 1 - i.
template <class T>
SDCT_INLINE void read_single(const CpuView& v, const T* x, float* re, float* im) {
  const int32_t m = v.m, half = m / 2;
  for (int32_t i = 0; i < half; i += kWidth) {
    if (i + kWidth > half) i = half - kWidth;
    const T* p = x + 4 * i;
    const V a = read(p), b = read(p + kWidth), c = read(p + 2 * kWidth), d = read(p + 3 * kWidth);
    const V even_low = even(a, b), even_high = even(c, d), odd_low = odd(a, b), odd_high = odd(c, d);
    store(re + i, even(even_low, even_high));
    store(im + i, odd(even_low, even_high));
    store(im + m - i - kWidth, reverse(even(odd_low, odd_high)));
    store(re + m - i - kWidth, reverse(odd(odd_low, odd_high)));
  }
}

template <class T>
SDCT_INLINE void add_single(const CpuView& v, const float* re, const float* im, const T* y_in, T* y_out) {
  const int32_t m = v.m, half = m / 2;
  int32_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    const V x0 = load(re + i), x2 = load(im + i), x1 = reverse(load(im + m - i - kWidth)),
            x3 = reverse(load(re + m - i - kWidth));
    const V even_low = zip_low(x0, x2), even_high = zip_high(x0, x2), odd_low = zip_low(x1, x3), odd_high = zip_high(x1, x3);
    const T* from = y_in + 4 * i;
    T* to = y_out + 4 * i;
    const V a = read(from) + zip_low(even_low, odd_low), b = read(from + kWidth) + zip_high(even_low, odd_low);
    const V c = read(from + 2 * kWidth) + zip_low(even_high, odd_high), d = read(from + 3 * kWidth) + zip_high(even_high, odd_high);
    write(to, a);
    write(to + kWidth, b);
    write(to + 2 * kWidth, c);
    write(to + 3 * kWidth, d);
  }
  for (; i < half; ++i) {
    const V four = {re[i], im[m - 1 - i], im[i], re[m - 1 - i]};
    write_some(y_out + 4 * i, read_some(y_in + 4 * i, 4) + four, 4);
  }
}

// --- the operator ----------------------------------------------------------------------------------------------------------------------------

template <class Form>
SDCT_APART void sparse(uint32_t d_in, uint32_t d_out, const float* __restrict values, const int32_t* __restrict indices,
                       int32_t count, float scale, const float* __restrict spectrum, float* __restrict acc) {
  for (int32_t e = 0; e < count; ++e) {
    const uint32_t row = uint32_t(indices[2 * e]), col = uint32_t(indices[2 * e + 1]);
    if (row >= d_out || col >= d_in) continue;
    const float value = scale * values[e];
    if (Form::kTokens) {
      float* at = acc + size_t(row) * kWidth;
      store(at, fma(broadcast(value), load(spectrum + size_t(col) * kWidth), load(at)));
    } else {
      acc[row] = fma(value, spectrum[col], acc[row]);
    }
  }
}

template <class Form, class T>
SDCT_INLINE void apply(const CpuArgs& args, int64_t row, int64_t token, int32_t count, float* scratch) {
  const Problem& p = *args.problem;
  float *z_re = scratch, *z_im = z_re + args.z, *t_re = z_im + args.z, *t_im = t_re + args.t;
  float *spectrum = t_im + args.t, *acc = spectrum + args.spectrum;
  C* local = reinterpret_cast<C*>(acc + args.acc);

  const T* x = static_cast<const T*>(p.x) + token * p.x_stride;
  if (Form::kTokens) {
    read_tokens(*args.in, x, p.x_stride, count, z_re, z_im);
  } else {
    read_single(*args.in, x, z_re, z_im);
  }
  fft<Form>(*args.in, z_re, z_im, t_re, t_im, z_re, z_im, local);
  to_coefficients<Form>(*args.in, z_re, z_im, spectrum);

  for (int32_t j = 0; j < args.projections; ++j) {
    const CpuView& out = *args.out[j];
    __builtin_memset(acc, 0, size_t(out.n) * Form::kLanes * sizeof(float));
    for (int64_t k = 0; k < p.blends; ++k) {
      const int32_t id = p.ids[row * p.blends + k];
      if (id <= 0 || id >= p.slots) continue;
      const int64_t at = int64_t(id) * args.offset[args.projections] + args.offset[j];
      sparse<Form>(uint32_t(args.in->n), uint32_t(out.n), p.values + at, p.indices + 2 * at, args.capacity[j], p.scales[row * p.blends + k],
                   spectrum, acc);
    }
    from_coefficients<Form>(out, acc, z_re, z_im);
    // the inverse FFT is the forward one with real and imaginary parts exchanged
    fft<Form>(out, z_im, z_re, t_im, t_re, z_im, z_re, local);
    const T* y_in = static_cast<const T*>(p.y_in[j]) + token * p.y_in_stride[j];
    T* y_out = static_cast<T*>(p.y_out[j]) + token * p.y_out_stride[j];
    if (Form::kTokens) {
      add_tokens(out, z_re, z_im, y_in, p.y_in_stride[j], y_out, p.y_out_stride[j], count);
    } else {
      add_single(out, z_re, z_im, y_in, y_out);
    }
  }
}

template <class Form>
void dispatch(const CpuArgs& args, int64_t row, int64_t token, int32_t count, float* scratch) {
  switch (args.problem->type) {
    case DataType::kFloat32: apply<Form, F32>(args, row, token, count, scratch); break;
    case DataType::kFloat16: apply<Form, F16>(args, row, token, count, scratch); break;
    case DataType::kBFloat16: apply<Form, BF16>(args, row, token, count, scratch); break;
  }
}

void tokens(const CpuArgs& args, int64_t row, int64_t token, int32_t count, float* scratch) {
  dispatch<Tokens>(args, row, token, count, scratch);
}

void single(const CpuArgs& args, int64_t row, int64_t token, float* scratch) {
  dispatch<Single>(args, row, token, 1, scratch);
}

#define SDCT_TEXT2(name) #name
#define SDCT_TEXT(name) SDCT_TEXT2(name)
#define SDCT_JOIN2(a, b) a##b
#define SDCT_JOIN(a, b) SDCT_JOIN2(a, b)

constexpr CpuPath kPath = {SDCT_TEXT(SDCT_ISA), kWidth, tokens, single};

}  // namespace

const CpuPath& SDCT_JOIN(cpu_path_, SDCT_ISA)() { return kPath; }

}  // namespace sdct
