// The 656-byte row of the latent cache: 512 e4m3, 4 f32 scales, 64 bf16.
#pragma once

#include "csrc/cuda/common/convert.cuh"

namespace indexcache::cuda {

inline constexpr int kLatentGroups = kLatentDim / kLatentScaleGroup;
inline constexpr int kLatentScaleOffset = kLatentDim;  // bytes into the row
inline constexpr int kLatentRopeOffset = kLatentScaleOffset + kLatentGroups * static_cast<int>(sizeof(float));

/// The scale of entry `d` of 576; the rotary part has none.
__device__ inline float latent_scale(const uint8_t* row, int d) {
  const int group = d / static_cast<int>(kLatentScaleGroup);
  return group < kLatentGroups ? load_float(row + kLatentScaleOffset + group * static_cast<int>(sizeof(float))) : 1.0f;
}

/// Dequantised entry `d`, whose scale the caller has: bf16, as in gather_latent_kv.
__device__ inline float latent_element(const uint8_t* row, int d, float scale) {
  const int rope = d - static_cast<int>(kLatentDim);
  return to_float(rope < 0 ? float_to_bf16(e4m3_to_float(row[d]) * scale)
                           : load_bf16(row + kLatentRopeOffset + 2 * rope));
}

}  // namespace indexcache::cuda
