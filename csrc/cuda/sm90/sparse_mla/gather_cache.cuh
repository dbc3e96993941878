// The producers for rows of the 656-byte cache: dequantise them in registers.
//
// Two warpgroups, each with the value dims of one of the math warpgroups: two parts of a key block, in turn. A warp
// holds the bytes of one part, and loads the next once they are stored. There are no registers for more; and ptxas
// tells the loads of a warp apart within a basic block only: those in flight over a wait for a barrier arrive as one.
#pragma once

#include "csrc/cuda/common/async_copy.cuh"
#include "csrc/cuda/common/latent_row.cuh"
#include "csrc/cuda/common/mbarrier.cuh"
#include "csrc/cuda/common/tma.cuh"
#include "csrc/cuda/sm90/sparse_mla/gather.cuh"

namespace indexcache::sm90::attention {

/// Arrivals that fill a part of a key block: of four warps, and with the last a copy group per thread, of rope dims.
constexpr int full_arrivals(CacheSource, int part) { return part == kParts - 1 ? 4 + 128 : 4; }

/// The row of a key that names none.
static __device__ const uint4 kZeroRow[kLatentBytes / sizeof(uint4)] = {};

/// Eight e4m3 times a scale, rounded once, as gather_latent_kv does.
__device__ inline uint4 dequantise(uint32_t low, uint32_t high, float scale) {
  const float4 a = cuda::e4m3x4_to_float(low), b = cuda::e4m3x4_to_float(high);
  const auto pair = [&](float x, float y) { return cuda::pack_bf16x2(x * scale, y * scale); };
  return {pair(a.x, a.y), pair(a.z, a.w), pair(b.x, b.y), pair(b.z, b.w)};
}

/// Each warp has 16 neighbouring keys, and eight lanes a row, so that a load has the 128 bytes of a part in each of
/// four rows. The lanes of a row are spread so that eight consecutive ones store into different banks.
template <class T>
struct Producer<T, CacheSource> {
  static constexpr int kWarpKeys = kTileKeys / 4, kPassRows = 4, kPasses = kWarpKeys / kPassRows;
  static constexpr int kTurns = kParts / kMathWarpgroups;  // of a key block
  static_assert(T::Source::kProducerWarpgroups == kMathWarpgroups && kPartDims == kLatentScaleGroup);

  Shared<T>& shared;
  const SparseMlaParams& p;
  const KeyList& list;
  const int warpgroup;    // that reads what this one brings
  const uint8_t* start;   // of the row of the lane's own key, one of 16
  uint32_t valid;         // a bit per key of the warp
  int next[2];            // the own key's entries in the next blocks
  uint4 values[kPasses];  // of other keys
  float scale;            // of the own key

  __device__ Producer(Shared<T>& shared, const SparseMlaParams& p, const KeyList& list)
      : shared(shared),
        p(p),
        list(list),
        warpgroup(__shfl_sync(cuda::kFullMask, cuda::warp_id(), 0) / 4 - kMathWarpgroups) {
    const int first = entry(0);
    next[0] = entry(1);
    next[1] = entry(2);
    find(first);
    prefetch(start);
    load(0);
    prefetch(row_address(next[0]));
  }

  // Of a lane, computed wherever they are needed: there are no registers to keep them.
  __device__ static uint32_t thread() { return opaque(threadIdx.x); }
  __device__ static int first_key() { return thread() / 32 % 4 * kWarpKeys; }
  __device__ static int row() { return thread() / 4 % 2 + thread() / 16 % 2 * 2; }  // of a pass
  __device__ static int unit() { return thread() / 8 % 2 * 4 + thread() % 4; }      // 16 bytes of 128
  __device__ static int rope_unit() { return unit() ^ row() % 2 * 4; }  // neighbouring rows store different units

  /// The own key's.
  __device__ int entry(int block) const {
    return list.entry(block * kTileKeys + first_key() + cuda::lane_id() % kWarpKeys);
  }

  __device__ const uint8_t* row_address(int entry) const {
    const auto page_size = static_cast<uint32_t>(p.cache.page_size), slot = static_cast<uint32_t>(entry);
    if (!list.names_row(entry)) return reinterpret_cast<const uint8_t*>(kZeroRow);
    return p.cache.data + slot / page_size * p.cache.page_stride + slot % page_size * kLatentBytes;
  }
  __device__ void find(int entry) {
    valid = __ballot_sync(cuda::kFullMask, list.names_row(entry));
    start = row_address(entry);
  }

