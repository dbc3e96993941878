// From a tile of dot products to scores: relu, weights, the sum over heads, the scale of the key, the store.
//
// The sum over heads has one order everywhere: each lane l of a quad sums its heads (8j + 2l, 8j + 2l + 1, j rising),
// then lanes 0+1 and 2+3, then the two sums. So a score has the same bits in every tile, split and cache layout.
#pragma once

#include "csrc/cuda/common/warp.cuh"
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

/// Weights of this lane's columns: pairs 8j + 2 * (lane % 4), + 1.
template <class T>
__device__ void load_weights(const float* weights, float (&own)[T::kColumns / 4]) {
  const float* first = weights + 2 * (cuda::lane_id() % 4);
#pragma unroll
  for (int j = 0; j < T::kColumns / 8; ++j) {
    const float2 pair = *reinterpret_cast<const float2*>(first + 8 * j);
    own[2 * j] = pair.x;
    own[2 * j + 1] = pair.y;
  }
}

/// The scores of a tile that one lane ends up with: a quad's lanes hold parts of 2 * kQueries sums (query, row), and
/// exchange halves, so that each adds up and stores its share, instead of all lanes all of them.
template <class T>
struct Share {
  static constexpr int kSums = 2 * T::kQueries;
  static constexpr bool kSecondHalving = kSums % 4 == 0;  // else both lanes of the second exchange hold the same sums
  static constexpr int kCount = kSecondHalving ? kSums / 4 : kSums / 2;
  static constexpr bool kBothRows = kCount % 2 == 0;  // of each query
  static constexpr bool kOneQuery = kCount == (kBothRows ? 2 : 1);  // then a missing query is a missing lane

  int first;  // this lane's sums are first, first + 1, …; sum s is of query s / 2, row s % 2

  __device__ Share() {
    const int lane = cuda::lane_id();
    first = (lane & 1) * (kSums / 2) + (kSecondHalving ? (lane >> 1 & 1) * (kSums / 4) : 0);
  }
  __device__ int query(int i) const { return kBothRows ? first / 2 + i / 2 : (first + i) / 2; }
  __device__ int row(int i) const { return kBothRows ? i % 2 : (first + i) % 2; }
  __device__ static bool stores() { return kSecondHalving || (cuda::lane_id() & 2) == 0; }
};

/// Sums of this lane's heads: sums[2 * query + row]. The two rows of a weight stay neighbours, so that it is read once.
template <class T>
__device__ void sum_own_heads(const float (&dots)[T::kColumns / 2], const float (&weights)[T::kColumns / 4],
                              float (&sums)[Share<T>::kSums]) {
  constexpr int kGroups = T::kHeads / 8;
#pragma unroll
  for (int s = 0; s < Share<T>::kSums; ++s) sums[s] = 0;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
#pragma unroll
    for (int query = 0; query < T::kQueries; ++query) {
      const int group = query * kGroups + j;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = i / 2, row = i % 2;
        float& sum = sums[2 * query + row];
        sum = fmaf(weights[2 * group + c], relu(dots[4 * group + 2 * row + c]), sum);
      }
    }
  }
}

/// Adds up the sums of a quad's lanes; this lane gets its share.
template <class T>
__device__ void sum_quad(const float (&sums)[Share<T>::kSums], float (&scores)[Share<T>::kCount]) {
  constexpr int kSums = Share<T>::kSums;
  const int low = cuda::lane_id() & 1, high = cuda::lane_id() & 2;
  float halves[kSums / 2];
#pragma unroll
  for (int i = 0; i < kSums / 2; ++i) {
    const float sent = select(low, sums[i], sums[i + kSums / 2]);
    const float kept = select(low, sums[i + kSums / 2], sums[i]);
    halves[i] = kept + __shfl_xor_sync(cuda::kFullMask, sent, 1);
  }
#pragma unroll
  for (int i = 0; i < Share<T>::kCount; ++i) {
    if constexpr (Share<T>::kSecondHalving) {
      const float sent = select(high, halves[i], halves[i + Share<T>::kCount]);
      const float kept = select(high, halves[i + Share<T>::kCount], halves[i]);
      scores[i] = kept + __shfl_xor_sync(cuda::kFullMask, sent, 2);
    } else {
      scores[i] = halves[i] + __shfl_xor_sync(cuda::kFullMask, halves[i], 2);
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
