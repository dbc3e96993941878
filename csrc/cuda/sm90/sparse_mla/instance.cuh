// The definition that instances/*.cu instantiate.
#pragma once

#include "csrc/cuda/sm90/sparse_mla/launch.cuh"

namespace indexcache::sm90::attention {

template <class T>
void launch(const char* op, const Call& call, CUstream_st* stream) {
  static_assert(sizeof(Shared<T>) <= 227 << 10);
  cuda::launch<kernel<T>>(op,
                          {.blocks = call.p.tokens * call.head_tiles * call.cut.splits,
                           .threads = T::kThreads,
                           .shared_bytes = sizeof(Shared<T>),
                           .cluster = call.cut.splits},
                          stream, call);
}

}  // namespace indexcache::sm90::attention
