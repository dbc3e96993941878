// The producer for bf16 rows: copies them as they are.
#pragma once

#include "csrc/cuda/common/async_copy.cuh"
#include "csrc/cuda/common/mbarrier.cuh"
#include "csrc/cuda/sm90/sparse_mla/gather.cuh"

namespace indexcache::sm90::attention {

/// Arrivals that fill a key block: a copy group per thread, and the valid bits.
constexpr int full_arrivals(DenseSource) { return 128 + 1; }

/// Eight threads copy 128 bytes of a row; a pass of the warpgroup covers 16 rows.
template <class T>
__device__ void produce(Shared<T>& shared, const SparseMlaParams& p, const KeyList& list, DenseSource) {
  constexpr int kUnits = 8, kPassRows = 128 / kUnits, kPasses = kTileKeys / kPassRows;
  const int thread = threadIdx.x % 128, unit = thread % kUnits, first_row = thread / kUnits;
  const auto* const kv = static_cast<const Bf16*>(p.kv) + unit * 8;
  int rows[kPasses];
  const auto read_list = [&](int block) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) rows[i] = list.row(block * kTileKeys + first_row + i * kPassRows);
  };
  read_list(0);
  const int blocks = list.blocks();
  for (int block = 0; block < blocks; ++block) {
    const int stage = block % kStages;
    const uint32_t to = cuda::shared_address(shared.keys[stage]) + unit_offset(0, first_row, unit) * 2;
    cuda::wait(&shared.key_empty[stage], (block / kStages & 1) ^ 1);
    if (thread < cuda::kWarpSize) {
      store_valid(shared, stage, list, block * kTileKeys);
      if (thread == 0) cuda::arrive(&shared.key_full[stage]);
    }
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const Bf16* const row = kv + max(rows[i], 0) * p.kv_stride;
      const int bytes = rows[i] >= 0 ? 16 : 0;
#pragma unroll
      for (int chunk = 0; chunk < T::kChunks; ++chunk) {
        const int offset = chunk * kChunkElements + i * kPassRows * kChunkDims;  // 16 rows keep the swizzle
        cuda::copy_first_bytes(to + offset * 2, row + chunk * kChunkDims, bytes);
      }
    }
    cuda::arrive_after_copies(&shared.key_full[stage]);
    if (block + 1 < blocks) read_list(block + 1);
  }
}

}  // namespace indexcache::sm90::attention
