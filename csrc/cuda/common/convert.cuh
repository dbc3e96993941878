// Elements as f32 and back, and words at any byte address: the caches and their pages need not be aligned.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "csrc/common/numeric.h"

namespace indexcache::cuda {

using bf16_bits = uint16_t;  // as in numeric.h, which makes host and device agree bit for bit

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16_bits x) { return bf16_to_float(x); }

__device__ inline void store(float* to, float x) { *to = x; }
__device__ inline void store(bf16_bits* to, float x) { *to = float_to_bf16(x); }

/// Four e4m3 values, the lowest byte first; one instruction per pair from sm_89.
__device__ inline float4 e4m3x4_to_float(uint32_t word) {
  const auto pair = [](uint32_t bits) {
    return __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(bits), __NV_E4M3)));
  };
  const float2 low = pair(word & 0xffffu), high = pair(word >> 16);
  return {low.x, low.y, high.x, high.y};
}

/// Up to four bytes, little-endian; bytes from `count` on read as 0.
__device__ inline uint32_t load_bytes(const uint8_t* from, int count) {
  if (count >= 4 && reinterpret_cast<uintptr_t>(from) % 4 == 0) return *reinterpret_cast<const uint32_t*>(from);
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) word |= uint32_t{from[i]} << (8 * i);
  }
  return word;
}

__device__ inline float load_float(const uint8_t* from) { return bits_float(load_bytes(from, 4)); }
__device__ inline bf16_bits load_bf16(const uint8_t* from) { return static_cast<bf16_bits>(load_bytes(from, 2)); }

__device__ inline void store_bytes(uint8_t* to, uint32_t word, int count) {
  for (int i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(word >> (8 * i));
}

__device__ inline void store_float(uint8_t* to, float x) { store_bytes(to, float_bits(x), 4); }
__device__ inline void store_bf16(uint8_t* to, bf16_bits x) { store_bytes(to, x, 2); }

}  // namespace indexcache::cuda
