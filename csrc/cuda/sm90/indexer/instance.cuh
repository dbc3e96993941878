// The definitions that instances/*.cu instantiate.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/cuda/common/device.h"
#include "csrc/cuda/sm90/indexer/launch.cuh"

namespace indexcache::sm90::indexer {

/// `early`: the kernel may start before the one before it ends (dependent_launch.cuh).
template <class T, class Call>
void launch(const char* op, void (*kernel)(Call), const Call& call, int blocks, bool early, CUstream_st* stream) {
  constexpr int kBytes = sizeof(Shared<T>);
  static_assert(kBytes <= 227 << 10);
  cuda::check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = early;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cuda::check(op, cudaLaunchKernelEx(&config, kernel, call));
}

template <class T>
void launch_dense(const DenseCall& call, int blocks, CUstream_st* stream) {
  launch<T>("indexer_logits", dense_kernel<T>, call, blocks, false, stream);
}

template <class T>
void launch_paged(const PagedCall& call, int blocks, CUstream_st* stream) {
  launch<T>("indexer_logits_paged", paged_kernel<T>, call, blocks, true, stream);
}

}  // namespace indexcache::sm90::indexer
