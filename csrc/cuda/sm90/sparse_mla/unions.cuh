// Builds the union of a group's lists: a bitmap of rows in shared memory, its bits counted up to every word, and so each
// listed row's place among the ascending rows of the union.
//
// A bitmap cannot say that a list names a row twice, which counts twice in the softmax: the group then goes token by token,
// as it does when its union is not much shorter than its lists, or its rows are spread over too many windows.
#pragma once

#include "csrc/cuda/common/dependent_launch.cuh"
#include "csrc/cuda/common/warp.cuh"
#include "csrc/cuda/sm90/sparse_mla/unions.h"

namespace indexcache::sm90::attention {

inline constexpr int kUnionThreads = 256;
inline constexpr int kUnionWarps = kUnionThreads / cuda::kWarpSize;
inline constexpr int kWindowRows = 1 << 19;  // that the bitmap has bits for, at most; more rows go window by window
inline constexpr int kMaxWindows = 4;
/// Of a list, per lane. A sorted list would send the atomics of lanes with neighbouring entries to one word.
inline constexpr int kLaneEntries = 16;

/// Words of the bitmap that a lane has at a time.
struct alignas(16) Words {
  uint32_t of[4];
};
inline constexpr int kLaneWords = sizeof(Words) / sizeof(uint32_t);

struct UnionCall {
  const int32_t* indices;  // [tokens, k]
  const int32_t* lengths;  // [tokens] or null
  int64_t tokens, k, rows;
  int words;  // of the bitmap, as many for every thread
  int pitch;  // words that a token has bits in
  Unions to;
};

constexpr int union_words(int64_t rows) {
  const auto words = static_cast<int>((std::min<int64_t>(rows, kWindowRows) + 31) / 32);
  constexpr int kStep = kUnionThreads * kLaneWords;
  return std::max(1, (words + kStep - 1) / kStep) * kStep;
}
constexpr int union_pitch(int64_t blocks) { return static_cast<int>(blocks) * (kTileKeys / 32); }
constexpr int union_shared_bytes(int words, int member_words) { return words * 6 + member_words * 4; }
inline constexpr int kMostUnionShared = union_shared_bytes(
    union_words(kWindowRows), union_pitch(union_size(1, kMaxGroupEntries / kMaxGroup, kMaxGroup).blocks) * kMaxGroup);

/// The lists of a group.
struct Lists {
  const int32_t* indices;
  const int32_t* lengths;
  int tokens, k;
  int64_t rows;

  __device__ int length(int token) const { return lengths == nullptr ? k : min(k, max(0, __ldg(lengths + token))); }

