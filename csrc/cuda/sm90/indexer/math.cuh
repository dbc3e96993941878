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
    uint8_t* const to = shared.queries[stage] + set * T::kSetColumns * T::kDim;
    cuda::copy_tile(to, map, 0, 0, query + set * T::kGroupQueries, 0, barrier);
  }
  cuda::copy_bulk(shared.weights[stage], weights + int64_t{query} * T::kHeads, weight_bytes, barrier);
}

/// Stores of a tile that not every query sees whole, or for which the unit has too few queries. `query`, `key` and
/// `out` are of this lane's first score.
template <class T, class S = Share<typename T::Own>>
__device__ void store_edge(const Unit<T>& unit, const Logits& logits, int query, int key, bool hole, float* out,
                           const float (&scores)[S::kScores]) {
#pragma unroll
  for (int i = 0; i < S::kScores; ++i) {
    const int set_query = query + i / S::kRows * T::kGroupQueries, n = key + 8 * (i % S::kRows);
    if (!S::stores() || set_query >= unit.queries || n >= logits.columns) continue;
    const Window window = unit.windows[set_query];
    const bool seen = n >= window.begin && n < window.end && !hole;
    out[S::offset(i, logits.stride)] = seen ? scores[i] : -__builtin_inff();
  }
}

/// Tiles are dealt to the teams in turn, over all units of the block; stages too. The warpgroups of a team share the
/// queries of a tile.
///
/// Nobody waits for another's products: with four warpgroups the tensor cores have work while some sum heads. The
/// products of a tile are under way while the warpgroup finishes its tile before: only the sum over a lane's own heads,
/// which needs the products, keeps it from the next ones.
template <class T, class Keys>
__device__ void run_math(Shared<T>& shared, const Logits& logits, const Keys& keys, int group) {
  using Own = typename T::Own;
  using S = Share<Own>;
  // More scores do not fit beside the products of the next tile; narrower tiles are bound by memory.
  constexpr bool kLate = Own::kSets == 1 && Own::kColumns == kOwnColumns;
  const int team = group / T::kTeam, member = group % T::kTeam;
  // What the loop needs is kept at hand: a shuffle's result is not computed anew, that of a sum is.
  const auto keep = [](uint32_t x) { return __shfl_sync(cuda::kFullMask, x, 0); };
  const auto keep_own = [](int x) { return __shfl_sync(cuda::kFullMask, x, cuda::lane_id()); };
  const uint32_t base = keep(cuda::shared_address(&shared));
  const auto operand = [&](uint32_t offset) {
    const uint64_t description = cuda::operand<T::kDim>(base + offset);
    return (description >> 32) << 32 | keep(static_cast<uint32_t>(description));
  };
  const uint64_t own_keys = operand(offsetof(Shared<T>, keys) + team * T::kStageBytes);
  const int row = keep_own(S::first_row());
  Ring<T::kUnitStages> units;
  Ring<T::kStages / T::kTeams> own;  // tiles of this team
  uint32_t before = 0;               // tiles of earlier units
  for (;; ++units.count) {
    cuda::wait(&shared.unit_full[units.stage()], units.parity());
    const Unit<T>& unit = shared.units[units.stage()];
    const int tiles = unit.tiles;
    if (tiles == 0) break;
    const int clear_begin = unit.clear_begin, clear_tiles = unit.clear_end - clear_begin, first_key = unit.first_key;
    const int start = static_cast<int>((team - before) % T::kTeams);
    const uint64_t queries =
        operand(offsetof(Shared<T>, queries) + units.stage() * T::kQueryBytes + member * Own::kQueryBytes);
    const int query = member * Own::kQueries + S::first_query();
    const bool stores = keep_own(S::stores() && (!S::kOneQuery || query < unit.queries)) != 0;
    float* out = logits.data + (unit.row + query) * logits.stride + first_key + start * kTileKeys + row;
    float weights[Own::kColumns / 4], rows[2 * Own::kSets];
    load_weights<Own>(shared.weights[units.stage()] + member * Own::kColumns, weights);
    typename Keys::Scale scale;

    const auto finish = [&](int tile) {
      float scores[S::kScores];
      add_lanes<Own>(rows, scores);
#pragma unroll
      for (int i = 0; i < S::kScores; ++i) scores[i] *= scale.of_row[i % S::kRows];
      const bool inside = static_cast<unsigned>(tile - clear_begin) < static_cast<unsigned>(clear_tiles);
      if (!inside || scale.hole()) {
        store_edge(unit, logits, query, first_key + tile * kTileKeys + row, scale.hole(), out, scores);
      } else if (stores) {
#pragma unroll
        for (int i = 0; i < S::kScores; ++i) out[S::offset(i, logits.stride)] = scores[i];
      }
      out += T::kTeams * kTileKeys;
    };

    int tile = start;
    for (; tile < tiles; tile += T::kTeams, ++own.count) {
      const uint32_t barriers = base + team * sizeof(uint64_t) + own.stage() * (T::kTeams * sizeof(uint64_t));
      cuda::wait(barriers + offsetof(Shared<T>, key_full), own.parity());
      float dots[Own::kColumns / 2];
      multiply<Own>(own_keys + own.stage() * (T::kTeams * T::kStageBytes / 16), queries, dots);
      if (kLate && tile != start) finish(tile - T::kTeams);
      scale = keys.scale(shared, own.stage() * T::kTeams + team, first_key + tile * kTileKeys + row);
      cuda::wgmma_wait<0>();
      cuda::wgmma_results(dots);
      cuda::warp_arrive(barriers + static_cast<uint32_t>(offsetof(Shared<T>, key_empty)));
      float sums[S::kSums];
      sum_own_heads<Own>(dots, weights, sums);
      add_own_sums<Own>(sums, rows);
      if constexpr (!kLate) finish(tile);
    }
    if (kLate && tile != start) finish(tile - T::kTeams);
    before += tiles;
    cuda::warp_arrive(&shared.unit_empty[units.stage()]);
  }
}

}  // namespace indexcache::sm90::indexer
