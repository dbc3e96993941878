#pragma once

#include "csrc/cuda/common/tma.cuh"
#include "csrc/cuda/sm90/sparse_mla/finish.cuh"
#include "csrc/cuda/sm90/sparse_mla/gather_cache.cuh"
#include "csrc/cuda/sm90/sparse_mla/gather_dense.cuh"

namespace indexcache::sm90::attention {

struct Call {
  SparseMlaParams p;
  CUtensorMap queries;  // bf16 [tokens, heads, d_qk] in tiles of one token, 64 heads and 64 dims
  int head_tiles;
  int splits;  // and the size of a cluster
};

inline __device__ Work work_of_block(const Call& call) {
  const unsigned item = blockIdx.x / call.splits, token = item / call.head_tiles;
  const int head = static_cast<int>(item - token * call.head_tiles) * kTileHeads;
  return {.token = token,
          .first_head = head,
          .heads = min(kTileHeads, call.p.heads - head),
          .split = static_cast<int>(blockIdx.x % call.splits),
          .splits = call.splits};
}

/// The share of a split is whole key blocks. It depends on the row and the splits only.
inline __device__ KeyList keys_of_split(const SparseMlaParams& p, const Work& work) {
  const int64_t length = p.lengths == nullptr ? p.k : min(p.k, max(int64_t{p.lengths[work.token]}, int64_t{0}));
  const auto listed = static_cast<int>(length);
  const int blocks = (listed + kTileKeys - 1) / kTileKeys, share = (blocks + work.splits - 1) / work.splits;
  const int begin = min(listed, work.split * share * kTileKeys), end = min(listed, begin + share * kTileKeys);
  return {p.indices + work.token * p.k + begin, end - begin, p.keys};
}

template <class T>
__device__ void init_barriers(Shared<T>& shared) {
  cuda::init_barrier(&shared.query_full, 1);
  for (int i = 0; i < kStages; ++i) {
    for (int part = 0; part < kParts; ++part) {
      cuda::init_barrier(&shared.key_full[i][part], full_arrivals(typename T::Source{}, part));
      cuda::init_barrier(&shared.key_empty[i][part], kMathWarps / kMathWarpgroups);
    }
  }
  for (int i = 0; i < kMathWarpgroups; ++i) cuda::init_barrier(&shared.probabilities_full[i], 4);
  cuda::publish_barriers();
}

/// One thread.
template <class T>
__device__ void copy_queries(Shared<T>& shared, const Call& call, const Work& work) {
  const uint64_t policy = cuda::evict_first();
  cuda::arrive_expecting(&shared.query_full, T::kQueryBytes);
  for (int chunk = 0; chunk < T::kChunks; ++chunk) {
    cuda::copy_tile(shared.queries + chunk * kChunkElements, &call.queries, chunk * kChunkDims, work.first_head,
                    static_cast<int>(work.token), &shared.query_full, policy);
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) kernel(const __grid_constant__ Call call) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(memory);
  const Work work = work_of_block(call);
  if (threadIdx.x == 0) {
    init_barriers(shared);
    copy_queries(shared, call, work);
  }
  __syncthreads();
  const KeyList keys = keys_of_split(call.p, work);
  // The shuffle tells the compiler that it is the same in all lanes.
  const int warpgroup = __shfl_sync(cuda::kFullMask, cuda::warp_id(), 0) / 4;
  if (warpgroup >= kMathWarpgroups) {
    cuda::give_registers<T::Source::kProducerRegisters>();
    produce(shared, call.p, keys, typename T::Source{});
    attend_finish(work);
  } else {
    cuda::take_registers<T::Source::kMathRegisters>();
    constexpr float kLog2E = 1.44269504088896f;
    Math<T> math{shared, warpgroup, call.p.sm_scale * kLog2E};
    auto values = cute::partition_fragment_C(OwnValueMma{}, Shape<Int<kTileHeads>, Int<kHalfDims>>{});
    cute::clear(values);
    cuda::wait(&shared.query_full, 0);
    math.run(keys.blocks(), values);
    finish(math, call.p, work, values);
  }
}

}  // namespace indexcache::sm90::attention
