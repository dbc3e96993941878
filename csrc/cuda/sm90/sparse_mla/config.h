// Tiles, shared memory and schedule of the sm90 sparse MLA attention.
//
// A block attends for 64 heads of one query token, 64 listed keys at a time. Roles (one block per SM):
//   warpgroups 0, 1   math: warpgroup w scores the key blocks j with j % 2 == w, and sums the 256 value dims from 256 w
//                     on of every block
//   warpgroup 2       producer: gathers the listed rows, as bf16, into a ring of two key blocks; from the 656-byte
//                     cache it is two warpgroups, a half of the value dims each
// From bf16 rows a block goes on from token to token, and the ring with it: key blocks and barrier phases count on.
// Few tokens split their keys over the blocks of a cluster, which combine their results in each other's shared memory.
// docs/sparse_mla.md has the schedule and what bounds it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "indexcache/params.h"

namespace indexcache::sm90::attention {

inline constexpr int kTileHeads = 64;  // M of wgmma
inline constexpr int kTileKeys = 64;   // N of the scores, K of the values
inline constexpr int kChunkDims = 64;  // 128 bytes of bf16: a swizzle span
inline constexpr int kValueDims = static_cast<int>(kLatentDim);
inline constexpr int kHalfDims = kValueDims / 2;  // of a math warpgroup; N of wgmma
inline constexpr int kMathWarpgroups = 2;
inline constexpr int kMathWarps = 4 * kMathWarpgroups;
inline constexpr int kMathThreads = 128 * kMathWarpgroups;
inline constexpr int kStages = 2;
inline constexpr int kMaxSplits = 16;  // the largest cluster
inline constexpr int kChunkElements = kTileKeys * kChunkDims;
inline constexpr int64_t kMaxListed = int64_t{1} << 30;  // entries of a list: kernels count them, and more, in an int

// A key block arrives, is scored, and is freed in four parts of dims, in this order; part p holds half p / 2 of the
// value dims of warpgroup p % 2, and the last one the rope dims too.
inline constexpr int kParts = 4;
inline constexpr int kPartDims = kHalfDims / 2;  // of values; N of wgmma
constexpr int part_warpgroup(int part) { return part % kMathWarpgroups; }
constexpr int first_chunk(int part) { return (part_warpgroup(part) * kHalfDims + part / 2 * kPartDims) / kChunkDims; }
constexpr int end_chunk(int part, int chunks) {
  return part == kParts - 1 ? chunks : first_chunk(part) + kPartDims / kChunkDims;
}

// Where the rows come from. The warpgroups deal out among them the registers that the block has at the start: asking
// for more would wait for ever.
struct DenseSource {  // bf16 rows, copied by cp.async
  static constexpr int kProducerWarpgroups = 1;
  static constexpr int kProducerRegisters = 72;
  static constexpr int kMathRegisters = 216;
  static constexpr bool kManyTokens = true;  // a block goes on from token to token
  static constexpr int kEarlyParts = 2;      // are scored before the values of the block before, the others after them
  /// Whether readers fence the producer's writes from the tensor cores. After cp.async CUTLASS does not in its main
  /// loops either: the barrier that counts the copies orders them.
  static constexpr bool kReadersFence = false;
};
struct CacheSource {  // 656-byte rows, dequantised in registers
  static constexpr int kProducerWarpgroups = 2;
  static constexpr int kProducerRegisters = 48;
  static constexpr int kMathRegisters = 208;
  static constexpr bool kManyTokens = false;
  static constexpr int kEarlyParts = 0;
  static constexpr bool kReadersFence = true;
};

// Few heads: the 64 rows of a tile are the heads of a group of neighbouring tokens, over the union of their lists.
// unions.cuh builds the unions, in a kernel of its own; a group whose lists have too little in common goes token by
// token.
inline constexpr int kMaxGroup = 8;                  // tokens
inline constexpr int64_t kMinGroupedTokens = 512;    // of a call: fewer leave multiprocessors idle
inline constexpr int64_t kMaxGroupEntries = 1 << 15;  // of its lists: so much fits into shared memory
inline constexpr int64_t kMaxUnionBytes = int64_t{64} << 20;  // of a call's scratch: longer calls go in chunks

/// Tokens that share a tile, 1: none do. It depends on the shape of the call only.
constexpr int group_tokens(int64_t tokens, int64_t heads, int64_t k) {
  if (tokens < kMinGroupedTokens) return 1;
  const int64_t most = std::min(kTileHeads / heads, kMaxGroupEntries / std::max<int64_t>(k, 1));
  for (const int group : {8, 4, 3, 2}) {
    if (group <= most) return group;
  }
  return 1;
}

/// A larger union is not worth it: the tokens together list `entries`.
constexpr int64_t most_union_keys(int64_t entries) { return entries * 9 / 10; }

template <class source, int d_qk, bool grouped = false>
struct Tile {
  using Source = source;
  static constexpr bool kGrouped = grouped;  // few heads, above
  static constexpr int kDims = d_qk;
  static constexpr int kChunks = d_qk / kChunkDims;
  static constexpr int kWarpgroups = kMathWarpgroups + Source::kProducerWarpgroups;
  static constexpr int kThreads = 128 * kWarpgroups;
  static constexpr int kStartRegisters = (1 << 16) / kThreads / 8 * 8;  // of a thread
  static constexpr int kBlockElements = kTileKeys * d_qk;
  static constexpr int kMarkWords = (grouped ? kMaxGroup : 1) * (kTileKeys / 32);
  static_assert(d_qk % kChunkDims == 0 && d_qk >= kValueDims);
  static_assert(kMathWarpgroups * Source::kMathRegisters + Source::kProducerWarpgroups * Source::kProducerRegisters <=
                kWarpgroups * kStartRegisters);
};

/// What a row of scores has come to: the sum of exp2(score - max), of scores to base 2. The maximum is the true one or
/// up to kSlack less.
inline constexpr float kSlack = 8;
struct RowState {
  float max, sum;
};

template <class T>
struct Shared {
  using Element = uint16_t;  // bf16
  // Chunks of 64 rows x 64 dims, swizzled as wgmma wants them. Afterwards what a split sends.
  alignas(1024) Element queries[T::kBlockElements];
  // The same. Afterwards the output, in the place of the last block, or what the other splits send.
  alignas(1024) Element keys[kStages][T::kBlockElements];
  alignas(1024) Element probabilities[kTileHeads * kTileKeys];
  float max[kTileHeads];                    // after the block whose probabilities these are
  float sums[kMathWarpgroups][kTileHeads];  // over the blocks that a warpgroup scored
  RowState state[kTileHeads];               // of this split
  uint32_t valid[kStages][T::kMarkWords];   // a bit per key; of a union, such words for each token of the group
  uint64_t query_full, query_empty;         // phase i: of the block's i-th token
  uint64_t key_full[kStages][kParts], key_empty[kStages][kParts];
  uint64_t probabilities_full[kMathWarpgroups];  // phase i: those of the warpgroup's block i
  uint64_t splits_full;                          // all that the blocks of the cluster send to this one
};

/// How a call is cut into blocks. It depends on the shape of the call only.
struct Cut {
  int tile_heads;  // heads that a block attends for: rows of its tile, the others are garbage
  int splits;      // blocks of a cluster, which share the keys of one token and head tile
};

/// Clusters of this size that run at once: a cluster is in one GPC. An H200 says 66, 39, 30, 22, 17, 15, 15, 9 and then
/// 7 for 2, 3, … 16 blocks; cards differ, and on one that has room for fewer a second wave doubles the time.
constexpr int resident_clusters(int size) {
  int clusters = 0;
  for (const int sms : {18, 18, 16, 16, 16, 16, 16, 8, 2, 2, 2, 2}) clusters += sms / size;
  return clusters;
}

constexpr int head_tiles(int heads, int tile_heads) { return (heads + tile_heads - 1) / tile_heads; }

/// As few key blocks for each block as one wave of clusters allows. Then smaller head tiles, as far as the SMs go: they
/// cost more products, of which there are too many anyway, and less time for combining the splits.
constexpr Cut cut(int64_t tokens, int heads, int64_t k) {
  constexpr int kFewHeads = 16;
  const int64_t key_blocks = (k + kTileKeys - 1) / kTileKeys;
  Cut result{kTileHeads, 1};
  const auto fits = [&](int tile_heads, int splits) {
    return tokens * head_tiles(heads, tile_heads) <= resident_clusters(splits);
  };
  int64_t longest = key_blocks;
  for (int splits = 2; splits <= kMaxSplits && splits <= key_blocks; ++splits) {
    const int64_t share = (key_blocks + splits - 1) / splits;
    if (share < longest && fits(result.tile_heads, splits)) longest = share, result.splits = splits;
  }
  if (result.splits == 1) return result;
  while (result.tile_heads > kFewHeads && fits(result.tile_heads / 2, result.splits)) result.tile_heads /= 2;
  return result;
}

}  // namespace indexcache::sm90::attention
