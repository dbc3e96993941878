#include "csrc/cuda/sm90/indexer/instance.cuh"

template void indexcache::sm90::indexer::launch_paged<indexcache::sm90::indexer::Tile<32, 1, 64>>(
    const PagedCall&, int, CUstream_st*);
