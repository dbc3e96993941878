// Tiles, shared memory and schedule of the sm90 indexer scores.
//
// A tile is 64 keys x (queries x heads): keys are M of wgmma and heads are N. Of eight neighbouring columns, which the
// four lanes of a quad hold, up to four queries have their share, so that a thread holds two keys and all heads of one
// query, or a half or a quarter of them where a tile has fewer queries: what is summed in a thread needs no shuffle.
//
// Roles of a block (one per SM):
//   warpgroup 0, warp 0    producer: finds units of work and copies queries and keys (TMA)
//   warpgroup 0, warps 1-3 write -inf where no query of a unit sees anything
//   warpgroups 1-4         math: teams take tiles in turn, and some always multiply while others sum heads
// docs/indexer.md says what a tile costs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "indexcache/params.h"

namespace indexcache::sm90::indexer {

inline constexpr int kTileKeys = 64;  // M of wgmma, and a page of the cache
static_assert(kTileKeys == kIndexPage);
inline constexpr int kMathWarpgroups = 4;
inline constexpr int kThreads = 128 * (1 + kMathWarpgroups);
inline constexpr int kMathWarps = 4 * kMathWarpgroups;
inline constexpr int kFillWarps = 3;
// 64 accumulators and 32 weights per math thread. The math warpgroups can take no more than the producer gives: a block
// starts with as many registers per thread as the SM has for it, in eights, and waits forever for others.
inline constexpr int kProducerRegisters = 32;
inline constexpr int kMathRegisters = 112;
inline constexpr int kStartRegisters = 65536 / kThreads / 8 * 8;
static_assert(kProducerRegisters + kMathWarpgroups * kMathRegisters <= (1 + kMathWarpgroups) * kStartRegisters);

/// Columns of a dense tile, for a team of two warpgroups. 256 halves the L2 traffic per product of 128.
inline constexpr int kDenseColumns = 256;
/// Columns of a tile that one warpgroup takes at most: four warpgroups have the registers for them.
inline constexpr int kOwnColumns = 128;

template <int heads, int queries, int dim>
struct Tile {
  static constexpr int kHeads = heads;
  static constexpr int kQueries = queries;
  static constexpr int kDim = dim;
  static constexpr int kColumns = heads * queries;
  static constexpr int kTeam = (kColumns + kOwnColumns - 1) / kOwnColumns;  // warpgroups that share a tile
  static constexpr int kTeams = kMathWarpgroups / kTeam;
  using Own = Tile<heads, queries / kTeam, dim>;  // of one warpgroup
  // Eight neighbouring columns: so many queries, and heads of each. A set is so many queries and all their columns.
  static constexpr int kGroupQueries = queries / kTeam < 4 ? queries / kTeam : 4;
  static constexpr int kGroupHeads = 8 / kGroupQueries;
  static constexpr int kSetColumns = heads * kGroupQueries;
  static constexpr int kSets = queries / kGroupQueries;
  static constexpr int kKeyBytes = kTileKeys * dim;
  static constexpr int kPageBytes = kTileKeys * (dim + 4);  // of the cache: keys, then their scales
  static constexpr int kQueryBytes = kColumns * dim;
  // A page and its scales arrive as one tile, in rows of `dim` bytes; a stage is whole groups of eight swizzled rows.
  static constexpr int kPageRows = kPageBytes / dim;
  static constexpr int kStageBytes = (kPageRows + 7) / 8 * 8 * dim;
  // 16 x 8.25 KiB in flight are 17 MiB on 132 SMs: four times what the memory's latency needs, and 8,000 cycles of
  // work at 64 x 256, which hide the start of the next unit.
  static constexpr int kStages = 16;
  static constexpr int kUnitStages = kColumns <= 128 ? 4 : 2;
  static_assert(kStages % kTeams == 0, "a stage belongs to one team");
  static_assert(kMathWarpgroups % kTeam == 0 && kColumns % (32 * kTeam) == 0);
  static_assert(queries % (kTeam * kGroupQueries) == 0 && 4 % kGroupQueries == 0 && heads % 8 == 0);
  static_assert(dim == 128 || dim == 64, "a row is one swizzle span");
};

/// Columns that a query sees.
struct Window {
  int begin, end;
};

/// A run of key tiles for the same queries.
template <class T>
struct Unit {
  int64_t row;    // of the logits, of the first query
  int queries;    // up to T::kQueries
  int first_key;  // column of the first tile's first key
  int tiles;      // 0: no more units
  int clear_begin, clear_end;  // tiles [begin, end) are stored without looking at windows
  Window windows[T::kQueries];
};

template <class T>
struct Shared {
  alignas(1024) uint8_t keys[T::kStages][T::kStageBytes];  // 1,024: eight swizzled rows
  alignas(1024) uint8_t queries[T::kUnitStages][T::kQueryBytes];
  alignas(128) float weights[T::kUnitStages][T::kColumns];
  Unit<T> units[T::kUnitStages];
  int hole[T::kStages];  // the block table names no page for the tile
  uint64_t key_full[T::kStages], key_empty[T::kStages];
  uint64_t unit_full[T::kUnitStages], unit_empty[T::kUnitStages];
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Tiles per unit of a dense call: `query_blocks` times this many units are dealt to the SMs in turn. Long units start
/// less often, short ones fill the last round better.
constexpr int64_t unit_tiles(int64_t query_blocks, int64_t tiles, int sms) {
  constexpr int64_t kLongest = 128, kTrials = 64;
  constexpr int64_t kStart = 1;  // cost of starting a unit, in tiles
  const int64_t filling = std::min(tiles, sms / query_blocks);  // chunks that give every SM a unit
  const int64_t fewest = std::max(ceil_div(tiles, kLongest), filling);
  int64_t best = 0, best_cost = INT64_MAX;
  for (int64_t chunks = fewest; chunks < fewest + kTrials && chunks <= tiles; ++chunks) {
    const int64_t length = ceil_div(tiles, chunks);
    const int64_t units = query_blocks * ceil_div(tiles, length);
    const int64_t cost = ceil_div(units, sms) * (length + kStart);
    if (cost < best_cost) best = length, best_cost = cost;
  }
  return best;
}

/// Pages of a paged call that are more than this do not stay in the L2 cache (50 MB on an H100, 60 on an H200).
inline constexpr int64_t kCachedBytes = int64_t{48} << 20;

/// Columns of -inf that a warp writes at a time in a paged call.
inline constexpr int64_t kFillColumns = 4096;

}  // namespace indexcache::sm90::indexer
