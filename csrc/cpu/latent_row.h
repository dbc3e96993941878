// One row of the latent cache: 512 e4m3 | 4 f32 scales | 64 bf16 rope. Static for the reason that numeric.h gives.
#pragma once

#include <cstring>

#include "csrc/common/numeric.h"

namespace indexcache::cpu {

inline constexpr int64_t kLatentRow = kLatentDim + kRopeDim;  // values
inline constexpr int64_t kScaleOffset = kLatentDim;           // bytes into a row
inline constexpr int64_t kRopeOffset = kScaleOffset + kLatentDim / kLatentScaleGroup * 4;

/// Values [576] as bf16: an f32 product, rounded. The row is these values for all who read it.
static inline void decode_latent_row(const uint8_t* row, uint16_t* out) {
  for (int64_t first = 0; first < kLatentDim; first += kLatentScaleGroup) {
    float scale;
    std::memcpy(&scale, row + kScaleOffset + first / kLatentScaleGroup * 4, sizeof scale);
    for (int64_t i = first; i < first + kLatentScaleGroup; ++i) {
      out[i] = float_to_bf16(e4m3_to_float(row[i]) * scale);
    }
  }
  uint16_t rope[kRopeDim];
  std::memcpy(rope, row + kRopeOffset, sizeof rope);
  for (int64_t i = 0; i < kRopeDim; ++i) out[kLatentDim + i] = float_to_bf16(bf16_to_float(rope[i]));
}

/// From f32 [576]. A group with a NaN or an infinity gets NaN bytes and a NaN scale.
static inline void encode_latent_row(const float* values, uint8_t* row) {
  for (int64_t first = 0; first < kLatentDim; first += kLatentScaleGroup) {
    const float scale = encode_e4m3(values + first, kLatentScaleGroup, /*ue8m0=*/false, row + first);
    std::memcpy(row + kScaleOffset + first / kLatentScaleGroup * 4, &scale, sizeof scale);
  }
  uint16_t rope[kRopeDim];
  for (int64_t i = 0; i < kRopeDim; ++i) rope[i] = float_to_bf16(values[kLatentDim + i]);
  std::memcpy(row + kRopeOffset, rope, sizeof rope);
}

}  // namespace indexcache::cpu
