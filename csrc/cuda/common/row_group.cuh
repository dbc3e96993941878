// Neighbouring lanes that share a row. All lanes of the warp call its functions.
#pragma once

#include "csrc/cuda/common/warp.cuh"

namespace indexcache::cuda {

template <int kLaneCount>
struct RowGroup {
  static constexpr int kLanes = kLaneCount;          // a power of two up to a warp
  static constexpr int kRows = kWarpSize / kLanes;  // of a warp

  __device__ static int lane() { return lane_id() % kLanes; }
  __device__ static int row() { return lane_id() / kLanes; }  // of the warp's

  __device__ static float sum(float x) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
    return x;
  }

  /// NaN if one of them is.
  __device__ static float max(float x) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) x = max_or_nan(x, __shfl_xor_sync(kFullMask, x, offset));
    return x;
  }
};

}  // namespace indexcache::cuda
