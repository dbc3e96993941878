// The end of a token whose keys were not split: normalise, sink, lse, and the output straight from registers, so that
// shared memory is free for the next token.
#pragma once

#include "csrc/cuda/sm90/sparse_mla/finish.cuh"

namespace indexcache::sm90::attention {

/// The math warpgroups.
template <class T, class Values>
__device__ void store_whole(Math<T>& math, const SparseMlaParams& p, const Work& work, Values& values) {
  Shared<T>& shared = math.shared;
  const int first = first_row(), lane = cuda::lane_id();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float sum = math.sum[r];
    sum += __shfl_xor_sync(cuda::kFullMask, sum, 1);
    sum += __shfl_xor_sync(cuda::kFullMask, sum, 2);
    if (lane % 4 == 0) shared.sums[math.warpgroup][first + 8 * r] = sum;
  }
  cuda::sync_threads<kMathThreads>(kBarrierOfMath);
  auto* const out = static_cast<uint16_t*>(p.out) + (work.token * p.heads + work.first_head) * kValueDims;
  float* const lse = p.lse + work.token * p.heads + work.first_head;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first + 8 * r;
    const Total all = normalise(math.max[r], shared.sums[0][row] + shared.sums[1][row], p, work, row);
    if (math.warpgroup == r && lane % 4 == 0 && row < work.heads) lse[row] = all.lse;
    // Neighbouring lanes swap, so that each has eight bytes of every other unit of eight columns: whole sectors.
#pragma unroll
    for (int j = 0; j < kHalfDims / 8; j += 2) {
      const auto pair = [&](int unit) {
        return cuda::float_to_bf16x2(values(4 * unit + 2 * r) * all.factor, values(4 * unit + 2 * r + 1) * all.factor);
      };
      const uint32_t a = pair(j), b = pair(j + 1);
      const bool odd = lane % 2;
      const uint32_t other = __shfl_xor_sync(cuda::kFullMask, odd ? a : b, 1);
      const uint2 x = odd ? uint2{other, b} : uint2{a, other};
      const int column = math.warpgroup * kHalfDims + (j + lane % 2) * 8 + lane / 2 % 2 * 4;
      if (row < work.heads) *reinterpret_cast<uint2*>(out + row * kValueDims + column) = x;
    }
  }
  cuda::sync_threads<kMathThreads>(kBarrierOfMath);  // the sums of the next token take the place of these
}

}  // namespace indexcache::sm90::attention
