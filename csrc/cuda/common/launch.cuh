// Launches. Grids of kernels that walk their work in a loop of stride gridDim.x fit any amount of it; larger blocks and
// clusters than the default need leave, once per kernel and device.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
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

/// Name the fields.
struct Launch {
  int64_t blocks;
  int threads;
  int shared_bytes = 0;
  int cluster = 1;            // blocks that share their memory; divides `blocks`
  bool early = false;         // may start before the kernel before it ends (dependent_launch.cuh)
  int most_shared_bytes = 0;  // of any launch of the kernel, where they differ
};

/// Launches `kKernel(args...)`.
template <auto kKernel, class... Args>
void launch(const char* op, const Launch& how, CUstream_st* stream, const Args&... args) {
  if (how.blocks > kMaxGrid) check(op, cudaErrorInvalidConfiguration);  // the cast below would cut it
  static std::atomic<uint64_t> prepared{0};  // a bit per device; asking again does no harm
  const uint64_t bit = uint64_t{1} << current_device() % 64;
  if ((prepared & bit) == 0) {
    constexpr auto kShared = cudaFuncAttributeMaxDynamicSharedMemorySize;
    constexpr auto kLarge = cudaFuncAttributeNonPortableClusterSizeAllowed;
    check(op, cudaFuncSetAttribute(kKernel, kShared, std::max(how.shared_bytes, how.most_shared_bytes)));
    check(op, cudaFuncSetAttribute(kKernel, kLarge, 1));  // also if this call's cluster is small: a later one may not be
    prepared |= bit;
  }
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (how.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(how.cluster), 1, 1};
  }
  if (how.early) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(how.blocks);
  config.blockDim = static_cast<unsigned>(how.threads);
  config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  check(op, cudaLaunchKernelEx(&config, kKernel, args...));
}

}  // namespace indexcache::cuda
