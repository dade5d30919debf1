// The kernel.
//
// Work is a sequence of phases. Within a phase every thread of a block runs the same function of its index and no thread reads
// what another one writes; between phases stands a barrier. `Block` provides
//     int threads() const;
//     template <class F> void phase(F f);   // f(t) for every thread t, then a barrier
// Everything outside a phase is the same on every thread.
#ifndef SDCT_CORE_KERNEL_H_
#define SDCT_CORE_KERNEL_H_

#include "plan.h"

#if defined(__CUDACC__)
#define SDCT_DEVICE __device__ __forceinline__
#define SDCT_UNROLL _Pragma("unroll")
#else
#define SDCT_DEVICE inline
#define SDCT_UNROLL
#endif

namespace sdct {
namespace kernel {

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

template <int R>
SDCT_DEVICE void dft(Complex (&u)[R]) {  // odd R
  constexpr int kHalf = (R - 1) / 2;
  const OddRoots<R> roots;
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
  constexpr float kRoot = 0.707106781186547524f;
  Complex even[4] = {u[0], u[2], u[4], u[6]}, odd[4] = {u[1], u[3], u[5], u[7]};
  dft<4>(even);
  dft<4>(odd);
  odd[1] = {kRoot * (odd[1].re + odd[1].im), kRoot * (odd[1].im - odd[1].re)};   // exp(-i pi / 4)
  odd[2] = {odd[2].im, -odd[2].re};                                              // -i
  odd[3] = {kRoot * (odd[3].im - odd[3].re), -kRoot * (odd[3].re + odd[3].im)};  // exp(-3 i pi / 4)
  SDCT_UNROLL
  for (int j = 0; j < 4; ++j) {
    u[j] = even[j] + odd[j];
    u[j + 4] = even[j] - odd[j];
  }
}

// --- stages ------------------------------------------------------------------------------------------------------------------

// One stage of radix R over every sub-transform of `length`: butterfly, then twiddles (forward), or the mirror (inverse).
template <int R, bool kInverse, class Block>
SDCT_DEVICE void register_stage(Block& block, Complex* buffer, int32_t m, int32_t length, const Complex* twiddle) {
  const int32_t stride = length / R, count = m / R;
  block.phase([&](int32_t thread) {
    for (int32_t i = thread; i < count; i += block.threads()) {
      const int32_t sub = i / stride, q = i - sub * stride, first = sub * length + q;
      Complex u[R];
      SDCT_UNROLL
      for (int j = 0; j < R; ++j) u[j] = buffer[padded(first + j * stride)];
      if (kInverse) {
        if (stride > 1) {
          SDCT_UNROLL
          for (int j = 1; j < R; ++j) u[j] = u[j] * conj(twiddle[(j - 1) * stride + q]);
        }
        // the inverse transform is the forward one with real and imaginary parts exchanged
        SDCT_UNROLL
        for (int j = 0; j < R; ++j) u[j] = {u[j].im, u[j].re};
        dft<R>(u);
        SDCT_UNROLL
        for (int j = 0; j < R; ++j) u[j] = {u[j].im, u[j].re};
      } else {
        dft<R>(u);
        if (stride > 1) {
          SDCT_UNROLL
          for (int j = 1; j < R; ++j) u[j] = u[j] * twiddle[(j - 1) * stride + q];
        }
      }
      SDCT_UNROLL
      for (int j = 0; j < R; ++j) buffer[padded(first + j * stride)] = u[j];
    }
  });
}

// The same for any odd radix, as direct sums that go through scratch memory a few butterflies at a time.
template <bool kInverse, class Block>
SDCT_DEVICE void direct_stage(Block& block, Complex* buffer, Complex* scratch, int32_t scratch_size, int32_t m,
                              int32_t length, int32_t radix, const Complex* twiddle, const Complex* roots) {
  const int32_t stride = length / radix, count = m / radix, pairs = (radix + 1) / 2;
  if (kInverse && stride > 1) {
    block.phase([&](int32_t thread) {
      for (int32_t i = thread; i < m; i += block.threads()) {
        const int32_t within = i % length;
        if (within >= stride) buffer[padded(i)] = buffer[padded(i)] * conj(twiddle[within - stride]);
      }
    });
  }
  const int32_t at_once = scratch_size / radix;
  for (int32_t begin = 0; begin < count; begin += at_once) {
    const int32_t now = count - begin < at_once ? count - begin : at_once;
    block.phase([&](int32_t thread) {
      for (int32_t i = thread; i < now * pairs; i += block.threads()) {
        const int32_t k = i / now, local = i - k * now, butterfly = begin + local, sub = butterfly / stride;
        const int32_t first = sub * length + butterfly - sub * stride;
        const Complex u0 = buffer[padded(first)];
        Complex a = u0, b = {0.0f, 0.0f};
        int32_t angle = 0;
        for (int32_t j = 1; j < pairs; ++j) {
          angle += k;
          if (angle >= radix) angle -= radix;
          const Complex root = roots[angle];  // cosine and negative sine
          const Complex low = buffer[padded(first + j * stride)], high = buffer[padded(first + (radix - j) * stride)];
          a = {a.re + root.re * (low.re + high.re), a.im + root.re * (low.im + high.im)};
          b = {b.re + root.im * (low.re - high.re), b.im + root.im * (low.im - high.im)};
        }
        if (kInverse) b = {-b.re, -b.im};
        scratch[k * now + local] = k ? a + times_i(b) : a;
        if (k) scratch[(radix - k) * now + local] = a - times_i(b);
      }
    });
    block.phase([&](int32_t thread) {
      for (int32_t i = thread; i < now * radix; i += block.threads()) {
        const int32_t k = i / now, local = i - k * now, butterfly = begin + local, sub = butterfly / stride;
        const int32_t q = butterfly - sub * stride;
        Complex value = scratch[i];
        if (!kInverse && k > 0 && stride > 1) value = value * twiddle[(k - 1) * stride + q];
        buffer[padded(sub * length + q + k * stride)] = value;
      }
    });
  }
}

template <bool kInverse, class Block>
SDCT_DEVICE void stage(Block& block, const Transform& t, int32_t s, int32_t length, Complex* buffer, Complex* scratch) {
  const Complex* twiddle = t.twiddle + t.twiddle_offset[s];
  switch (t.radix[s]) {
    case 2: return register_stage<2, kInverse>(block, buffer, t.m, length, twiddle);
    case 3: return register_stage<3, kInverse>(block, buffer, t.m, length, twiddle);
    case 4: return register_stage<4, kInverse>(block, buffer, t.m, length, twiddle);
    case 5: return register_stage<5, kInverse>(block, buffer, t.m, length, twiddle);
    case 7: return register_stage<7, kInverse>(block, buffer, t.m, length, twiddle);
    case 8: return register_stage<8, kInverse>(block, buffer, t.m, length, twiddle);
    default:
      return direct_stage<kInverse>(block, buffer, scratch, t.scratch, t.m, length, t.radix[s], twiddle,
                                    t.twiddle + t.root_offset[s]);
  }
}

// --- reading x, writing y -----------------------------------------------------------------------------------------------------

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

template <class T>
SDCT_DEVICE bool fours(const T* pointer, int32_t n) {
  return n % 4 == 0 && reinterpret_cast<uintptr_t>(pointer) % sizeof(Four<T>) == 0;
}

// Place of element i of a vector in Makhoul's order.
SDCT_DEVICE int32_t makhoul(int32_t i, int32_t n) { return i % 2 ? n - 1 - i / 2 : i / 2; }

template <class T, class Block>
SDCT_DEVICE void read_vector(Block& block, const Transform& t, const T* x, Complex* buffer) {
  const int32_t n = t.n, m = t.m;
  if (fours(x, n)) {
    block.phase([&](int32_t thread) {
      for (int32_t i = thread; i < n / 4; i += block.threads()) {
        const Four<T> four = reinterpret_cast<const Four<T>*>(x)[i];
        buffer[padded(i)] = {to_float(four.at[0]), to_float(four.at[2])};
        buffer[padded(m - 1 - i)] = {to_float(four.at[3]), to_float(four.at[1])};
      }
    });
  } else if (n % 2 == 0) {
    block.phase([&](int32_t thread) {
      for (int32_t i = thread; i < n; i += block.threads()) {
        const int32_t place = makhoul(i, n);
        Complex& z = buffer[padded(place / 2)];
        (place % 2 ? z.im : z.re) = to_float(x[i]);
      }
    });
  } else {
    block.phase([&](int32_t thread) {
      for (int32_t i = thread; i < n; i += block.threads()) buffer[padded(makhoul(i, n))] = {to_float(x[i]), 0.0f};
    });
  }
}

template <class T>
SDCT_DEVICE T add(T y, float value) {
  T sum;
  from_float(to_float(y) + value, &sum);
  return sum;
}

template <class T, class Block>
SDCT_DEVICE void add_vector(Block& block, const Transform& t, const Complex* buffer, const T* y_in, T* y_out) {
  const int32_t n = t.n, m = t.m;
  if (fours(y_in, n) && fours(y_out, n)) {
    block.phase([&](int32_t thread) {
      for (int32_t i = thread; i < n / 4; i += block.threads()) {
        const Complex low = buffer[padded(i)], high = buffer[padded(m - 1 - i)];
        Four<T> four = reinterpret_cast<const Four<T>*>(y_in)[i];
        four.at[0] = add(four.at[0], low.re);
        four.at[1] = add(four.at[1], high.im);
        four.at[2] = add(four.at[2], low.im);
        four.at[3] = add(four.at[3], high.re);
        reinterpret_cast<Four<T>*>(y_out)[i] = four;
      }
    });
  } else {
    block.phase([&](int32_t thread) {
      for (int32_t i = thread; i < n; i += block.threads()) {
        const int32_t place = makhoul(i, n);
        float value;
        if (n % 2) {
          value = buffer[padded(place)].re;
        } else {
          const Complex z = buffer[padded(place / 2)];
          value = place % 2 ? z.im : z.re;
        }
        y_out[i] = add(y_in[i], value);
      }
    });
  }
}

template <class T, class Block>
SDCT_DEVICE void copy_vector(Block& block, int32_t n, const T* y_in, T* y_out) {
  const bool wide = fours(y_in, n) && fours(y_out, n);
  block.phase([&](int32_t thread) {
    if (wide) {
      for (int32_t i = thread; i < n / 4; i += block.threads()) {
        reinterpret_cast<Four<T>*>(y_out)[i] = reinterpret_cast<const Four<T>*>(y_in)[i];
      }
    } else {
      for (int32_t i = thread; i < n; i += block.threads()) y_out[i] = y_in[i];
    }
  });
}

// --- the two cosine transforms ------------------------------------------------------------------------------------------------

constexpr float kRoot2 = 1.41421356237309505f;

// buffer: the vector in Makhoul's order -> its coefficients, coefficient c at place(t, c).
template <class Block>
SDCT_DEVICE void forward(Block& block, const Transform& t, Complex* buffer, Complex* scratch) {
  const int32_t n = t.n, m = t.m;
  int32_t length = m;
  for (int32_t s = 0; s < t.stages; ++s) {
    stage<false>(block, t, s, length, buffer, scratch);
    length /= t.radix[s];
  }
  if (n % 2) {
    block.phase([&](int32_t thread) {
      for (int32_t k = thread; k < m; k += block.threads()) {
        Complex& z = buffer[t.position[k]];
        z.re = (t.phase[k] * z).re * (k ? 2.0f : kRoot2);
      }
    });
    return;
  }
  block.phase([&](int32_t thread) {
    for (int32_t k = thread; k <= m / 2; k += block.threads()) {
      Complex& low = buffer[t.position[k]];
      Complex& high = buffer[t.position[m - k]];
      if (k == 0) {
        const float g = kRoot2 * t.phase[0].re;
        low = {g * (low.re + low.im), g * (low.re - low.im)};
      } else {
        const Complex a = low, b = conj(high), even = a + b, odd = t.omega[k] * times_i(b - a);
        low = conj(t.phase[k] * (even + odd));
        high = conj(t.phase[m - k] * conj(even - odd));
      }
    }
  });
}

// The mirror: coefficients -> the vector in Makhoul's order.
template <class Block>
SDCT_DEVICE void inverse(Block& block, const Transform& t, Complex* buffer, Complex* scratch) {
  const int32_t n = t.n, m = t.m;
  if (n % 2) {
    block.phase([&](int32_t thread) {
      for (int32_t k = thread; k <= m / 2; k += block.threads()) {
        Complex& low = buffer[t.position[k]];
        if (k == 0) {
          low = {kRoot2 * t.phase[0].re * low.re, 0.0f};
        } else {
          Complex& high = buffer[t.position[m - k]];
          low = conj(t.phase[k]) * Complex{low.re, -high.re};
          high = conj(low);
        }
      }
    });
  } else {
    block.phase([&](int32_t thread) {
      for (int32_t k = thread; k <= m / 2; k += block.threads()) {
        Complex& low = buffer[t.position[k]];
        Complex& high = buffer[t.position[m - k]];
        if (k == 0) {
          const float g = kRoot2 * t.phase[0].re;
          low = {g * (low.re + low.im), g * (low.re - low.im)};
        } else {
          const Complex a = conj(t.phase[k] * low), b = t.phase[m - k] * high;
          const Complex even = a + b, odd = times_i(conj(t.omega[k]) * (a - b));
          low = even + odd;
          high = conj(even - odd);
        }
      }
    });
  }
  int32_t length = 1;
  for (int32_t s = t.stages - 1; s >= 0; --s) {
    length *= t.radix[s];
    stage<true>(block, t, s, length, buffer, scratch);
  }
}

// Where coefficient c lies in a buffer seen as floats.
SDCT_DEVICE int32_t place(const Transform& t, int32_t c) {
  return c < t.m ? 2 * t.position[c] : 2 * t.position[t.n - c] + 1;
}

// --- the sparse part ------------------------------------------------------------------------------------------------------------

struct Entry {  // a bank entry with its column gathered
  float value;
  int32_t row;  // -1: contributes nothing
};
static_assert(sizeof(Entry) == sizeof(Complex), "entries share the scratch memory");

// acc[row] += scale * sum of value * spectrum[col] over the entries of a row, one thread per row, in the bank's order.
template <class Block>
SDCT_DEVICE void sparse(Block& block, const Transform& in, const Transform& out, const Complex* spectrum, Complex* acc,
                        Complex* scratch, const float* values, const int32_t* indices, int32_t count, float scale) {
  Entry* entries = reinterpret_cast<Entry*>(scratch);
  const float* coefficients = reinterpret_cast<const float*>(spectrum);
  float* sums = reinterpret_cast<float*>(acc);
  for (int32_t begin = 0; begin < count; begin += kEntriesAtOnce) {
    const int32_t now = count - begin < kEntriesAtOnce ? count - begin : kEntriesAtOnce;
    block.phase([&](int32_t thread) {
      for (int32_t i = thread; i < now; i += block.threads()) {
        const int32_t e = begin + i;
        const int32_t row = indices[2 * int64_t(e)], col = indices[2 * int64_t(e) + 1];
        const float value = values[e];
        Entry entry = {0.0f, -1};
        // an unused place repeats its predecessor with value 0: it must not lengthen the last row's sum
        const bool unused =
            value == 0.0f && e > 0 && indices[2 * int64_t(e) - 2] == row && indices[2 * int64_t(e) - 1] == col;
        if (!unused && uint32_t(row) < uint32_t(out.n)) {
          entry.row = row;
          if (uint32_t(col) < uint32_t(in.n)) entry.value = value * coefficients[place(in, col)];
        }
        entries[i] = entry;
      }
    });
    block.phase([&](int32_t thread) {
      for (int32_t i = thread; i < now; i += block.threads()) {
        const int32_t row = entries[i].row;
        if (row < 0 || (i > 0 && entries[i - 1].row == row)) continue;
        float sum = entries[i].value;
        for (int32_t j = i + 1; j < now && entries[j].row == row; ++j) sum += entries[j].value;
        sums[place(out, row)] += scale * sum;
      }
    });
  }
}

// --- one token --------------------------------------------------------------------------------------------------------------------

// Token `token` through the projections first .. last - 1; `memory` is block_bytes(args), aligned to 16.
template <class T, class Block>
SDCT_DEVICE void run_token(Block& block, const KernelArgs& args, Complex* memory, int64_t token, int32_t first, int32_t last) {
  const Problem& p = args.problem;
  Complex* const spectrum = memory;
  Complex* const acc = spectrum + args.in.buffer;
  Complex* const scratch = acc + args.acc_buffer;

  const int64_t row = p.token_row ? int64_t(p.token_row[token]) : token / args.tokens_per_row;
  const bool has_row = row >= 0 && row < p.rows;
  bool active = false;
  for (int64_t k = 0; has_row && k < p.blends; ++k) {
    const int32_t id = p.ids[row * p.blends + k];
    active = active || (id > 0 && id < p.slots);
  }
  if (active) {
    read_vector(block, args.in, static_cast<const T*>(p.x) + token * p.x_stride, spectrum);
    forward(block, args.in, spectrum, scratch);
  }
  for (int32_t j = first; j < last; ++j) {
    const T* y_in = static_cast<const T*>(p.y_in[j]) + token * p.y_in_stride[j];
    T* y_out = static_cast<T*>(p.y_out[j]) + token * p.y_out_stride[j];
    if (!active) {
      if (y_in != y_out) copy_vector(block, args.out[j].n, y_in, y_out);
      continue;
    }
    block.phase([&](int32_t thread) {
      for (int32_t i = thread; i < args.out[j].buffer; i += block.threads()) acc[i] = {0.0f, 0.0f};
    });
    for (int64_t k = 0; k < p.blends; ++k) {
      const int32_t id = p.ids[row * p.blends + k];
      if (id <= 0 || id >= p.slots) continue;
      const int64_t at = int64_t(id) * args.entries + args.offset[j];
      sparse(block, args.in, args.out[j], spectrum, acc, scratch, p.values + at, p.indices + 2 * at, args.capacity[j],
             p.scales[row * p.blends + k]);
    }
    inverse(block, args.out[j], acc, scratch);
    add_vector(block, args.out[j], acc, y_in, y_out);
  }
}

}  // namespace kernel
}  // namespace sdct

#endif  // SDCT_CORE_KERNEL_H_
