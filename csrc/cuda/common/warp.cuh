// Sums and maxima over a warp or a block, always in the same order, so that results do not vary from run to run.
#pragma once

#include <cstdint>

namespace indexcache::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x % kWarpSize); }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x / kWarpSize); }

/// The index of this warp in the grid, and the number of warps there: the loop of a kernel with a warp per item.
__device__ inline int64_t grid_warp() { return int64_t{blockIdx.x} * (blockDim.x / kWarpSize) + warp_id(); }
__device__ inline int64_t grid_warps() { return int64_t{gridDim.x} * (blockDim.x / kWarpSize); }

/// NaN if one of them is.
__device__ inline float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ inline float warp_sum(float x) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

/// Ignores NaN, as fmaxf does.
__device__ inline float warp_max(float x) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, offset));
  return x;
}

/// Sum over the lanes before this one.
__device__ inline uint32_t warp_exclusive_sum(uint32_t value) {
  uint32_t inclusive = value;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    // The shuffle itself says which lanes have a source: two instructions instead of four.
    asm volatile(
        "{\n  .reg .u32 left;\n  .reg .pred exists;\n"
        "  shfl.sync.up.b32 left|exists, %0, %1, 0, -1;\n"
        "  @exists add.u32 %0, %0, left;\n}"
        : "+r"(inclusive)
        : "r"(offset));
  }
  return inclusive - value;
}

struct BlockSum {
  uint32_t before;  // over the threads with a lower index
  uint32_t total;   // over all threads
};

/// Called by all `kThreads` threads of the block; shared memory written before it is visible after it. Another call
/// needs a barrier before it.
template <int kThreads>
__device__ BlockSum block_exclusive_sum(uint32_t value) {
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ uint32_t warp_totals[kWarps];
  const uint32_t before = warp_exclusive_sum(value);
  if (lane_id() == kWarpSize - 1) warp_totals[warp_id()] = before + value;
  __syncthreads();
  const uint32_t total = lane_id() < kWarps ? warp_totals[lane_id()] : 0;
  const uint32_t earlier_warps = __reduce_add_sync(kFullMask, lane_id() < warp_id() ? total : 0);
  return {earlier_warps + before, __reduce_add_sync(kFullMask, total)};
}

}  // namespace indexcache::cuda
