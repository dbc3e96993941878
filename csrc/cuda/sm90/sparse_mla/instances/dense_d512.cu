#include "csrc/cuda/sm90/sparse_mla/instance.cuh"

template void indexcache::sm90::attention::launch<
    indexcache::sm90::attention::Tile<indexcache::sm90::attention::DenseSource, 512>>(const char*, const Call&,
                                                                                      CUstream_st*);
