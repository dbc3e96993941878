// What the producers share: they bring the listed rows, as swizzled bf16, into the ring of key blocks.
//
// A key that is not listed, or names no row, becomes zeros and a cleared bit of `valid`: what an unused row holds,
// which may be NaN, never gets here.
#pragma once

#include "csrc/cuda/common/warp.cuh"
#include "csrc/cuda/sm90/sparse_mla/layout.cuh"

namespace indexcache::sm90::attention {

/// The listed keys of one block of the grid.
struct KeyList {
  const int32_t* indices;
  int count;                // of entries that exist
  int64_t rows;             // of the tensor; an entry outside names none
  const uint32_t* members;  // of a union: [blocks][member_words]; else null
  int member_words;
  /// Whoever reads ahead asks later whether the entry names a row: the question waits for the load.
  __device__ int entry(int i) const { return i < count ? __ldg(indices + i) : -1; }
  __device__ bool names_row(int entry) const { return entry >= 0 && entry < rows; }
  __device__ int blocks() const { return (count + kTileKeys - 1) / kTileKeys; }
};

/// What a lane of one warp reads of a block's valid bits: keys lane and lane + 32, or a word of a union's.
struct Marks {
  int of_lane[kTileKeys / 32];
};
template <class T>
__device__ Marks read_marks(const KeyList& list, int block) {
  const int lane = cuda::lane_id();
  if (T::kGrouped && list.members != nullptr) {
    const bool exists = lane < list.member_words && block < list.blocks();
    return {exists ? static_cast<int>(__ldg(list.members + block * list.member_words + lane)) : 0};
  }
  return {list.entry(block * kTileKeys + lane), list.entry(block * kTileKeys + 32 + lane)};
}

/// The warp, before it arrives at key_full.
template <class T>
__device__ void store_valid(Shared<T>& shared, int stage, const KeyList& list, const Marks& marks) {
  if (T::kGrouped && list.members != nullptr) {
    if (cuda::lane_id() < list.member_words) shared.valid[stage][cuda::lane_id()] = marks.of_lane[0];
    return __syncwarp();
  }
#pragma unroll
  for (int i = 0; i < kTileKeys / 32; ++i) {
    const uint32_t bits = __ballot_sync(cuda::kFullMask, list.names_row(marks.of_lane[i]));
    if (cuda::lane_id() == 0) shared.valid[stage][i] = bits;
  }
}

/// Brings the key blocks of one token after the other.
template <class T, class Source>
struct Producer;

}  // namespace indexcache::sm90::attention
