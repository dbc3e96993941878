// The definition that instances/*.cu instantiate.
#pragma once

#include "csrc/cuda/sm90/sparse_mla/launch.cuh"

namespace indexcache::sm90::attention {

template <class T>
void launch(const char* op, const Call& call, CUstream_st* stream) {
  static_assert(sizeof(Shared<T>) <= 227 << 10);
  const int64_t items = call.p.tokens * call.head_tiles;
  const bool in_turn = T::Source::kManyTokens && call.cut.splits == 1;  // a block goes on to others
  cuda::launch<kernel<T>>(op,
                          {.blocks = in_turn ? std::min<int64_t>(items, cuda::sm_count()) : items * call.cut.splits,
                           .threads = T::kThreads,
                           .shared_bytes = sizeof(Shared<T>),
                           .cluster = call.cut.splits,
                           .early = true},
                          stream, call);
}

}  // namespace indexcache::sm90::attention
