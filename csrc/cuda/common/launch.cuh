// Grids. Kernels walk their work in a loop of stride gridDim.x, so any amount of it fits a one-dimensional grid.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/cuda/common/device.h"

namespace indexcache::cuda {

inline constexpr int64_t kMaxGrid = INT32_MAX;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Launches `kernel(params)` on up to `blocks` blocks; an empty grid is not launched.
template <class Params>
void launch(const char* op, void (*kernel)(Params), int64_t blocks, int threads, int64_t shared_bytes,
            CUstream_st* stream, const Params& params) {
  if (blocks <= 0) return;
  const auto grid = static_cast<unsigned>(std::min(blocks, kMaxGrid));
  kernel<<<grid, threads, static_cast<size_t>(shared_bytes), stream>>>(params);
  check_launch(op);
}

}  // namespace indexcache::cuda
