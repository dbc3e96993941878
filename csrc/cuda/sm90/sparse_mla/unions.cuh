// Builds the union of a group's lists: a bitmap of rows for each token in shared memory, then a walk over the rows that
// any of them has, in order.
//
// A bitmap cannot say that a list names a row twice, which counts twice in the softmax: the group then goes token by
// token, as it does when its union is not much shorter than its lists, or its rows are spread over too many windows.
#pragma once

#include "csrc/cuda/common/dependent_launch.cuh"
#include "csrc/cuda/common/warp.cuh"
#include "csrc/cuda/sm90/sparse_mla/unions.h"

namespace indexcache::sm90::attention {

inline constexpr int kMaxWindows = 16;  // of rows: the bitmaps have bits for one
/// Of a list, per lane. A sorted list would send the atomics of lanes with neighbouring entries to one word.
inline constexpr int kLaneEntries = 16;
inline constexpr int kWarpEntries = cuda::kWarpSize * kLaneEntries;

/// Words of a bitmap that a lane has at a time.
struct alignas(8) Words {
  uint32_t of[2];
};
inline constexpr int kLaneWords = sizeof(Words) / sizeof(uint32_t);
inline constexpr int kWarpWords = cuda::kWarpSize * kLaneWords;

struct UnionCall {
  const int32_t* indices;  // [tokens, k]
  const int32_t* lengths;  // [tokens] or null
  int64_t tokens, k, rows;
  int words;  // of a token's bitmap
  Unions to;
};

template <int kGroup>
struct UnionTile {
  static constexpr int kThreads = 128 * kGroup, kWarps = 4 * kGroup;
  static constexpr int kMostWords = (1 << 15) / kGroup / kWarpWords * kWarpWords;  // of a token's bitmap
  static constexpr int words(int64_t rows) {
    const auto all = static_cast<int>(std::min<int64_t>((rows + 31) / 32, kMostWords));
    return std::max(1, (all + kWarpWords - 1) / kWarpWords) * kWarpWords;
  }
  static constexpr int shared_bytes(int words, int64_t blocks) {
    return words * kGroup * 4 + static_cast<int>(blocks) * kTileKeys;
  }
  static constexpr int kMostSharedBytes =
      shared_bytes(kMostWords, union_size(1, kMaxGroupEntries / kGroup, kGroup).blocks);
};

/// The lists of a group.
struct Lists {
  const int32_t* indices;
  const int32_t* lengths;
  int tokens, k;
  int64_t rows;

  __device__ int length(int token) const { return lengths == nullptr ? k : min(k, max(0, __ldg(lengths + token))); }

