// The definitions that instances/*.cu instantiate.
#pragma once

#include "csrc/cuda/common/launch.cuh"
#include "csrc/cuda/sm90/indexer/launch.cuh"

namespace indexcache::sm90::indexer {

template <class T>
void launch_dense(const DenseCall& call, int blocks, CUstream_st* stream) {
  const cuda::Launch how{.blocks = blocks, .threads = kThreads, .shared_bytes = sizeof(Shared<T>)};
  cuda::launch<dense_kernel<T>>("indexer_logits", how, stream, call);
}

template <class T>
void launch_paged(const PagedCall& call, int blocks, CUstream_st* stream) {
  const cuda::Launch how{.blocks = blocks, .threads = kThreads, .shared_bytes = sizeof(Shared<T>), .early = true};
  cuda::launch<paged_kernel<T>>("indexer_logits_paged", how, stream, call);
}

}  // namespace indexcache::sm90::indexer
