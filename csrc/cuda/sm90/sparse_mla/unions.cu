// From a call to the kernel of its group size.
#include "csrc/cuda/sm90/sparse_mla/unions_launch.cuh"

namespace indexcache::sm90::attention {

void build_unions(const char* op, const SparseMlaParams& p, const Unions& to, CUstream_st* stream) {
  cuda::check(op, cudaMemsetAsync(to.counts, 0, 2 * sizeof(uint32_t), stream));
  switch (to.group) {
    case 2: return launch_unions<2>(op, p, to, stream);
    case 3: return launch_unions<3>(op, p, to, stream);
    case 4: return launch_unions<4>(op, p, to, stream);
    default: return launch_unions<8>(op, p, to, stream);
  }
}

}  // namespace indexcache::sm90::attention
