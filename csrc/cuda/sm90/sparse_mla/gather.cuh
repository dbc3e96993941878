// What the producers share: they bring the listed rows, as swizzled bf16, into the ring of key blocks.
//
// A key that is not listed, or names no row, becomes zeros and a cleared bit of `valid`: what an unused row holds, which
// may be NaN, never gets here.
#pragma once

#include "csrc/cuda/common/warp.cuh"
#include "csrc/cuda/sm90/sparse_mla/layout.cuh"

namespace indexcache::sm90::attention {

/// The listed keys of one block of the grid.
struct KeyList {
  const int32_t* indices;
  int count;      // of entries that exist
  int64_t rows;   // of the tensor; an entry outside names none
  /// Whoever reads ahead asks later whether the entry names a row: the question waits for the load.
  __device__ int entry(int i) const { return i < count ? __ldg(indices + i) : -1; }
  __device__ bool names_row(int entry) const { return entry >= 0 && entry < rows; }
  __device__ int row(int i) const {
    const int index = entry(i);
    return names_row(index) ? index : -1;
  }
  __device__ int blocks() const { return (count + kTileKeys - 1) / kTileKeys; }
};

/// One warp, before it arrives at key_full: which of a block's keys name a row; a lane has keys lane and lane + 32.
template <class T>
__device__ void store_valid(Shared<T>& shared, int stage, const KeyList& list, const int (&entries)[kTileKeys / 32]) {
#pragma unroll
  for (int i = 0; i < kTileKeys / 32; ++i) {
    const uint32_t bits = __ballot_sync(cuda::kFullMask, list.names_row(entries[i]));
    if (cuda::lane_id() == 0) shared.valid[stage][i] = bits;
  }
}

/// Brings the key blocks of one token after the other.
template <class T, class Source>
struct Producer;

}  // namespace indexcache::sm90::attention