  /// The start of the pass's row that this lane copies.
  __device__ const uint8_t* row_start(int pass) const {
    const auto bits = __shfl_sync(cuda::kFullMask, reinterpret_cast<uint64_t>(start), pass * kPassRows + row());
    return reinterpret_cast<const uint8_t*>(bits);
  }

  __device__ int scale_group(int turn) const { return warpgroup * kTurns + turn; }

  __device__ void load(int turn) {
    const int group = scale_group(turn);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      values[pass] = __ldg(reinterpret_cast<const uint4*>(row_start(pass) + group * kPartDims + unit() * 16));
    }
    scale = __ldg(reinterpret_cast<const float*>(start + cuda::kLatentScaleOffset) + group);
  }

  /// Brings the rows into L2, where a load then finds them in a third of the time: of six lines of 128 bytes, four by
  /// one warpgroup and two by the other.
  __device__ void prefetch(const uint8_t* own) const {
    constexpr int kLine = 128;
    own += warpgroup * 4 * kLine + thread() / kWarpKeys % 2 * kLine;
    cuda::prefetch_l2(own);
    if (warpgroup == 0) cuda::prefetch_l2(own + 2 * kLine);
  }

  // Shared addresses. A pass is four rows further down, and the swizzle of its 16-byte units differs in one bit.

  /// Of the unit that the lane has in the first row of its keys.
  __device__ uint32_t address(const uint16_t* chunk, int own_unit) const {
    return opaque(cuda::shared_address(chunk) + unit_offset(0, first_key() + row(), own_unit) * 2);
  }
  __device__ static uint32_t address_in_pass(uint32_t address, int pass) {
    return (address ^ pass % 2 * (kPassRows * 16)) + pass * (kPassRows * kChunkDims * 2);
  }

  __device__ void store(const uint16_t* chunks) const {
    const uint32_t to = address(chunks + unit() / 4 * kChunkElements, unit() % 4 * 2);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const float own = __shfl_sync(cuda::kFullMask, scale, pass * kPassRows + row());
      const uint4 x = values[pass];
      store_shared(address_in_pass(to, pass), dequantise(x.x, x.y, own));
      store_shared(address_in_pass(to ^ 16, pass), dequantise(x.z, x.w, own));
    }
  }
  __device__ static void store_shared(uint32_t to, uint4 x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
  }

  __device__ void copy_rope(const uint16_t* chunk) const {
    const uint32_t to = address(chunk, rope_unit());
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const uint8_t* const from = row_start(pass) + cuda::kLatentRopeOffset + rope_unit() * 16;
      cuda::copy_first_bytes(address_in_pass(to, pass), from, 16);
    }
  }

  /// The blocks of the list; there is none after it.
  __device__ void run() {
    const int turns = list.blocks() * kTurns;
#pragma unroll 1
    for (int i = 0; i < turns; ++i) {
      const int block = i / kTurns, turn = i % kTurns, stage = block % kStages;
      const int part = turn * kMathWarpgroups + warpgroup;
      cuda::wait(&shared.key_empty[stage][part], (block / kStages & 1) ^ 1);
      if (part == 0 && cuda::lane_id() == 0) {
        reinterpret_cast<uint16_t*>(shared.valid[stage])[first_key() / kWarpKeys] = static_cast<uint16_t>(valid);
      }
      if (part == kParts - 1) {
        copy_rope(shared.keys[stage] + (T::kChunks - 1) * kChunkElements);
        cuda::arrive_after_copies(&shared.key_full[stage][part]);
      }
      store(shared.keys[stage] + scale_group(turn) * (kPartDims / kChunkDims) * kChunkElements);
      // The readers have the fence between these writes and the tensor cores.
      cuda::warp_arrive(&shared.key_full[stage][part]);
      if (turn + 1 == kTurns) find(next[0]);
      load((turn + 1) % kTurns);
      if (turn + 1 == kTurns) {  // the entry is read here lest the warp waits for it alone
        next[0] = next[1];
        next[1] = entry(block + 3);
        prefetch(row_address(next[0]));
      }
    }
  }
};

}  // namespace indexcache::sm90::attention
