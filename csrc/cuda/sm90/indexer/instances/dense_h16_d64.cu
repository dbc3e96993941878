#include "csrc/cuda/sm90/indexer/instance.cuh"

template void indexcache::sm90::indexer::launch_dense<indexcache::sm90::indexer::Tile<16, 16, 64>>(
    const DenseCall&, int, CUstream_st*);
