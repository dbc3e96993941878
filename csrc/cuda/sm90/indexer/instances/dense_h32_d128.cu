#include "csrc/cuda/sm90/indexer/instance.cuh"

template void indexcache::sm90::indexer::launch_dense<indexcache::sm90::indexer::Tile<32, 8, 128>>(
    const DenseCall&, int, CUstream_st*);
