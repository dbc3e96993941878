// The producer for bf16 rows: copies them as they are.
#pragma once

#include "csrc/cuda/common/async_copy.cuh"
#include "csrc/cuda/common/mbarrier.cuh"
#include "csrc/cuda/sm90/sparse_mla/gather.cuh"

namespace indexcache::sm90::attention {

/// Arrivals that fill a part of a key block: a copy group per thread, and with the first the valid bits.
constexpr int full_arrivals(DenseSource, int part) { return part == 0 ? 128 + 1 : 128; }

/// Eight threads copy 128 bytes of a row; a pass of the warpgroup covers 16 rows. `ring`: key blocks before these. Calls
/// `started` when the first block is under way.
template <class T, class Started>
__device__ void produce(Shared<T>& shared, const SparseMlaParams& p, const KeyList& list, uint32_t ring, DenseSource,
                        const Started& started) {
  constexpr int kUnits = 8, kPassRows = 128 / kUnits, kPasses = kTileKeys / kPassRows;
  const int thread = threadIdx.x % 128, unit = thread % kUnits, first_row = thread / kUnits;
  const auto* const kv = static_cast<const Bf16*>(p.kv) + unit * 8;
  struct Listed {
    int rows[kPasses];                  // that this thread copies
    int of_lane[kTileKeys / 32];
  };
  const auto read_list = [&](int block) {
    Listed listed;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) listed.rows[i] = list.row(block * kTileKeys + first_row + i * kPassRows);
#pragma unroll
    for (int i = 0; i < kTileKeys / 32; ++i) listed.of_lane[i] = list.row(block * kTileKeys + i * 32 + cuda::lane_id());
    return listed;
  };
  const int blocks = list.blocks();
  if (blocks == 0) started();
  Listed next = read_list(0);
  for (int block = 0; block < blocks; ++block, ++ring) {
    const uint32_t stage = ring % kStages, parity = ring / kStages & 1;
    const uint32_t to = cuda::shared_address(shared.keys[stage]) + unit_offset(0, first_row, unit) * 2;
    const Listed listed = next;
    next = read_list(block + 1);  // behind the list: no rows
    cute::for_each(cute::make_range<0, kParts>{}, [&](auto part) {
      cuda::wait(&shared.key_empty[stage][part], parity ^ 1);
      if (part == 0 && thread < cuda::kWarpSize) {
        store_valid(shared, stage, listed.of_lane);
        if (thread == 0) cuda::arrive(&shared.key_full[stage][part]);
      }
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const Bf16* const row = kv + max(listed.rows[i], 0) * p.kv_stride;
        const int bytes = listed.rows[i] >= 0 ? 16 : 0;
#pragma unroll
        for (int chunk = first_chunk(part); chunk < end_chunk(part, T::kChunks); ++chunk) {
          const int offset = chunk * kChunkElements + i * kPassRows * kChunkDims;  // 16 rows keep the swizzle
          cuda::copy_first_bytes(to + offset * 2, row + chunk * kChunkDims, bytes);
        }
      }
      cuda::arrive_after_copies(&shared.key_full[stage][part]);
    });
    if (block == 0) started();
  }
}

}  // namespace indexcache::sm90::attention
