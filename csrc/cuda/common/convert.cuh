// Elements as f32 and back, one or several at a time, and words at any byte address: the caches and their pages need
// not be aligned.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

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

/// The same back, for finite values; one instruction per pair from sm_89.
__device__ inline uint32_t float_to_e4m3x4(float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 890
  const auto pair = [](float low, float high) {
    return uint32_t{__nv_cvt_float2_to_fp8x2({low, high}, __NV_SATFINITE, __NV_E4M3)};
  };
  return pair(a, b) | pair(c, d) << 16;
#else
  return float_to_e4m3(a) | float_to_e4m3(b) << 8 | float_to_e4m3(c) << 16 | uint32_t{float_to_e4m3(d)} << 24;
#endif
}

/// Two values as bf16, to the nearest, the first in the low half; NaN becomes 0x7fff.
__device__ inline uint32_t pack_bf16x2(float low, float high) {
  return __builtin_bit_cast(uint32_t, static_cast<__nv_bfloat162_raw>(__floats2bfloat162_rn(low, high)));
}

/// The same, but NaN as float_to_bf16 gives it.
__device__ inline uint32_t float_to_bf16x2(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);  // NaN: 0x7fff
  const auto bits = __builtin_bit_cast(uint32_t, static_cast<__nv_bfloat162_raw>(pair));
  return bits & ~(__hneu2_mask(pair, pair) & 0x003f003fu);
}

/// Whether loads and stores of `bytes` may start at `address`; true for null.
__host__ __device__ inline bool aligned(const void* address, int bytes) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0;
}

template <class Word, bool kAligned = true>
__device__ Word load_word(const void* from) {
  if constexpr (kAligned) return *static_cast<const Word*>(from);
  Word word;
  __builtin_memcpy(&word, from, sizeof word);
  return word;
}

template <bool kAligned = true, class Word>
__device__ void store_word(void* to, Word word) {
  if constexpr (kAligned) {
    *static_cast<Word*>(to) = word;
  } else {
    __builtin_memcpy(to, &word, sizeof word);
  }
}

/// x[0 … kCount - 1] from memory, in words of up to 16 bytes.
template <int kCount, bool kAligned = true, class T>
__device__ void load_values(const T* from, float* x) {
  constexpr int kBytes = kCount * static_cast<int>(sizeof(T)), kWord = kBytes < 16 ? kBytes : 16;
  using Word = std::conditional_t<kWord == 16, uint4, std::conditional_t<kWord == 8, uint2, uint32_t>>;
  uint32_t words[kBytes / 4];
#pragma unroll
  for (int i = 0; i < kBytes / kWord; ++i) {
    const auto word = load_word<Word, kAligned>(reinterpret_cast<const Word*>(from) + i);
    __builtin_memcpy(words + i * kWord / 4, &word, kWord);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = bits_float(words[i]);
    } else {
      x[i] = bits_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    }
  }
}

/// Eight values as bf16.
__device__ inline uint4 bf16_chunk(const float* x) {
  return {float_to_bf16x2(x[0], x[1]), float_to_bf16x2(x[2], x[3]), float_to_bf16x2(x[4], x[5]),
          float_to_bf16x2(x[6], x[7])};
}

/// Values of a vector over its scale, as e4m3; NaN bytes for a scale that is not finite.
class E4m3Encoder {
 public:
  __device__ explicit E4m3Encoder(float scale) : scale_(scale), finite_(is_finite(scale)) {
    const float estimate = __fdividef(1.0f, scale);  // a full division has a slow path that costs registers
    minus_inverse_ = -fmaf(fmaf(-scale, estimate, 1.0f), estimate, estimate);
  }

  /// Stores x[0 … kCount - 1]: four, or eight as one word.
  template <int kCount, bool kAligned = true>
  __device__ void store(const float* x, uint8_t* to) const {
    if constexpr (kCount == 4) {
      store_word<kAligned>(to, four(x));
    } else {
      static_assert(kCount == 8);
      store_word<kAligned>(to, uint2{four(x), four(x + 4)});
    }
  }

 private:
  __device__ uint32_t four(const float* x) const {
    const uint32_t bytes = float_to_e4m3x4(quotient(x[0]), quotient(x[1]), quotient(x[2]), quotient(x[3]));
    return finite_ ? bytes : kE4m3Nan * 0x01010101u;
  }

  /// x / scale in three instructions instead of ten. A remainder that underflows belongs to a quotient far below e4m3:
  /// the byte is that of a division, and so is the sign of zero.
  __device__ float quotient(float x) const {
    const float estimate = x * -minus_inverse_;
    return fmaf(fmaf(estimate, scale_, -x), minus_inverse_, estimate);
  }

  float scale_, minus_inverse_;
  bool finite_;
};

/// Up to four bytes, little-endian; bytes from `count` on read as 0.
__device__ inline uint32_t load_bytes(const uint8_t* from, int count) {
  if (count >= 4 && aligned(from, 4)) return *reinterpret_cast<const uint32_t*>(from);
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) word |= uint32_t{from[i]} << (8 * i);
  }
  return word;
}

__device__ inline float load_float(const uint8_t* from) { return bits_float(load_bytes(from, 4)); }
__device__ inline bf16_bits load_bf16(const uint8_t* from) { return static_cast<bf16_bits>(load_bytes(from, 2)); }

__device__ inline void store_float(uint8_t* to, float x) {
  if (aligned(to, sizeof x)) {
    store_word(to, x);
  } else {
    store_word<false>(to, x);
  }
}

}  // namespace indexcache::cuda
