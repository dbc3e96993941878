// How a kernel is launched; each instantiation is a translation unit of its own under instances/.
#pragma once

#include "csrc/cuda/common/launch.cuh"
#include "csrc/cuda/sm90/sparse_mla/kernel.cuh"

namespace indexcache::sm90::attention {

template <class T>
void launch(const char* op, const Call& call, CUstream_st* stream);

}  // namespace indexcache::sm90::attention
