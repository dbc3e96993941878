// Number formats of the caches, bit for bit the same on host and device: bf16, e4m3, power-of-two scales.
//
// Functions are static because the CPU backend compiles this header once per instruction set: an out-of-line copy that
// the linker shares between levels could be one that an older CPU cannot run.
#pragma once

#include <cstdint>

#include "indexcache/params.h"

namespace indexcache {

inline constexpr float kE4m3Max = 448.0f;
inline constexpr uint8_t kE4m3Nan = 0x7f;

static INDEXCACHE_HOST_DEVICE inline uint32_t float_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
static INDEXCACHE_HOST_DEVICE inline float bits_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }

static INDEXCACHE_HOST_DEVICE inline float quiet_nan() { return bits_float(0x7fc00000u); }

static INDEXCACHE_HOST_DEVICE inline bool is_finite(float x) { return (float_bits(x) & 0x7f800000u) != 0x7f800000u; }

/// A product or sum that the compiler may not fuse into a multiply-add, so that host and device round alike.
static INDEXCACHE_HOST_DEVICE inline float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
static INDEXCACHE_HOST_DEVICE inline float add_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

static INDEXCACHE_HOST_DEVICE inline float bf16_to_float(uint16_t x) { return bits_float(uint32_t{x} << 16); }

/// Nearest-even; every NaN becomes 0x7fc0.
static INDEXCACHE_HOST_DEVICE inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

/// Elements [first, first + n) of an f32 or bf16 array.
static INDEXCACHE_HOST_DEVICE inline void load_floats(const void* data, DType dtype, int64_t first, int64_t n,
                                                      float* out) {
  if (dtype == DType::bf16) {
    const uint16_t* values = static_cast<const uint16_t*>(data) + first;
    for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_float(values[i]);
  } else {
    const float* values = static_cast<const float*>(data) + first;
    for (int64_t i = 0; i < n; ++i) out[i] = values[i];
  }
}

/// Exact; 0x7f and 0xff are NaN.
static INDEXCACHE_HOST_DEVICE inline float e4m3_to_float(uint8_t x) {
  const uint32_t sign = (x & 0x80u) << 24;
  const uint32_t magnitude = x & 0x7fu;
  // 4 exponent and 3 mantissa bits move to their place in binary32, and the bias from 7 to 127.
  const uint32_t normal = (magnitude << 20) + (120u << 23);
  // Below 8 the value is magnitude * 2^-9: the low bits of a float near 2^14, less 2^14.
  const uint32_t subnormal = float_bits(bits_float(float_bits(0x1p14f) + magnitude) - 0x1p14f);
  const uint32_t finite = magnitude < 8u ? subnormal : normal;
  return bits_float((magnitude == 0x7fu ? 0x7fc00000u : finite) | sign);
}

/// Nearest-even, saturating at +-448 (infinities too); every NaN becomes 0x7f or 0xff.
static INDEXCACHE_HOST_DEVICE inline uint8_t float_to_e4m3(float x) {
  const uint32_t sign = (float_bits(x) >> 24) & 0x80u;
  const uint32_t magnitude = float_bits(x) & 0x7fffffffu;
  const uint32_t normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  // Below 2^-6 the spacing is 2^-9, that of floats just above 2^14: the addition rounds, the low bits are the result.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0x1p14f) - float_bits(0x1p14f);
  const uint32_t finite = magnitude < float_bits(0x1p-6f) ? subnormal : normal;
  const uint32_t saturated = magnitude >= float_bits(kE4m3Max) ? 0x7eu : finite;
  return static_cast<uint8_t>(sign | (magnitude > 0x7f800000u ? kE4m3Nan : saturated));
}

/// x / 448 for x >= 1e-4.
static INDEXCACHE_HOST_DEVICE inline float over_e4m3_max(float x) {
#if defined(__CUDA_ARCH__)
  // The same bits for every such x (all were compared); a division has a slow path, which costs registers.
  constexpr float kInverse = 1.0f / kE4m3Max;
  const float estimate = __fmul_rn(x, kInverse);
  return __fmaf_rn(__fmaf_rn(estimate, -kE4m3Max, x), kInverse, estimate);
#else
  return x / kE4m3Max;
#endif
}

/// The scale that maps a vector of this largest magnitude onto e4m3; `ue8m0` rounds it up to a power of two.
/// Callers handle a magnitude that is not finite.
static INDEXCACHE_HOST_DEVICE inline float e4m3_scale(float amax, bool ue8m0) {
  const float scale = over_e4m3_max(amax > 1e-4f ? amax : 1e-4f);
  return ue8m0 ? bits_float((float_bits(scale) + 0x7fffffu) & 0x7f800000u) : scale;
}

/// Quantises one vector and returns its scale. A vector with a NaN or an infinity gets NaN bytes and a NaN scale.
static INDEXCACHE_HOST_DEVICE inline float encode_e4m3(const float* x, int64_t n, bool ue8m0, uint8_t* out) {
  uint32_t amax = 0;  // magnitudes order like their bits, NaN and infinity last
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = float_bits(x[i]) & 0x7fffffffu;
    amax = magnitude > amax ? magnitude : amax;
  }
  if (amax >= 0x7f800000u) {
    for (int64_t i = 0; i < n; ++i) out[i] = kE4m3Nan;
    return quiet_nan();
  }
  const float scale = e4m3_scale(bits_float(amax), ue8m0);
  for (int64_t i = 0; i < n; ++i) out[i] = float_to_e4m3(x[i] / scale);
  return scale;
}

}  // namespace indexcache
