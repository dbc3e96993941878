#include "csrc/cuda/sm90/indexer/instance.cuh"

template void indexcache::sm90::indexer::launch_paged<indexcache::sm90::indexer::Tile<16, 4, 64>>(
    const PagedCall&, int, CUstream_st*);
