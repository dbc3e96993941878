// Sums and maxima over a warp or a block, always in the same order, so that results do not vary from run to run.
#pragma once

#include <cstdint>

namespace indexcache::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / kWarpSize; }

/// The index of this warp in the grid, and the number of warps there: the loop of a kernel with a warp per item.
__device__ inline int64_t grid_warp() { return int64_t{blockIdx.x} * (blockDim.x / kWarpSize) + warp_id(); }
__device__ inline int64_t grid_warps() { return int64_t{gridDim.x} * (blockDim.x / kWarpSize); }

__device__ inline float warp_sum(float x) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

/// Ignores NaN, as fmaxf does.
__device__ inline float warp_max(float x) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, offset));
  return x;
}

struct BlockSum {
  uint32_t before;  // over the threads with a lower index
  uint32_t total;   // over all threads
};

/// Called by all `kThreads` threads of the block; shared memory written before it is visible after it.
template <int kThreads>
__device__ BlockSum block_exclusive_sum(uint32_t value) {
  __shared__ uint32_t warp_totals[kThreads / kWarpSize];
  uint32_t inclusive = value;
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const uint32_t left = __shfl_up_sync(kFullMask, inclusive, offset);
    if (lane_id() >= offset) inclusive += left;
  }
  if (lane_id() == kWarpSize - 1) warp_totals[warp_id()] = inclusive;
  __syncthreads();
  BlockSum sum{inclusive - value, 0};
  for (int warp = 0; warp < kThreads / kWarpSize; ++warp) {
    if (warp < warp_id()) sum.before += warp_totals[warp];
    sum.total += warp_totals[warp];
  }
  __syncthreads();  // the next call overwrites warp_totals
  return sum;
}

}  // namespace indexcache::cuda
