// Element types and complex numbers for host and device.
#ifndef SDCT_CORE_NUMERICS_H_
#define SDCT_CORE_NUMERICS_H_

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SDCT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SDCT_HOST_DEVICE inline
#endif

namespace sdct {

struct alignas(8) Complex {
  float re, im;
};

SDCT_HOST_DEVICE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
SDCT_HOST_DEVICE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
SDCT_HOST_DEVICE Complex operator*(Complex a, Complex b) {
#if defined(__CUDA_ARCH__)  // written out: PTX would leave products and sums apart
  return {__fmaf_rn(a.re, b.re, -(a.im * b.im)), __fmaf_rn(a.re, b.im, a.im * b.re)};
#else
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
#endif
}
SDCT_HOST_DEVICE Complex conj(Complex a) { return {a.re, -a.im}; }
SDCT_HOST_DEVICE Complex times_i(Complex a) { return {-a.im, a.re}; }

// 16-bit elements hold bits only; arithmetic is float32.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

SDCT_HOST_DEVICE uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude < 0x400u) return bits_float(sign | float_bits(float(magnitude) * 5.960464477539063e-8f));  // 2^-24
  return bits_float(sign | ((magnitude << 13) + 0x38000000u));
}

// Rounds to nearest, ties to even.
inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 2^16 or more
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves a multiple of 2^-24 in the low bits
    return uint16_t(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
}

inline float bfloat16_to_float(uint16_t b) { return bits_float(uint32_t(b) << 16); }

SDCT_HOST_DEVICE uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40u);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

SDCT_HOST_DEVICE float to_float(float value) { return value; }
SDCT_HOST_DEVICE float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  return half_to_float(value.bits);
#endif
}
SDCT_HOST_DEVICE float to_float(BFloat16 value) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(uint32_t(value.bits) << 16);
#else
  return bfloat16_to_float(value.bits);
#endif
}

SDCT_HOST_DEVICE void from_float(float value, float* out) { *out = value; }
SDCT_HOST_DEVICE void from_float(float value, Half* out) {
#if defined(__CUDA_ARCH__)
  out->bits = __half_as_ushort(__float2half_rn(value));
#else
  out->bits = float_to_half(value);
#endif
}
SDCT_HOST_DEVICE void from_float(float value, BFloat16* out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800  // CUDA 11 has the conversion back from there on
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  out->bits = float_to_bfloat16(value);
#endif
}

}  // namespace sdct

#endif  // SDCT_CORE_NUMERICS_H_
