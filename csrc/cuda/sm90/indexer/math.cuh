// The math warpgroups: tiles of keys from shared memory to scores in global memory. Dense and paged calls share it.
#pragma once

#include "csrc/cuda/common/mbarrier.cuh"
#include "csrc/cuda/common/wgmma.cuh"
#include "csrc/cuda/sm90/indexer/epilogue.cuh"

namespace indexcache::sm90::indexer {

/// Position in a ring of stages.
template <int kStages>
struct Ring {
  uint32_t count = 0;
  __device__ int stage() const { return static_cast<int>(count % kStages); }
  __device__ uint32_t parity() const { return count / kStages & 1; }
};

/// Where the scores go.
struct Logits {
  float* data;
  int64_t stride;
  int columns;
};

template <class T>
__device__ void init_barriers(Shared<T>& shared) {
  for (int i = 0; i < T::kStages; ++i) {
    cuda::init_barrier(&shared.key_full[i], 1);
    cuda::init_barrier(&shared.key_empty[i], 4);  // the warps of the warpgroup that took the tile
  }
  for (int i = 0; i < T::kUnitStages; ++i) {
    cuda::init_barrier(&shared.unit_full[i], 1);
    cuda::init_barrier(&shared.unit_empty[i], kMathWarps);
  }
  for (int i = 0; i < kMathWarpgroups; ++i) cuda::init_barrier(&shared.turn[i], 4);
  cuda::publish_barriers();
}

/// After all lanes' accesses.
__device__ inline void warp_arrive(uint64_t* barrier) {
  __syncwarp();
  if (cuda::lane_id() == 0) cuda::arrive(barrier);
}

/// Dot products of a tile. The other warpgroup's turn comes when all but the last step are done: early enough that the
/// tensor cores see no gap, late enough that they do not alternate between the two and finish both late.
template <class T>
__device__ void multiply(uint64_t keys, uint64_t queries, uint64_t* next_turn, float (&dots)[T::kColumns / 2]) {
  using Product = cuda::Wgmma<T::kColumns>;
  cuda::wgmma_fence();
  Product::template step<false>(dots, keys, queries);
  cuda::wgmma_commit();
#pragma unroll
  for (int step = 1; step < T::kDim / cuda::kWgmmaStep; ++step) {
    Product::template step<true>(dots, keys + step * cuda::kOperandStep, queries + step * cuda::kOperandStep);
    cuda::wgmma_commit();
  }
  cuda::wgmma_wait<1>();
  warp_arrive(next_turn);
  cuda::wgmma_wait<0>();
  cuda::wgmma_results(dots);
}

/// Stores of a tile that not every query sees whole, or for which the unit has too few queries.
template <class T>
__device__ void store_edge(const Unit<T>& unit, const Logits& logits, const Share<T>& share, int first, bool hole,
                           const float (&scores)[Share<T>::kCount]) {
#pragma unroll
  for (int i = 0; i < Share<T>::kCount; ++i) {
    const int query = share.query(i), n = first + 8 * share.row(i);
    if (!Share<T>::stores() || query >= unit.queries || n >= logits.columns) continue;
    const Window window = unit.windows[query];
    const bool seen = n >= window.begin && n < window.end && !hole;
    logits.data[(unit.row + query) * logits.stride + n] = seen ? scores[i] : -__builtin_inff();
  }
}

/// `group` 0 or 1. Tiles are dealt to the two groups in turn, over all units of the block.
template <class T>
__device__ void run_math(Shared<T>& shared, const Logits& logits, int group) {
  const Share<T> share;
  const int row = threadIdx.x % cuda::kWarpgroupThreads / 32 * 16 + cuda::lane_id() / 4;  // and row + 8
  const uint64_t key_tiles = cuda::operand<T::kDim>(shared.keys);
  const uint64_t query_tiles = cuda::operand<T::kDim>(shared.queries);
  Ring<T::kUnitStages> units;
  uint32_t before = 0;  // tiles of earlier units
  for (;; ++units.count) {
    cuda::wait(&shared.unit_full[units.stage()], units.parity());
    const Unit<T>& unit = shared.units[units.stage()];
    if (unit.tiles == 0) break;
    float weights[T::kColumns / 4];
    load_weights<T>(shared.weights[units.stage()], weights);
    float* const out = logits.data + (unit.row + share.query(0)) * logits.stride + row;
    const bool stores = Share<T>::stores() && (!Share<T>::kOneQuery || share.query(0) < unit.queries);
    const uint64_t queries = query_tiles + units.stage() * (T::kQueryBytes / 16);
    for (int tile = (group ^ before) & 1; tile < unit.tiles; tile += kMathWarpgroups) {
      const Ring<T::kStages> ring{before + tile};
      const int stage = ring.stage();
      cuda::wait(&shared.key_full[stage], ring.parity());
      const float scale[2] = {shared.scales[stage][row], shared.scales[stage][row + 8]};
      const bool hole = shared.hole[stage] != 0;
      cuda::wait(&shared.turn[group], (ring.count >> 1 & 1) ^ (group == 0));
      float dots[T::kColumns / 2];
      multiply<T>(key_tiles + stage * (T::kKeyBytes / 16), queries, &shared.turn[group ^ 1], dots);
      warp_arrive(&shared.key_empty[stage]);

      float scores[Share<T>::kCount];
      sum_heads<T>(dots, weights, scores);
#pragma unroll
      for (int i = 0; i < Share<T>::kCount; ++i) {
        scores[i] *= Share<T>::kBothRows ? scale[i % 2] : select(share.row(i), scale[1], scale[0]);
      }
      const int first = unit.first_key + tile * kTileKeys;
      const bool clear = first >= unit.clear_begin && first + (kTileKeys - 1) < unit.clear_end && !hole;
      if (!clear) {
        store_edge(unit, logits, share, first + row, hole, scores);
      } else if (stores) {
#pragma unroll
        for (int i = 0; i < Share<T>::kCount; ++i) {
          out[(share.query(i) - share.query(0)) * logits.stride + 8 * share.row(i) + first] = scores[i];
        }
      }
    }
    before += unit.tiles;
    warp_arrive(&shared.unit_empty[units.stage()]);
  }
}

}  // namespace indexcache::sm90::indexer
