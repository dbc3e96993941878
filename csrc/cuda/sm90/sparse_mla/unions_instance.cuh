// The definition that instances/unions_*.cu instantiate.
#pragma once

#include "csrc/cuda/sm90/sparse_mla/unions.cuh"
#include "csrc/cuda/sm90/sparse_mla/unions_launch.cuh"

namespace indexcache::sm90::attention {

template <int kGroup>
void launch_unions(const char* op, const SparseMlaParams& p, const Unions& to, CUstream_st* stream) {
  using Tile = UnionTile<kGroup>;
  const UnionCall call{.indices = p.indices,
                       .lengths = p.lengths,
                       .tokens = p.tokens,
                       .k = p.k,
                       .rows = p.keys,
                       .words = Tile::words(p.keys),
                       .to = to};
  cuda::launch<union_kernel<kGroup>>(op,
                                     {.blocks = cuda::ceil_div(p.tokens, kGroup),
                                      .threads = Tile::kThreads,
                                      .shared_bytes = Tile::shared_bytes(call.words, to.blocks),
                                      .most_shared_bytes = Tile::kMostSharedBytes},
                                     stream, call);
}

}  // namespace indexcache::sm90::attention
