// The math warpgroups: tiles of keys from shared memory to scores in global memory. Dense and paged calls share it.
#pragma once

#include <cstddef>

#include "csrc/cuda/common/tma.cuh"
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
    cuda::init_barrier(&shared.key_empty[i], 4 * T::kTeam);  // the warps that took the tile
  }
  for (int i = 0; i < T::kUnitStages; ++i) {
    cuda::init_barrier(&shared.unit_full[i], 1);
    cuda::init_barrier(&shared.unit_empty[i], kMathWarps);
  }
  cuda::publish_barriers();
}

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

/// Starts the dot products of a tile.
template <class T>
__device__ void multiply(uint64_t keys, uint64_t queries, float (&dots)[T::kColumns / 2]) {
  using Product = cuda::Wgmma<T::kColumns>;
  cuda::wgmma_fence();
  Product::template step<false>(dots, keys, queries);
#pragma unroll
  for (int step = 1; step < T::kDim / cuda::kWgmmaStep; ++step) {
    Product::template step<true>(dots, keys + step * cuda::kOperandStep, queries + step * cuda::kOperandStep);
  }
  cuda::wgmma_commit();
}

/// The queries of a unit to shared memory, in the order of columns that Tile describes, and their weights. One thread.
template <class T>
__device__ void copy_queries(Shared<T>& shared, int stage, const CUtensorMap* map, const float* weights, int query,
                             int queries) {
  uint64_t* const barrier = &shared.unit_full[stage];
  const int weight_bytes = queries * T::kHeads * 4;
  cuda::arrive_expecting(barrier, T::kQueryBytes + weight_bytes);
#pragma unroll 1
  for (int set = 0; set < T::kSets; ++set) {
    cuda::copy_tile(shared.queries[stage] + set * T::kSetColumns * T::kDim, map, 0, 0, query + set * T::kGroupQueries, 0,
                    barrier);
  }
  cuda::copy_bulk(shared.weights[stage], weights + int64_t{query} * T::kHeads, weight_bytes, barrier);
}

/// Stores of keys that not every query of a unit sees, or for which the unit has too few queries. `query`, `key` and
/// `line` are of this lane's first score.
template <class T, class Keys, class S = Share<typename T::Own>>
__device__ void store_edge(const Unit<T>& unit, const Logits& logits, const Keys& keys,
                           const typename Keys::Scale& scale, int query, int key, float* line,
                           const float (&scores)[S::kScores]) {
#pragma unroll
  for (int i = 0; i < S::kScores; ++i) {
    const int set_query = query + i / S::kRows * T::kGroupQueries, n = key + 8 * (i % S::kRows);
    if (set_query >= unit.queries || n >= logits.columns) continue;
    const Window window = unit.windows[set_query];
    const bool seen = n >= window.begin && n < window.end;
    line[key + S::offset(i, logits.stride)] = seen ? scores[i] * keys.at(scale, key, i % S::kRows) : -__builtin_inff();
  }
}

