#include "csrc/cuda/sm90/sparse_mla/instance.cuh"

template void indexcache::sm90::sparse_mla::launch<
    indexcache::sm90::sparse_mla::Tile<indexcache::sm90::sparse_mla::DenseSource, 576>>(const char*, const Call&, CUstream_st*);
