// How the builder is launched; each group size is a translation unit of its own under instances/.
#pragma once

#include "csrc/cuda/common/launch.cuh"
#include "csrc/cuda/sm90/sparse_mla/unions.h"

namespace indexcache::sm90::attention {

template <int kGroup>
void launch_unions(const char* op, const SparseMlaParams& p, const Unions& to, CUstream_st* stream);

}  // namespace indexcache::sm90::attention