/// Tiles are dealt to the teams in turn, over all units of the block; stages too. The warpgroups of a team share the
/// queries of a tile. `Keys` gives the scales of a tile, which may be a hole, without keys.
///
/// Nobody waits for another's products: with four warpgroups the tensor cores have work while some sum heads. The
/// products of 64 keys are under way while the warpgroup finishes the 64 before: only the sum over a lane's own heads,
/// which needs the products, keeps it from the next ones.
template <class T, class Keys>
__device__ void run_math(Shared<T>& shared, const Logits& logits, const Keys& keys, int group) {
  using Own = typename T::Own;
  using S = Share<Own>;
  // More scores do not fit beside the next products; narrower tiles are bound by memory.
  constexpr bool kLate = Own::kSets == 1 && Own::kColumns == kOwnColumns;
  constexpr int kStride = T::kTeams * T::kKeys;  // from a tile to the team's next
  const int team = group / T::kTeam, member = group % T::kTeam;
  // What the loop needs is kept at hand: a shuffle's result is not computed anew, that of a sum is.
  const auto keep = [](auto x) { return __shfl_sync(cuda::kFullMask, x, 0); };
  const auto keep_own = [](auto x) { return __shfl_sync(cuda::kFullMask, x, cuda::lane_id()); };
  const uint32_t base = keep(cuda::shared_address(&shared));
  const auto operand = [&](uint32_t offset) { return keep(cuda::operand<T::kDim>(base + offset)); };
  const uint64_t own_keys = operand(offsetof(Shared<T>, keys) + team * T::kStageBytes);
  Ring<T::kUnitStages> units;
  Ring<T::kStages / T::kTeams> own;  // tiles of this team
  for (;; ++units.count) {
    cuda::wait(&shared.unit_full[units.stage()], units.parity());
    const Unit<T>& unit = shared.units[units.stage()];
    const int tiles = unit.tiles;
    if (tiles == 0) break;
    const int start = static_cast<int>((team - unit.before) % T::kTeams);
    const uint64_t queries =
        operand(offsetof(Shared<T>, queries) + units.stage() * T::kQueryBytes + member * Own::kQueryBytes);
    const int query = member * Own::kQueries + S::first_query();
    const auto address = __cvta_generic_to_global(logits.data + (unit.row + query) * logits.stride);
    float* const line = static_cast<float*>(__cvta_global_to_generic(keep_own(address)));
    const int clear_begin = unit.clear_begin, clear_tiles = unit.clear_end - clear_begin;
    int key = keep_own(unit.first_key + start * T::kKeys + S::first_row());
    float weights[Own::kColumns / 4], rows[2 * Own::kSets] = {};
    load_weights<Own>(shared.weights[units.stage()] + member * Own::kColumns, weights);
    typename Keys::Scale scale{};

    const auto finish = [&](int tile, int key) {  // nothing for a tile < 0
      float scores[S::kScores];
      add_lanes<Own>(rows, scores);
      const bool clear = static_cast<unsigned>(tile - clear_begin) < static_cast<unsigned>(clear_tiles);
      if (!clear) {
        if (tile >= 0) store_edge(unit, logits, keys, scale, query, key, line, scores);
      } else {
#pragma unroll
        for (int i = 0; i < S::kScores; ++i) {
          line[key + S::offset(i, logits.stride)] = scores[i] * keys.at(scale, key, i % S::kRows);
        }
      }
    };

    int tile = start;
    for (; tile < tiles; tile += T::kTeams, key += kStride, ++own.count) {
      const uint32_t barriers = base + team * sizeof(uint64_t) + own.stage() * (T::kTeams * sizeof(uint64_t));
      const uint64_t key_tile = own_keys + own.stage() * (T::kTeams * T::kStageBytes / 16);
      cuda::wait(barriers + offsetof(Shared<T>, key_full), own.parity());
#pragma unroll
      for (int part = 0; part < T::kParts; ++part) {
        float dots[Own::kColumns / 2], sums[S::kSums];
        multiply<Own>(key_tile + part * (kPartKeys * T::kDim / 16), queries, dots);
        if (kLate && part > 0) {
          __syncwarp();
          finish(tile, key + (part - 1) * kPartKeys);
        } else if (kLate) {
          finish(tile - T::kTeams, key - kStride + (T::kParts - 1) * kPartKeys);
        }
        const int stage = own.stage() * T::kTeams + team;
        const bool hole = keys.hole(shared, stage);
        if (part == 0) scale = keys.scale(shared, stage);
        cuda::wgmma_wait<0>();
        cuda::wgmma_results(dots);
        if (part == T::kParts - 1) warp_arrive(barriers + static_cast<uint32_t>(offsetof(Shared<T>, key_empty)));
        sum_own_heads<Own>(dots, weights, sums);
        add_own_sums<Own>(sums, rows);
        if (hole) {
#pragma unroll
          for (float& sum : rows) sum = -__builtin_inff();
        }
        if constexpr (!kLate) finish(tile, key + part * kPartKeys);
      }
    }
    if (kLate) finish(tile - T::kTeams, key - kStride + (T::kParts - 1) * kPartKeys);
    warp_arrive(&shared.unit_empty[units.stage()]);
  }
}

}  // namespace indexcache::sm90::indexer
