// From a tile of dot products to scores: relu, weights, the sum over heads, the scale of the key, the store.
//
// The sum over heads has one order everywhere: four partial sums, of the heads h with h / 2 % 4 = 0, 1, 2 and 3, each
// with h rising; then 0 + 2 and 1 + 3; then the two. So a score has the same bits in every tile, split and cache
// layout.
#pragma once

#include "csrc/cuda/common/warp.cuh"
#include "csrc/cuda/common/wgmma.cuh"
#include "csrc/cuda/sm90/indexer/config.h"

namespace indexcache::sm90::indexer {

/// Keeps NaN, which fmaxf does not.
__device__ inline float relu(float x) { return cuda::max_or_nan(x, 0.0f); }

/// `choose` != 0 ? a : b. The ternary becomes branches here (nvcc 13), and branches cost uniform registers.
__device__ inline float select(int choose, float a, float b) {
  float y;
  asm("{\n  .reg .pred p;\n  setp.ne.s32 p, %3, 0;\n  selp.f32 %0, %1, %2, p;\n}"
      : "=f"(y)
      : "f"(a), "f"(b), "r"(choose));
  return y;
}

/// What a lane of a quad has of a warpgroup's tile: two rows (eight apart) and, of each set of queries, one query, or a
/// part of one that kLanes lanes share. They exchange rows, so that each adds up and stores one.
template <class T>
struct Share {
  static constexpr int kLanes = 4 / T::kGroupQueries;
  static constexpr int kPartials = T::kGroupQueries;  // of the four partial sums of a score
  static constexpr int kSums = 2 * T::kSets * kPartials;
  static constexpr int kRows = kLanes == 1 ? 2 : 1;  // that a lane stores
  static constexpr int kScores = T::kSets * kRows;   // score i is of set i / kRows
  static constexpr bool kOneQuery = T::kSets == 1;   // then a missing query is a missing lane

  __device__ static int lane() { return cuda::lane_id() % 4; }
  __device__ static int first_query() { return lane() / kLanes; }
  __device__ static bool stores() { return kLanes < 4 || lane() % 2 == 0; }
  /// In a tile, of the first score; the second of two is eight further down.
  __device__ static int first_row() {
    const int half = kLanes == 1 ? 0 : kLanes == 2 ? lane() % 2 : lane() / 2;
    return threadIdx.x % cuda::kWarpgroupThreads / 32 * 16 + cuda::lane_id() / 4 + 8 * half;
  }
  /// Of score i from the first, in logits whose rows are `stride` apart.
  __device__ static int64_t offset(int i, int64_t stride) {
    return i / kRows * T::kGroupQueries * stride + 8 * (i % kRows);
  }
};

/// Weights of this lane's columns, two for every eight columns.
template <class T>
__device__ void load_weights(const float* weights, float (&own)[T::kColumns / 4]) {
  using S = Share<T>;
  const float* const first = weights + S::first_query() * T::kHeads + 2 * (S::lane() % S::kLanes);
#pragma unroll
  for (int j = 0; j < T::kColumns / 8; ++j) {
    constexpr int kGroups = T::kSetColumns / 8;
    const float* const pair = first + j / kGroups * T::kSetColumns + j % kGroups * T::kGroupHeads;
    own[2 * j] = reinterpret_cast<const float2*>(pair)->x;
    own[2 * j + 1] = reinterpret_cast<const float2*>(pair)->y;
  }
}

/// Partial sums of this lane's heads. The two rows of a weight stay neighbours, so that it is read once.
template <class T>
__device__ void sum_own_heads(const float (&dots)[T::kColumns / 2], const float (&weights)[T::kColumns / 4],
                              float (&sums)[Share<T>::kSums]) {
  constexpr int kGroups = T::kSetColumns / 8, kPartials = Share<T>::kPartials;
#pragma unroll
  for (int s = 0; s < Share<T>::kSums; ++s) sums[s] = 0;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
#pragma unroll
    for (int set = 0; set < T::kSets; ++set) {
      const int group = set * kGroups + j;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = i / 2, row = i % 2;
        float& sum = sums[2 * (set * kPartials + j % kPartials) + row];
        sum = fmaf(weights[2 * group + c], relu(dots[4 * group + 2 * row + c]), sum);
      }
    }
  }
}

/// Adds up the partial sums that this lane has: rows[2 * set + row].
template <class T>
__device__ void add_own_sums(const float (&sums)[Share<T>::kSums], float (&rows)[2 * T::kSets]) {
  constexpr int kPartials = Share<T>::kPartials;
#pragma unroll
  for (int i = 0; i < 2 * T::kSets; ++i) {
    const float* const sum = sums + i / 2 * 2 * kPartials + i % 2;
    rows[i] = kPartials == 4   ? (sum[0] + sum[4]) + (sum[2] + sum[6])
              : kPartials == 2 ? sum[0] + sum[2]
                               : sum[0];
  }
}

/// Adds up the sums of the lanes that share a query.
template <class T>
__device__ void add_lanes(const float (&rows)[2 * T::kSets], float (&scores)[Share<T>::kScores]) {
  using S = Share<T>;
#pragma unroll
  for (int set = 0; set < T::kSets; ++set) {
    if constexpr (S::kLanes == 1) {
      scores[2 * set] = rows[2 * set], scores[2 * set + 1] = rows[2 * set + 1];
    } else {
      constexpr int kOther = S::kLanes / 2;  // it has the other half of the heads, and stores the other row
      const int second = S::lane() & kOther;
      const float sent = select(second, rows[2 * set], rows[2 * set + 1]);
      const float kept = select(second, rows[2 * set + 1], rows[2 * set]);
      scores[set] = kept + __shfl_xor_sync(cuda::kFullMask, sent, kOther);
      if constexpr (S::kLanes == 4) scores[set] += __shfl_xor_sync(cuda::kFullMask, scores[set], 1);
    }
  }
}

/// Writes -inf to row[begin, end), by one warp. Rows need not be aligned.
__device__ inline void fill(float* row, int64_t begin, int64_t end) {
  const float none = -__builtin_inff();
  row += begin;
  const int count = static_cast<int>(end - begin), lane = cuda::lane_id();
  if (count <= 0) return;
  const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(row) / 4 % 4);
  const int head = min(count, (4 - misaligned) % 4), quads = (count - head) / 4, tail = head + 4 * quads;
  if (lane < head) row[lane] = none;
  if (lane < count - tail) row[tail + lane] = none;
  float4* const aligned = reinterpret_cast<float4*>(row + head);
#pragma unroll 2
  for (int i = lane; i < quads; i += cuda::kWarpSize) aligned[i] = make_float4(none, none, none, none);
}

}  // namespace indexcache::sm90::indexer
