// The kernel: which work a block has, and what each warpgroup does of it, one token (or group) after the other.
#pragma once

#include "csrc/cuda/common/dependent_launch.cuh"
#include "csrc/cuda/common/tma.cuh"
#include "csrc/cuda/sm90/sparse_mla/finish.cuh"
#include "csrc/cuda/sm90/sparse_mla/gather_cache.cuh"
#include "csrc/cuda/sm90/sparse_mla/gather_dense.cuh"
#include "csrc/cuda/sm90/sparse_mla/store.cuh"
#include "csrc/cuda/sm90/sparse_mla/unions.h"

namespace indexcache::sm90::attention {

struct Call {
  SparseMlaParams p;
  CUtensorMap queries;  // bf16 [tokens, heads, d_qk] in tiles of one token, tile_heads heads and 64 dims
  Cut cut;
  int head_tiles;
  // Few heads: the queries in tiles of a group's tokens and all their heads.
  CUtensorMap group_queries = {};
  Unions unions = {};
};

/// Groups, which take longer, before single tokens.
inline __device__ Work grouped_work_of(const Call& call, unsigned item) {
  const Unions& unions = call.unions;
  const unsigned groups = unions.counts[0], singles = unions.counts[1];  // not __ldg: it could move before the wait
  if (item >= groups + singles) return {.token = call.p.tokens};
  const Item* const from = item < groups ? unions.groups + item : unions.singles + (item - groups);
  const auto [token, keys] = __builtin_bit_cast(Item, __ldg(reinterpret_cast<const int2*>(from)));
  const int tokens = keys < 0 ? 1 : static_cast<int>(min(int64_t{unions.group}, call.p.tokens - token));
  return {.token = token,
          .first_head = 0,
          .heads = tokens * call.p.heads,
          .tile_heads = kTileHeads,
          .split = 0,
          .splits = 1,
          .union_keys = keys};
}

/// The i-th item, a token and head tile, that the block has; none if the token does not exist. A grid whose keys are
/// split has one for each cluster.
template <class T>
__device__ Work work_of(const Call& call, unsigned i) {
  if constexpr (T::kGrouped) return grouped_work_of(call, blockIdx.x + i * gridDim.x);
  const unsigned item = blockIdx.x / call.cut.splits + i * gridDim.x, token = item / call.head_tiles;
  const int head = static_cast<int>(item - token * call.head_tiles) * call.cut.tile_heads;
  return {.token = token,
          .first_head = head,
          .heads = min(call.cut.tile_heads, call.p.heads - head),
          .tile_heads = call.cut.tile_heads,
          .split = static_cast<int>(blockIdx.x % call.cut.splits),
          .splits = call.cut.splits};
}

/// The share of a split is whole key blocks. It depends on the row and the splits only.
inline __device__ KeyList keys_of_split(const SparseMlaParams& p, const Work& work) {
  if (work.token >= p.tokens) return {};
  const int64_t length = p.lengths == nullptr ? p.k : min(p.k, max(int64_t{p.lengths[work.token]}, int64_t{0}));
  const auto listed = static_cast<int>(length);
  const int blocks = (listed + kTileKeys - 1) / kTileKeys, share = (blocks + work.splits - 1) / work.splits;
  const int begin = min(listed, work.split * share * kTileKeys), end = min(listed, begin + share * kTileKeys);
  return {p.indices + work.token * p.k + begin, end - begin, p.keys};
}

template <class T>
__device__ KeyList keys_of(const Call& call, const Work& work) {
  if (T::kGrouped && work.union_keys >= 0) {
    const Unions& unions = call.unions;
    const int64_t block = unions.first_block(work.token);
    return {.indices = unions.keys + block * kTileKeys,
            .count = work.union_keys,
            .rows = call.p.keys,
            .members = unions.members + block * unions.member_words(),
            .member_words = unions.member_words()};
  }
  return keys_of_split(call.p, work);
}

template <class T>
__device__ void init_barriers(Shared<T>& shared) {
  cuda::init_barrier(&shared.query_full, 1);
  cuda::init_barrier(&shared.query_empty, kMathWarps);
  for (int i = 0; i < kStages; ++i) {
    for (int part = 0; part < kParts; ++part) {
      cuda::init_barrier(&shared.key_full[i][part], full_arrivals(typename T::Source{}, part));
      cuda::init_barrier(&shared.key_empty[i][part], kMathWarps / kMathWarpgroups);
    }
  }
  for (int i = 0; i < kMathWarpgroups; ++i) cuda::init_barrier(&shared.probabilities_full[i], 4);
  cuda::init_barrier(&shared.splits_full, 1);
  cuda::publish_barriers();
}

/// Rows behind a group's, which no copy writes: with what lay there they could have blocks rescaled in vain.
template <class T>
__device__ void clear_rows_from(Shared<T>& shared, int first) {
  constexpr int kRowUnits = kChunkDims * 2 / sizeof(uint4), kChunkUnits = kTileHeads * kRowUnits;
  for (int i = threadIdx.x; i < T::kChunks * kChunkUnits; i += T::kThreads) {
    if (i % kChunkUnits >= first * kRowUnits) reinterpret_cast<uint4*>(shared.queries)[i] = {};
  }
  cuda::fence_async_proxy();
}

/// One thread.
template <class T>
__device__ void copy_queries(Shared<T>& shared, const Call& call, const Work& work) {
  const uint64_t policy = cuda::evict_first();
  const bool grouped = T::kGrouped && work.union_keys >= 0;
  const CUtensorMap* const queries = grouped ? &call.group_queries : &call.queries;
  const int heads = grouped ? call.unions.group * call.p.heads : call.cut.tile_heads;
  cuda::arrive_expecting(&shared.query_full, heads * T::kDims * 2);
#pragma unroll 1
  for (int chunk = 0; chunk < T::kChunks; ++chunk) {
    cuda::copy_tile(shared.queries + chunk * kChunkElements, queries, chunk * kChunkDims, work.first_head,
                    static_cast<int>(work.token), &shared.query_full, policy);
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) kernel(const __grid_constant__ Call call) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(memory);
  if (threadIdx.x == 0) {
    init_barriers(shared);
    if constexpr (!T::kGrouped) {
      if (call.cut.splits > 1) expect_splits(shared, work_of<T>(call, 0));
    }
  }
  if constexpr (T::kGrouped) clear_rows_from(shared, call.unions.group * call.p.heads);
  __syncthreads();
  cuda::wait_for_kernel_before();
  if (threadIdx.x == 0) {
    const Work work = work_of<T>(call, 0);
    if (work.token < call.p.tokens) copy_queries(shared, call, work);
  }
  // The shuffle tells the compiler that it is the same in all lanes.
  const int warpgroup = __shfl_sync(cuda::kFullMask, cuda::warp_id(), 0) / 4;
  uint32_t ring = 0;  // key blocks before this item
  if (warpgroup >= kMathWarpgroups) {
    cuda::give_registers<T::Source::kProducerRegisters>();
    Work work = work_of<T>(call, 0);
    KeyList keys = keys_of<T>(call, work);
    Producer<T, typename T::Source> producer(shared, call.p, keys);
    if constexpr (T::Source::kManyTokens) {
      for (unsigned i = 0; work.token < call.p.tokens; ++i) {
        const Work next = work_of<T>(call, i + 1);
        const KeyList next_keys = keys_of<T>(call, next);
        producer.run(keys, next_keys, ring, [&] {
          if (i == 0 || threadIdx.x != kMathThreads) return;
          cuda::wait(&shared.query_empty, (i - 1) & 1);
          copy_queries(shared, call, work);
        });
        ring += keys.blocks();
        work = next;
        keys = next_keys;
      }
    } else {
      producer.run();
    }
    if (call.cut.splits > 1) attend_finish();
  } else {
    cuda::take_registers<T::Source::kMathRegisters>();
    constexpr float kLog2E = 1.44269504088896f;
    auto values = cute::partition_fragment_C(OwnValueMma{}, Shape<Int<kTileHeads>, Int<kHalfDims>>{});
    Work work = work_of<T>(call, 0);
    for (unsigned i = 0; work.token < call.p.tokens; ++i) {
      const Work next = work_of<T>(call, i + 1);
      const bool grouped = T::kGrouped && work.union_keys >= 0;
      const uint32_t begin = ring;
      ring += keys_of<T>(call, work).blocks();
      Math<T> math{shared, static_cast<uint32_t>(warpgroup), call.p.sm_scale * kLog2E};
      if (grouped) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          math.marks[r] = min((first_row() + 8 * r) / call.p.heads, call.unions.group - 1) * (kTileKeys / 32);
        }
      }
      cute::clear(values);
      cuda::wait(&shared.query_full, i & 1);
      math.run(begin, ring, values);
      if (work.splits == 1) {
        store_whole(math, call.p, work, begin == ring, ring, values);
      } else if constexpr (!T::kGrouped) {
        finish(math, call.p, work, values);
      }
      if (!T::Source::kManyTokens) break;
      work = next;
    }
  }
}

}  // namespace indexcache::sm90::attention
