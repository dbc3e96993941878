// The definition that instances/*.cu instantiate.
#pragma once

#include "csrc/cuda/sm90/sparse_mla/launch.cuh"

namespace indexcache::sm90::attention {

template <class T>
void launch(const char* op, const Call& call, CUstream_st* stream) {
  static_assert(sizeof(Shared<T>) <= 227 << 10);
  int64_t blocks = call.p.tokens * call.head_tiles * call.cut.splits;
  // Items that are not split go over the multiprocessors in turn.
  if (T::Source::kManyTokens && call.cut.splits == 1) blocks = std::min<int64_t>(blocks, cuda::sm_count());
  cuda::launch<kernel<T>>(op,
                          {.blocks = blocks,
                           .threads = T::kThreads,
                           .shared_bytes = sizeof(Shared<T>),
                           .cluster = call.cut.splits,
                           .early = true},
                          stream, call);
}

}  // namespace indexcache::sm90::attention
