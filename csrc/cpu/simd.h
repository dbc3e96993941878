// Vectors of 32-bit lanes, as wide as the instruction set of the file that includes this: files under isa/ only.
//
// The vector types are the compiler's own (arithmetic, comparison and ?: work lane by lane); only what they cannot say
// is written with intrinsics. Everything lives in the namespace of the level, so no two levels share a symbol.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace indexcache::cpu::INDEXCACHE_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif
inline constexpr int kLanes = kVectorBytes / 4;

using Floats = float __attribute__((vector_size(kVectorBytes)));
using Ints = int32_t __attribute__((vector_size(kVectorBytes)));
using Words = uint32_t __attribute__((vector_size(kVectorBytes)));

/// Reads a vector from any address.
template <class Vector>
inline Vector load(const void* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <class Vector>
inline void store(void* to, Vector v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

inline Floats broadcast(float x) { return x - Floats{}; }
inline Ints broadcast(int32_t x) { return x - Ints{}; }
inline Words broadcast(uint32_t x) { return x - Words{}; }

/// a * b + c, in one rounding where the machine can: always the same way within a level.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

/// Bit i is set where low <= x[i] <= high.
inline uint32_t lanes_between(Ints x, Ints low, Ints high) {
#if defined(__AVX512F__)
  const __m512i lanes = reinterpret_cast<__m512i>(x);
  const __mmask16 above = _mm512_cmpge_epi32_mask(lanes, reinterpret_cast<__m512i>(low));
  return _mm512_mask_cmple_epi32_mask(above, lanes, reinterpret_cast<__m512i>(high));
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>((x >= low) & (x <= high)));
#elif defined(__SSE2__)
  return _mm_movemask_ps(reinterpret_cast<__m128>((x >= low) & (x <= high)));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(low[i] <= x[i] && x[i] <= high[i]) << i;
  return mask;
#endif
}

/// e4m3 bytes -> float, lane by lane: U is uint32_t or Words (one byte in each lane), F the float type of its size.
template <class F, class U>
inline F e4m3_to_float(U byte) {
  const U magnitude = byte & 0x7fu;
  const U sign = (byte & 0x80u) << 24;
  // The bias grows from 7 to 127. A subnormal 0.m is read as 1.m of the lowest exponent, and the 1 taken off again.
  const U normal = (magnitude << 20) + (120u << 23);
  const F one_dot_m = __builtin_bit_cast(F, normal + (1u << 23));
  const U subnormal = __builtin_bit_cast(U, one_dot_m - 0x1p-6f);
  const U nan = magnitude - magnitude + 0x7fc00000u;
  U bits = magnitude < 8u ? subnormal : normal;
  bits = magnitude == 0x7fu ? nan : bits;
  return __builtin_bit_cast(F, bits | sign);
}

}  // namespace indexcache::cpu::INDEXCACHE_ISA