  /// Calls each(token, row) for every entry that names a row; the warps of the block share them.
  template <int kWarps, class Each>
  __device__ void for_each(const Each& each) const {
    const bool quads = k % 4 == 0 && reinterpret_cast<uintptr_t>(indices) % 16 == 0;
    const int chunks = (k + kWarpEntries - 1) / kWarpEntries;
    for (int chunk = cuda::warp_id(); chunk < tokens * chunks; chunk += kWarps) {
      const int token = chunk / chunks, end = length(token);
      const int first = (chunk - token * chunks) * kWarpEntries + cuda::lane_id() * kLaneEntries;
      const int32_t* const list = indices + token * k;
      int32_t entries[kLaneEntries];
#pragma unroll
      for (int i = 0; i < kLaneEntries; i += 4) {
        if (quads) {
          *reinterpret_cast<int4*>(entries + i) =
              first + i < end ? __ldg(reinterpret_cast<const int4*>(list + first + i)) : int4{-1, -1, -1, -1};
        } else {
#pragma unroll
          for (int j = i; j < i + 4; ++j) entries[j] = first + j < end ? __ldg(list + first + j) : -1;
        }
      }
#pragma unroll
      for (int i = 0; i < kLaneEntries; ++i) {
        if (first + i < end && entries[i] >= 0 && entries[i] < rows) each(token, entries[i]);
      }
    }
  }
};

/// Rows that a group names: the first, and windows up to the last.
struct Span {
  int first, windows;
};
template <int kWarps>
__device__ Span span_of(const Lists& lists, int window) {
  if (lists.rows <= window) return {0, 1};
  __shared__ int first, last;
  if (threadIdx.x == 0) first = INT32_MAX, last = -1;
  __syncthreads();
  int low = INT32_MAX, high = -1;
  lists.for_each<kWarps>([&](int, int row) { low = min(low, row), high = max(high, row); });
  low = __reduce_min_sync(cuda::kFullMask, low), high = __reduce_max_sync(cuda::kFullMask, high);
  if (cuda::lane_id() == 0) atomicMin(&first, low), atomicMax(&last, high);
  __syncthreads();
  return {first, last < 0 ? 0 : (last - first) / window + 1};
}

/// A block per group.
template <int kGroup>
__global__ void __launch_bounds__(UnionTile<kGroup>::kThreads) union_kernel(const __grid_constant__ UnionCall call) {
  using Tile = UnionTile<kGroup>;
  extern __shared__ __align__(16) uint32_t memory[];
  uint32_t* const bits = memory;                                             // [kGroup][words]
  auto* const masks = reinterpret_cast<uint8_t*>(bits + kGroup * call.words);  // of keys, a bit per token
  cuda::start_next_kernel();
  const int64_t first_token = int64_t{blockIdx.x} * kGroup;
  const Lists lists{.indices = call.indices + first_token * call.k,
                    .lengths = call.lengths == nullptr ? nullptr : call.lengths + first_token,
                    .tokens = static_cast<int>(min(int64_t{kGroup}, call.tokens - first_token)),
                    .k = static_cast<int>(call.k),
                    .rows = call.rows};
  int listed = 0;
  for (int token = 0; token < lists.tokens; ++token) listed += lists.length(token);
  const auto most = static_cast<int>(most_union_keys(listed));
  const int64_t first_block = call.to.first_block(first_token);
  int32_t* const keys = call.to.keys + first_block * kTileKeys;
  const int window = call.words * 32;
  const Span span = span_of<Tile::kWarps>(lists, window);

  int found = 0;
  bool apart = span.windows > kMaxWindows, repeated = false;
  for (int w = 0; w < span.windows && !apart; ++w) {
    const int base = span.first + w * window;
    for (int i = threadIdx.x; i < kGroup * call.words / kLaneWords; i += Tile::kThreads) {
      reinterpret_cast<Words*>(bits)[i] = {};
    }
    __syncthreads();
    lists.for_each<Tile::kWarps>([&](int token, int row) {
      const uint32_t at = row - base, bit = 1u << at % 32;
      if (at < window) repeated |= (atomicOr(bits + token * call.words + at / 32, bit) & bit) != 0;
    });
    __syncthreads();

    // A warp has neighbouring words, and its lanes neighbouring ones of them: so the stores of keys are close together.
    const int share = (call.words / kWarpWords + Tile::kWarps - 1) / Tile::kWarps * kWarpWords;
    const int begin = cuda::warp_id() * share, end = min(call.words, begin + share);
    const auto words_of = [&](int token, int i) {
      return *reinterpret_cast<const Words*>(bits + token * call.words + i + cuda::lane_id() * kLaneWords);
    };
    const auto unite = [](Words& all, const Words& more) {
      for (int j = 0; j < kLaneWords; ++j) all.of[j] |= more.of[j];
    };
    const auto count = [](const Words& words) {
      int sum = 0;
      for (const uint32_t word : words.of) sum += __popc(word);
      return sum;
    };
    int own = 0;
    for (int i = begin; i < end; i += kWarpWords) {
      Words all = words_of(0, i);
#pragma unroll
      for (int token = 1; token < kGroup; ++token) unite(all, words_of(token, i));
      own += count(all);
    }
    own = __reduce_add_sync(cuda::kFullMask, own);
    const auto sum = cuda::block_exclusive_sum<Tile::kThreads>(cuda::lane_id() == 0 ? own : 0);
    apart = found + static_cast<int>(sum.total) > most;
    if (apart) break;
    int rank = found + __shfl_sync(cuda::kFullMask, static_cast<int>(sum.before), 0);
    for (int i = begin; i < end; i += kWarpWords) {
      Words all{}, of_token[kGroup];
#pragma unroll
      for (int token = 0; token < kGroup; ++token) unite(all, of_token[token] = words_of(token, i));
      int at = rank + static_cast<int>(cuda::warp_exclusive_sum(count(all)));
      rank = __shfl_sync(cuda::kFullMask, at + count(all), cuda::kWarpSize - 1);
      const int first_row = base + (i + cuda::lane_id() * kLaneWords) * 32;
#pragma unroll
      for (int j = 0; j < kLaneWords; ++j) {
        for (uint32_t left = all.of[j]; left != 0; left &= left - 1, ++at) {
          const int bit = __ffs(left) - 1;
          uint32_t mask = 0;
#pragma unroll
          for (int token = 0; token < kGroup; ++token) mask |= (of_token[token].of[j] >> bit & 1) << token;
          keys[at] = first_row + j * 32 + bit;
          masks[at] = mask;
        }
      }
    }
    found += sum.total;
    __syncthreads();
  }

  if (__syncthreads_or(apart || repeated)) {
    if (threadIdx.x != 0) return;
    Item* const singles = call.to.singles + atomicAdd(call.to.counts + 1, lists.tokens);
    for (int token = 0; token < lists.tokens; ++token) singles[token] = {static_cast<int32_t>(first_token + token), -1};
    return;
  }
  constexpr int kBlockWords = kTileKeys / 32;  // of a token
  const int all_words = (found + kTileKeys - 1) / kTileKeys * kBlockWords, lane = cuda::lane_id();
  for (int word = cuda::warp_id(); word < all_words; word += Tile::kWarps) {
    const int key = word * 32 + lane;
    const uint32_t mask = key < found ? masks[key] : 0;
    uint32_t of_lane = 0;
#pragma unroll
    for (int token = 0; token < kGroup; ++token) {
      const uint32_t members = __ballot_sync(cuda::kFullMask, mask >> token & 1);
      if (lane == token) of_lane = members;
    }
    const int64_t block = first_block + word / kBlockWords;
    if (lane < kGroup) call.to.members[(block * kGroup + lane) * kBlockWords + word % kBlockWords] = of_lane;
  }
  if (threadIdx.x == 0) call.to.groups[atomicAdd(call.to.counts, 1)] = {static_cast<int32_t>(first_token), found};
}

}  // namespace indexcache::sm90::attention
