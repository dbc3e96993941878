#include "csrc/cuda/sm90/sparse_mla/unions_instance.cuh"

template void indexcache::sm90::attention::launch_unions<3>(const char*, const SparseMlaParams&, const Unions&,
                                                             CUstream_st*);
