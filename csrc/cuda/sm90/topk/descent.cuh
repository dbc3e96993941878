// Keys, sums over a warp and a block, and the radix descent that finds where the value of some rank lies.
#pragma once

#include "csrc/cuda/common/ordered_key.cuh"
#include "csrc/cuda/common/warp.cuh"
#include "csrc/cuda/sm90/topk/config.h"

namespace indexcache::sm90::radix_topk {

using cuda::kFullMask;
using cuda::kNeverSelected;
using cuda::kWarpSize;
using cuda::lane_id;
using cuda::ordered_key;
using cuda::warp_id;

constexpr uint32_t kLowestKey = 0x00800000u;  // of -FLT_MAX, the worst score that can be selected

/// The visible part of a row.
struct Row {
  const float* scores;  // column 0
  int begin, end;
  __device__ int length() const { return end - begin; }
};

__device__ inline float key_to_score(uint32_t key) {
  return bits_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/// ordered_key() of a score that has passed a threshold, so that it is no NaN; a negative zero counts as zero.
__device__ inline uint32_t key_of_passing(float score) {
  const auto bits = static_cast<int32_t>(float_bits(score + 0.0f));  // -0 + 0 = +0
  return static_cast<uint32_t>(bits ^ (bits >> 31 | static_cast<int32_t>(0x80000000u)));
}

__device__ inline uint64_t composite(uint32_t key, int column) {
  return uint64_t{key} << 32 | static_cast<uint32_t>(~column);
}
__device__ inline int column_of(uint64_t value) { return static_cast<int>(~static_cast<uint32_t>(value)); }

__device__ inline uint32_t warp_exclusive_sum(uint32_t value, uint32_t& total) {
  uint32_t inclusive = value;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const uint32_t left = __shfl_up_sync(kFullMask, inclusive, offset);
    if (lane_id() >= offset) inclusive += left;
  }
  total = __shfl_sync(kFullMask, inclusive, kWarpSize - 1);
  return inclusive - value;
}

/// Sum over the threads before this one. Called by all; `total` is over the block. Synchronises before it reads.
__device__ inline uint32_t block_exclusive_sum(Shared& s, uint32_t value, uint32_t& total) {
  uint32_t warp_total;
  const uint32_t before = warp_exclusive_sum(value, warp_total);
  if (lane_id() == 0) s.warp_totals[warp_id()] = warp_total;
  __syncthreads();
  constexpr int kWarps = kThreads / kWarpSize;
  const uint32_t totals = lane_id() < kWarps ? s.warp_totals[lane_id()] : 0;
  const uint32_t warps_before = warp_exclusive_sum(totals, total);
  return before + __shfl_sync(kFullMask, warps_before, warp_id());
}

// --- Radix descent: where the rank-th largest of a set of 64-bit values lies ------------------------------------------

/// Values in [low, low + 2^shift): the bin that holds the value of the wanted rank.
struct Bin {
  uint64_t low;
  int shift;
  uint32_t above, inside;  // values above the bin, and in it; inside 0: the set is smaller than the rank
};

/// Finds the bin of rank `rank` (from 1, from the top) among the counts in s.histogram. Synchronises on both sides.
__device__ inline void find_bin(Shared& s, uint32_t rank) {
  constexpr int kOwn = kBins / kThreads;
  __syncthreads();
  if (threadIdx.x == 0) s.found_inside = 0;
  uint32_t counts[kOwn], own = 0, total;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kOwn;  // thread 0 has the best bins
#pragma unroll
  for (int i = 0; i < kOwn; ++i) own += counts[i] = s.histogram[top - i];
  uint32_t above = block_exclusive_sum(s, own, total);
  if (above < rank && rank <= above + own) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (above < rank && rank <= above + counts[i]) {
        s.found_bin = top - i;
        s.found_above = above;
        s.found_inside = counts[i];
      }
      above += counts[i];
    }
  }
  __syncthreads();
}

/// Narrows [low, low + 2^width) round by round, 11 bits each, until `accept(bin)` or `floor` bits are left.
/// `for_each(f)` calls f(value) for every value of the set, spread over the threads.
template <class ForEach, class Accept>
__device__ Bin descend(Shared& s, uint64_t low, int width, int floor, uint32_t rank, ForEach for_each, Accept accept) {
  Bin bin{low, width, 0, 0};
  do {
    const int shift = max(bin.shift - kHistogramBits, floor);
    for (int i = threadIdx.x; i < kBins; i += kThreads) s.histogram[i] = 0;
    __syncthreads();
    for_each([&](uint64_t value) {
      const uint64_t offset = value - bin.low;  // huge below the bin
      if (bin.shift == 64 || offset >> bin.shift == 0) atomicAdd(&s.histogram[offset >> shift], 1u);
    });
    find_bin(s, rank - bin.above);
    if (s.found_inside == 0) return {low, width, 0, 0};
    bin = {bin.low + (uint64_t{s.found_bin} << shift), shift, bin.above + s.found_above, s.found_inside};
  } while (bin.shift > floor && !accept(bin));
  return bin;
}

/// The rank-th largest value of a set of distinct ones, left in s.cut; the set has at least `rank` values.
template <class ForEach>
__device__ void find_cut(Shared& s, uint64_t low, int width, uint32_t rank, ForEach for_each) {
  const Bin bin = descend(s, low, width, 0, rank, for_each, [&](const Bin& b) {
    return b.inside <= kResolve || rank - b.above == b.inside;
  });
  if (threadIdx.x == 0) s.member_count = 0;
  if (rank - bin.above == bin.inside) {  // the whole bin is kept
    if (threadIdx.x == 0) s.cut = bin.low;
    __syncthreads();
    return;
  }
  __syncthreads();
  for_each([&](uint64_t value) {
    if (value >= bin.low && (value - bin.low) >> bin.shift == 0) s.members[atomicAdd(&s.member_count, 1u)] = value;
  });
  __syncthreads();
  if (warp_id() == 0) {
    const uint64_t mine = lane_id() < bin.inside ? s.members[lane_id()] : 0;
    uint32_t larger = 0;
#pragma unroll 4  // the code of a phase is fetched once per launch: short code is fast code
    for (uint32_t i = 0; i < bin.inside; ++i) larger += s.members[i] > mine;
    if (lane_id() < bin.inside && larger == rank - bin.above - 1) s.cut = mine;
  }
  __syncthreads();
}

}  // namespace indexcache::sm90::radix_topk
