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

/// The first of the two rows of a tile that this lane has: this one, and eight further down.
__device__ inline int first_row() { return threadIdx.x % cuda::kWarpgroupThreads / 32 * 16 + cuda::lane_id() / 4; }

/// After all lanes' accesses. The barrier is a pointer or an address.
template <class Barrier>
__device__ void warp_arrive(Barrier barrier) {
  __syncwarp();
  if (cuda::lane_id() == 0) cuda::arrive(barrier);
}

/// The producer's last word to the math warpgroups.
template <class T>
__device__ void end_units(Shared<T>& shared, const Ring<T::kUnitStages>& units) {
  cuda::wait(&shared.unit_empty[units.stage()], units.parity() ^ 1);
  if (cuda::lane_id() != 0) return;
  shared.units[units.stage()].tiles = 0;
  cuda::arrive(&shared.unit_full[units.stage()]);
}

/// Starts the dot products of a tile, one group of products per step.
template <class T>
__device__ void multiply(uint64_t keys, uint64_t queries, float (&dots)[T::kColumns / 2]) {
  using Product = cuda::Wgmma<T::kColumns>;
  cuda::wgmma_fence();
  Product::template step<false>(dots, keys, queries);
  cuda::wgmma_commit();
#pragma unroll
  for (int step = 1; step < T::kDim / cuda::kWgmmaStep; ++step) {
    Product::template step<true>(dots, keys + step * cuda::kOperandStep, queries + step * cuda::kOperandStep);
    cuda::wgmma_commit();
  }
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

/// Tiles are dealt to the two groups in turn, over all units of the block; stages too, as there is an even number.
///
/// The products of a tile are under way while the group finishes its tile before: only the sum over a lane's own heads,
/// which needs the products, keeps a warp from the next ones. `Keys` gives the scales of a tile and says whether there
/// are keys.
template <class T, class Keys>
__device__ void run_math(Shared<T>& shared, const Logits& logits, const Keys& keys, int group) {
  constexpr bool kLate = Share<T>::kSums <= 16;  // more sums do not fit beside the products of the next tile
  const Share<T> share;
  const int row = first_row();
  // The turn comes when the tensor cores have work for 128 more cycles, so nothing may lie between it and the products:
  // the loop keeps addresses and descriptors at hand. A shuffle's result is not computed anew, that of a sum is.
  const uint32_t base = __shfl_sync(cuda::kFullMask, cuda::shared_address(&shared), 0);
  const auto at = [&](const void* member) {
    return base + (cuda::shared_address(member) - cuda::shared_address(&shared));
  };
  constexpr uint32_t kStep = kMathWarpgroups * T::kStageBytes / 16;  // from an own stage to the next
  const uint64_t first_keys = cuda::operand<T::kDim>(at(shared.keys[group]));
  const uint32_t my_turn = at(&shared.turn[group]), next_turn = at(&shared.turn[group ^ 1]);
  const uint32_t full = at(&shared.key_full[group]), empty = at(&shared.key_empty[group]);
  uint64_t key_tile = first_keys;
  Ring<T::kUnitStages> units;
  Ring<T::kStages / kMathWarpgroups> own;  // tiles of this group
  uint32_t before = 0;                     // tiles of earlier units
  for (;; ++units.count) {
    cuda::wait(&shared.unit_full[units.stage()], units.parity());
    const Unit<T>& unit = shared.units[units.stage()];
    const int tiles = unit.tiles;
    if (tiles == 0) break;
    const int clear_begin = unit.clear_begin, clear_tiles = unit.clear_end - clear_begin, first_key = unit.first_key;
    const int start = (group ^ before) & 1;
    const uint64_t queries = cuda::operand<T::kDim>(at(shared.queries[units.stage()]));
    const bool stores = Share<T>::stores() && (!Share<T>::kOneQuery || share.query(0) < unit.queries);
    float* out = logits.data + (unit.row + share.query(0)) * logits.stride + first_key + start * kTileKeys + row;
    float weights[T::kColumns / 4], pending[kLate ? Share<T>::kSums : Share<T>::kCount];
    typename Keys::Scale scale;

    const auto finish = [&](int tile) {
      float scores[Share<T>::kCount];
      if constexpr (kLate) {
        sum_quad<T>(pending, scores);
      } else {
#pragma unroll
        for (int i = 0; i < Share<T>::kCount; ++i) scores[i] = pending[i];
      }
#pragma unroll
      for (int i = 0; i < Share<T>::kCount; ++i) {
        scores[i] *= Share<T>::kBothRows ? scale.of_row[i % 2] : select(share.row(i), scale.of_row[1], scale.of_row[0]);
      }
      const bool inside = static_cast<unsigned>(tile - clear_begin) < static_cast<unsigned>(clear_tiles);
      if (!inside || scale.hole()) {
        store_edge(unit, logits, share, first_key + tile * kTileKeys + row, scale.hole(), scores);
      } else if (stores) {
#pragma unroll
        for (int i = 0; i < Share<T>::kCount; ++i) {
          out[(share.query(i) - share.query(0)) * logits.stride + 8 * share.row(i)] = scores[i];
        }
      }
      out += kMathWarpgroups * kTileKeys;
    };

    int tile = start;
    for (; tile < tiles; tile += kMathWarpgroups, ++own.count) {
      const uint32_t slot = own.stage() * (kMathWarpgroups * sizeof(uint64_t));
      cuda::wait(full + slot, own.parity());
      cuda::wait(my_turn, (own.count & 1) ^ (group == 0));
      float dots[T::kColumns / 2];
      multiply<T>(key_tile, queries, dots);
      key_tile = own.stage() + 1 == T::kStages / kMathWarpgroups ? first_keys : key_tile + kStep;
      if (tile == start) {
        load_weights<T>(shared.weights[units.stage()], weights);
      } else {
        finish(tile - kMathWarpgroups);
      }
      scale = keys.scale(shared, own.stage() * kMathWarpgroups + group, first_key + tile * kTileKeys, row);
      // The other group's turn comes when all but the last step are done: early enough that the tensor cores see no
      // gap, late enough that they do not alternate between the two and finish both late.
      cuda::wgmma_wait<1>();
      warp_arrive(next_turn);
      cuda::wgmma_wait<0>();
      cuda::wgmma_results(dots);
      warp_arrive(empty + slot);
      if constexpr (kLate) {
        sum_own_heads<T>(dots, weights, pending);
      } else {
        float sums[Share<T>::kSums];
        sum_own_heads<T>(dots, weights, sums);
        sum_quad<T>(sums, pending);
      }
    }
    if (tile != start) finish(tile - kMathWarpgroups);
    before += tiles;
    warp_arrive(&shared.unit_empty[units.stage()]);
  }
}

}  // namespace indexcache::sm90::indexer
