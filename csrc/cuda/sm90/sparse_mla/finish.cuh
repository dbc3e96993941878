// From a block's sums to the output: normalise, sink, lse; the blocks of a cluster combine their splits.
#pragma once

#include "csrc/cuda/common/cluster.cuh"
#include "csrc/cuda/sm90/sparse_mla/math.cuh"

namespace indexcache::sm90::attention {

/// Which part of the call a block of the grid has.
struct Work {
  int64_t token;
  int first_head, heads;  // that exist
  int split, splits;      // rank in the cluster, and its size
  int union_keys = -1;    // of a group with a union; its rows are the heads of all its tokens
};

/// Total of all splits of a row, and what the output is to be multiplied by.
struct Total {
  float lse;
  float factor;  // of values relative to `max`
  float max;
};

/// Of a row whose values are relative to `max`.
inline __device__ Total normalise(float max, float sum, const SparseMlaParams& p, const Work& work, int row) {
  constexpr float kLn2 = 0.693147180559945f;
  if (sum == 0) return {-__builtin_inff(), 0, max};
  const float lse = (max + log2f(sum)) * kLn2;
  const bool sinks = p.sink != nullptr && row < work.heads;
  const float kept = sinks ? 1.0f / (1.0f + expf(p.sink[(work.first_head + row) % p.heads] - lse)) : 1.0f;
  return {lse, kept / sum, max};
}

template <class T>
__device__ Total total(Shared<T>& shared, const SparseMlaParams& p, const Work& work, int row) {
  RowState states[kMaxSplits];  // all loads at once
#pragma unroll
  for (int rank = 0; rank < kMaxSplits; ++rank) {
    const int existing = min(rank, work.splits - 1);
    const float2 state = cuda::load_from(existing, reinterpret_cast<const float2*>(&shared.states[row]));
    states[rank] = {state.x, rank < work.splits ? state.y : 0.0f};
  }
  float max = -__builtin_inff(), sum = 0;
#pragma unroll
  for (const RowState& state : states) max = fmaxf(max, state.max);
#pragma unroll
  for (const RowState& state : states) sum += state.sum * fast_exp2(state.max - finite_base(max));
  return normalise(max, sum, p, work, row);
}

/// Partial outputs, f32 [64][512] in the place of the keys; 32-byte units are swizzled over 256 bytes.
template <class T>
__device__ float* partial(Shared<T>& shared, int row, int column) {
  return reinterpret_cast<float*>(shared.keys) + row * kValueDims + (column ^ row % 8 * 8);
}

/// The output as bf16 [64][512], in the place of the queries; 16-byte units are swizzled over 128 bytes.
template <class T>
__device__ uint16_t* output(Shared<T>& shared, int row, int column) {
  return shared.queries + row * kValueDims + (column ^ row % 8 * 8);
}

template <class T>
__device__ void store_row(Shared<T>& shared, const SparseMlaParams& p, const Work& work, int row, int column, uint4 x) {
  auto* const out = static_cast<uint16_t*>(p.out) + (work.token * p.heads + work.first_head + row) * kValueDims;
  *reinterpret_cast<uint4*>(out + column) = x;
}

/// A block that has all keys of its token: through shared memory, so that rows are stored whole.
template <class T>
__device__ void store_output(Shared<T>& shared, const SparseMlaParams& p, const Work& work, int warpgroup) {
  constexpr int kUnits = kHalfDims / 8;
  static_assert(kUnits == cuda::kWarpSize);
  cuda::sync_threads<128>(kBarrierOfWarpgroup + warpgroup);
  const int column = warpgroup * kHalfDims + cuda::lane_id() * 8;
  for (int row = threadIdx.x % 128 / 32; row < work.heads; row += 4) {
    store_row(shared, p, work, row, column, *reinterpret_cast<const uint4*>(output(shared, row, column)));
  }
}

/// Sums the splits of this block's share of the output, in the order of their ranks.
template <class T>
__device__ void combine(Shared<T>& shared, const SparseMlaParams& p, const Work& work) {
  constexpr int kUnits = kValueDims / 8;
  for (int i = work.split * kMathThreads + threadIdx.x; i < work.heads * kUnits; i += work.splits * kMathThreads) {
    const int row = i / kUnits, column = i % kUnits * 8;
    const auto* const from = reinterpret_cast<const float4*>(partial(shared, row, column));
    float x[8] = {};
#pragma unroll 4
    for (int rank = 0; rank < work.splits; ++rank) {
      const float4 a = cuda::load_from(rank, from), b = cuda::load_from(rank, from + 1);
      const float add[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] += add[j];
    }
    store_row(shared, p, work, row, column, cuda::bf16_chunk(x));
  }
}

/// cluster_sync() as often as finish() does, for the other warps of the block.
inline __device__ void attend_finish(const Work& work) {
  if (work.splits == 1) return;
  __syncwarp();
  for (int i = 0; i < 3; ++i) cuda::cluster_sync<kMaxSplits>();
}

/// The math warpgroups.
template <class T, class Values>
__device__ void finish(Math<T>& math, const SparseMlaParams& p, const Work& work, Values& values) {
  Shared<T>& shared = math.shared;
  const int first = first_row();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float sum = math.sum[r];
    sum += __shfl_xor_sync(cuda::kFullMask, sum, 1);
    sum += __shfl_xor_sync(cuda::kFullMask, sum, 2);
    if (cuda::lane_id() % 4 == 0) shared.sums[math.warpgroup][first + 8 * r] = sum;
  }
  cuda::sync_threads<kMathThreads>(kBarrierOfMath);  // and no products read queries or keys any more
  if (math.warpgroup == 0 && cuda::lane_id() % 4 == 0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = first + 8 * r;
      shared.states[row] = {math.max[r], shared.sums[0][row] + shared.sums[1][row]};
    }
  }
  if (work.splits == 1) {
    cuda::sync_threads<kMathThreads>(kBarrierOfMath);
  } else {
    cuda::cluster_sync<kMaxSplits>();
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first + 8 * r;
    const Total all = total(shared, p, work, row);
    const float factor = all.factor * fast_exp2(math.max[r] - finite_base(all.max));
    if (math.warpgroup == 0 && cuda::lane_id() % 4 == 0 && work.split == 0 && row < work.heads) {
      p.lse[work.token * p.heads + work.first_head + row] = all.lse;
    }
#pragma unroll
    for (int j = 0; j < kHalfDims / 8; ++j) {
      const int i = 4 * j + 2 * r, column = math.warpgroup * kHalfDims + 8 * j + first_column();
      const float low = values(i) * factor, high = values(i + 1) * factor;
      if (work.splits == 1) {
        *reinterpret_cast<uint32_t*>(output(shared, row, column)) = cuda::float_to_bf16x2(low, high);
      } else {
        *reinterpret_cast<float2*>(partial(shared, row, column)) = {low, high};
      }
    }
  }
  if (work.splits == 1) return store_output(shared, p, work, math.warpgroup);
  cuda::cluster_sync<kMaxSplits>();
  combine(shared, p, work);
  cuda::cluster_sync<kMaxSplits>();  // the others still read this block's memory
}

}  // namespace indexcache::sm90::attention