  /// Calls each(token, row) for every entry that names a row; the threads of the block share them.
  template <class Each>
  __device__ void for_each(const Each& each) const {
    constexpr int kWarpEntries = cuda::kWarpSize * kLaneEntries;
    const bool quads = k % 4 == 0 && reinterpret_cast<uintptr_t>(indices) % 16 == 0;
    const int chunks = (k + kWarpEntries - 1) / kWarpEntries;
    for (int chunk = cuda::warp_id(); chunk < tokens * chunks; chunk += kUnionWarps) {
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
inline __device__ Span span_of(const Lists& lists) {
  if (lists.rows <= kWindowRows) return {0, 1};
  __shared__ int first, last;
  if (threadIdx.x == 0) first = INT32_MAX, last = -1;
  __syncthreads();
  int low = INT32_MAX, high = -1;
  lists.for_each([&](int, int row) { low = min(low, row), high = max(high, row); });
  low = __reduce_min_sync(cuda::kFullMask, low), high = __reduce_max_sync(cuda::kFullMask, high);
  if (cuda::lane_id() == 0) atomicMin(&first, low), atomicMax(&last, high);
  __syncthreads();
  return {first, last < 0 ? 0 : (last - first) / kWindowRows + 1};
}

/// A block per group.
__global__ void __launch_bounds__(kUnionThreads) union_kernel(const __grid_constant__ UnionCall call) {
  extern __shared__ __align__(16) uint32_t memory[];
  uint32_t* const bits = memory;
  uint32_t* const members = bits + call.words;  // [group][pitch]
  auto* const ranks = reinterpret_cast<uint16_t*>(members + call.pitch * call.to.group);  // rows before each word's
  cuda::start_next_kernel();
  const int64_t first_token = int64_t{blockIdx.x} * call.to.group;
  const Lists lists{.indices = call.indices + first_token * call.k,
                    .lengths = call.lengths == nullptr ? nullptr : call.lengths + first_token,
                    .tokens = static_cast<int>(min(int64_t{call.to.group}, call.tokens - first_token)),
                    .k = static_cast<int>(call.k),
                    .rows = call.rows};
  int listed = 0;
  for (int token = 0; token < lists.tokens; ++token) listed += lists.length(token);
  const auto most = static_cast<int>(most_union_keys(listed));
  for (int i = threadIdx.x; i < call.pitch * call.to.group; i += kUnionThreads) members[i] = 0;
  int32_t* const keys = call.to.keys + call.to.first_block(first_token) * kTileKeys;
  const Span span = span_of(lists);

  int found = 0;
  bool apart = span.windows > kMaxWindows, repeated = false;
  for (int window = 0; window < span.windows && !apart; ++window) {
    const int base = span.first + window * kWindowRows;
    for (int i = threadIdx.x; i < call.words / kLaneWords; i += kUnionThreads) reinterpret_cast<Words*>(bits)[i] = {};
    __syncthreads();
    lists.for_each([&](int, int row) {
      const uint32_t bit = row - base;
      if (bit < kWindowRows) atomicOr(bits + bit / 32, 1u << bit % 32);
    });
    __syncthreads();

    // A warp has neighbouring words, and its lanes neighbouring ones of them: so the stores of keys are close together.
    constexpr int kStep = cuda::kWarpSize * kLaneWords;
    const int warp_words = call.words / kUnionWarps, begin = cuda::warp_id() * warp_words + cuda::lane_id() * kLaneWords;
    const auto words_at = [&](int i) { return *reinterpret_cast<const Words*>(bits + i); };
    const auto count = [](const Words& words) {
      int sum = 0;
      for (const uint32_t word : words.of) sum += __popc(word);
      return sum;
    };
    int own = 0;
    for (int i = begin; i < begin + warp_words; i += kStep) own += count(words_at(i));
    own = __reduce_add_sync(cuda::kFullMask, own);
    const auto sum = cuda::block_exclusive_sum<kUnionThreads>(cuda::lane_id() == 0 ? own : 0);
    apart = found + static_cast<int>(sum.total) > most;
    if (apart) break;
    int rank = found + __shfl_sync(cuda::kFullMask, static_cast<int>(sum.before), 0);
    for (int i = begin; i < begin + warp_words; i += kStep) {
      const Words words = words_at(i);
      int at = rank + static_cast<int>(cuda::warp_exclusive_sum(count(words)));
      rank = __shfl_sync(cuda::kFullMask, at + count(words), cuda::kWarpSize - 1);
#pragma unroll
      for (int j = 0; j < kLaneWords; ++j) {
        ranks[i + j] = at;
        for (uint32_t left = words.of[j]; left != 0; left &= left - 1) keys[at++] = base + (i + j) * 32 + __ffs(left) - 1;
      }
    }
    __syncthreads();
    lists.for_each([&](int token, int row) {
      const uint32_t bit = row - base;
      if (bit >= kWindowRows) return;
      const int rank = ranks[bit / 32] + __popc(bits[bit / 32] & ((1u << bit % 32) - 1));
      const uint32_t own = 1u << rank % 32;
      repeated |= (atomicOr(members + token * call.pitch + rank / 32, own) & own) != 0;
    });
    found += sum.total;
    __syncthreads();
  }

  if (__syncthreads_or(apart || repeated)) {
    if (threadIdx.x != 0) return;
    Item* const singles = call.to.singles + atomicAdd(call.to.counts + 1, lists.tokens);
    for (int token = 0; token < lists.tokens; ++token) singles[token] = {static_cast<int32_t>(first_token + token), -1};
    return;
  }
  const int block_words = call.to.member_words(), blocks = (found + kTileKeys - 1) / kTileKeys;
  uint32_t* const to = call.to.members + call.to.first_block(first_token) * block_words;
  for (int i = threadIdx.x; i < blocks * block_words; i += kUnionThreads) {
    const int block = i / block_words, token = i % block_words / (kTileKeys / 32);
    to[i] = members[token * call.pitch + block * (kTileKeys / 32) + i % (kTileKeys / 32)];
  }
  if (threadIdx.x == 0) call.to.groups[atomicAdd(call.to.counts, 1)] = {static_cast<int32_t>(first_token), found};
}

}  // namespace indexcache::sm90::attention
