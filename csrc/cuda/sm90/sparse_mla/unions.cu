#include "csrc/cuda/sm90/sparse_mla/unions.cuh"

#include "csrc/cuda/common/launch.cuh"

namespace indexcache::sm90::attention {

void build_unions(const char* op, const SparseMlaParams& p, const Unions& to, CUstream_st* stream) {
  const UnionCall call{.indices = p.indices,
                       .lengths = p.lengths,
                       .tokens = p.tokens,
                       .k = p.k,
                       .rows = p.keys,
                       .words = union_words(p.keys),
                       .pitch = union_pitch(to.blocks),
                       .to = to};
  cuda::check(op, cudaMemsetAsync(to.counts, 0, 2 * sizeof(uint32_t), stream));
  cuda::launch<union_kernel>(op,
                             {.blocks = cuda::ceil_div(p.tokens, to.group),
                              .threads = kUnionThreads,
                              .shared_bytes = union_shared_bytes(call.words, call.pitch * to.group),
                              .most_shared_bytes = kMostUnionShared},
                             stream, call);
}

}  // namespace indexcache::sm90::attention
