// The end of a token whose keys were not split: normalise, sink, lse; and the output, through shared memory so that
// rows are stored whole, while the next token's queries and keys are on their way.
#pragma once

#include "csrc/cuda/sm90/sparse_mla/finish.cuh"

namespace indexcache::sm90::attention {

/// Of a token without keys.
inline __device__ void store_zeros(const SparseMlaParams& p, const Work& work) {
  auto* const out = static_cast<uint16_t*>(p.out) + (work.token * p.heads + work.first_head) * kValueDims;
  for (int i = threadIdx.x; i < work.heads * kValueDims / 8; i += kMathThreads) reinterpret_cast<uint4*>(out)[i] = {};
}

/// The math warpgroups, after run() up to `end`. The output takes the place of the last key block, this warpgroup's
/// dims of which nobody else reads.
template <class T, class Values>
__device__ void store_whole(Math<T>& math, const SparseMlaParams& p, const Work& work, bool empty,
                            uint32_t end, const Values& values) {
  Shared<T>& shared = math.shared;
  const int first = first_row(), lane = cuda::lane_id();
  math.share_sums();
  cuda::sync_threads<kMathThreads>(kBarrierOfMath);
  float factor[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first + 8 * r;
    const Total all = normalise(math.max[r], shared.sums[0][row] + shared.sums[1][row], p, work, row);
    factor[r] = all.factor;
    const bool writes = math.warpgroup == r && lane % 4 == 0 && row < work.heads;
    if (writes) p.lse[work.token * p.heads + work.first_head + row] = all.lse;
  }
  cuda::sync_threads<kMathThreads>(kBarrierOfMath);  // the sums of the next token take the place of these
  if (empty) return store_zeros(p, work);

  constexpr int kOwnChunks = kHalfDims / kChunkDims;
  const uint32_t stage = (end - 1) % kStages;
  uint16_t* const chunks = shared.keys[stage] + math.warpgroup * kOwnChunks * kChunkElements;
  const auto pair = [&](int unit, int r) {
    return cuda::float_to_bf16x2(values(4 * unit + 2 * r) * factor[r], values(4 * unit + 2 * r + 1) * factor[r]);
  };
#pragma unroll
  for (int chunk = 0; chunk < kOwnChunks; ++chunk) {
    const auto to = matrix_address(chunks + chunk * kChunkElements);
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const int unit = chunk * 8 + i;
      store_matrices(to, i, pair(unit, 0), pair(unit, 1), pair(unit + 1, 0), pair(unit + 1, 1));
    }
  }
  cuda::sync_threads<128>(kBarrierOfWarpgroup + math.warpgroup);
  static_assert(kHalfDims / 8 == cuda::kWarpSize);
  constexpr int kWarps = 4, kBatch = 4;  // loads on their way
#pragma unroll
  for (int first_of_batch = 0; first_of_batch < kTileHeads; first_of_batch += kWarps * kBatch) {
    const int row = first_of_batch + threadIdx.x % 128 / 32;
    uint4 x[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      x[i] = *reinterpret_cast<const uint4*>(chunks + unit_offset(lane / 8, row + kWarps * i, lane % 8));
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int unit = math.warpgroup * cuda::kWarpSize + lane;
      if (row + kWarps * i < work.heads) store_unit(p, work, row + kWarps * i, unit, x[i]);
    }
  }
  cuda::warp_arrive(&shared.key_empty[stage][math.warpgroup]);
  cuda::warp_arrive(&shared.key_empty[stage][kMathWarpgroups + math.warpgroup]);
}

}  // namespace indexcache::sm90::attention
