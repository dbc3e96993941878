// The definitions that instances/*.cu instantiate.
#pragma once

#include <cuda_runtime_api.h>

#include "csrc/cuda/common/device.h"
#include "csrc/cuda/sm90/indexer/launch.cuh"

namespace indexcache::sm90::indexer {

template <class T, class Call>
void launch(const char* op, void (*kernel)(Call), const Call& call, int blocks, CUstream_st* stream) {
  constexpr int kBytes = sizeof(Shared<T>);
  static_assert(kBytes <= 227 << 10);
  cuda::check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<static_cast<unsigned>(blocks), kThreads, kBytes, stream>>>(call);
  cuda::check_launch(op);
}

template <class T>
void launch_dense(const DenseCall& call, int blocks, CUstream_st* stream) {
  launch<T>("indexer_logits", dense_kernel<T>, call, blocks, stream);
}

template <class T>
void launch_paged(const PagedCall& call, int blocks, CUstream_st* stream) {
  launch<T>("indexer_logits_paged", paged_kernel<T>, call, blocks, stream);
}

}  // namespace indexcache::sm90::indexer
