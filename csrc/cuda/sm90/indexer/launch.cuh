// How a kernel is launched; each instantiation is a translation unit of its own under instances/.
#pragma once

#include "csrc/cuda/sm90/indexer/dense.cuh"
#include "csrc/cuda/sm90/indexer/paged.cuh"

struct CUstream_st;

namespace indexcache::sm90::indexer {

template <class T>
void launch_dense(const DenseCall& call, int blocks, CUstream_st* stream);
template <class T>
void launch_paged(const PagedCall& call, int blocks, CUstream_st* stream);

}  // namespace indexcache::sm90::indexer
