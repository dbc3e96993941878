// The producer for bf16 rows: copies them as they are.
#pragma once

#include "csrc/cuda/common/async_copy.cuh"
#include "csrc/cuda/common/mbarrier.cuh"
#include "csrc/cuda/sm90/sparse_mla/gather.cuh"

namespace indexcache::sm90::attention {

/// Arrivals that fill a part of a key block: a copy group per thread, and with the last the valid bits.
constexpr int full_arrivals(DenseSource, int part) { return part == kParts - 1 ? 128 + 1 : 128; }

/// Eight threads copy 128 bytes of a row; a pass of the warpgroup covers 16 rows.
template <class T>
struct Producer<T, DenseSource> {
  static constexpr int kUnits = 8, kPassRows = 128 / kUnits, kPasses = kTileKeys / kPassRows;
  struct Entries {
    int copied[kPasses];  // by this thread
    Marks marks;
  };

  Shared<T>& shared;
  const SparseMlaParams& p;
  const int thread = threadIdx.x % 128, unit = thread % kUnits, first_row = thread / kUnits;
  Entries next;  // read a block ahead

  __device__ Producer(Shared<T>& shared, const SparseMlaParams& p, const KeyList& list) : shared(shared), p(p) {
    read(list, 0);
  }

  __device__ void read(const KeyList& list, int block) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) next.copied[i] = list.entry(block * kTileKeys + first_row + i * kPassRows);
    next.marks = read_marks<T>(list, block);
  }

  /// The blocks of `list`, and the first entries of the list after it. `ring`: key blocks before these. Calls `started`
  /// when the first block is under way.
  template <class Started>
  __device__ void run(const KeyList& list, const KeyList& after, uint32_t ring, const Started& started) {
    const int blocks = list.blocks();
    if (blocks == 0) {
      started();
      read(after, 0);
    }
    for (int block = 0; block < blocks; ++block, ++ring) {
      const Entries entries = next;
      if (block + 1 < blocks) {
        read(list, block + 1);
      } else {
        read(after, 0);
      }
      copy(list, entries, ring % kStages, ring / kStages & 1);
      if (block == 0) started();
    }
  }

  __device__ void copy(const KeyList& list, const Entries& entries, uint32_t stage, uint32_t parity) {
    const uint32_t to = cuda::shared_address(shared.keys[stage]) + unit_offset(0, first_row, unit) * 2;
    const auto* const kv = static_cast<const Bf16*>(p.kv) + unit * 8;
    const Bf16* rows[kPasses];
    int bytes[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const bool exists = list.names_row(entries.copied[i]);
      rows[i] = kv + (exists ? entries.copied[i] : 0) * p.kv_stride;
      bytes[i] = exists ? 16 : 0;
      asm volatile("" : "+l"(rows[i]), "+r"(bytes[i]));  // known before the wait
    }
    cute::for_each(cute::make_range<0, kParts>{}, [&](auto part) {
      cuda::wait(&shared.key_empty[stage][part], parity ^ 1);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
#pragma unroll
        for (int chunk = first_chunk(part); chunk < end_chunk(part, T::kChunks); ++chunk) {
          const int offset = chunk * kChunkElements + i * kPassRows * kChunkDims;  // 16 rows keep the swizzle
          cuda::copy_first_bytes(to + offset * 2, rows[i] + chunk * kChunkDims, bytes[i]);
        }
      }
      cuda::arrive_after_copies(&shared.key_full[stage][part]);
    });
    if (thread < cuda::kWarpSize) {
      store_valid(shared, stage, list, entries.marks);
      if (thread == 0) cuda::arrive(&shared.key_full[stage][kParts - 1]);
    }
  }
};

}  // namespace indexcache::sm90::attention
