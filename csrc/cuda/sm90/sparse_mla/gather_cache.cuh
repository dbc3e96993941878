// The producer for rows of the 656-byte cache: dequantises them in registers.
#pragma once

#include "csrc/cuda/common/latent_row.cuh"
#include "csrc/cuda/common/mbarrier.cuh"
#include "csrc/cuda/sm90/sparse_mla/gather.cuh"

namespace indexcache::sm90::attention {

/// Arrivals that fill a key block: of warps.
constexpr int full_arrivals(CacheSource) { return 4; }

/// Eight e4m3 times a scale, rounded once, as gather_latent_kv does.
__device__ inline uint4 dequantise(uint32_t low, uint32_t high, float scale) {
  const float4 a = cuda::e4m3x4_to_float(low), b = cuda::e4m3x4_to_float(high);
  const auto pair = [&](float x, float y) {
    const __nv_bfloat162 packed = __floats2bfloat162_rn(x * scale, y * scale);
    return __builtin_bit_cast(uint32_t, static_cast<__nv_bfloat162_raw>(packed));
  };
  return {pair(a.x, a.y), pair(a.z, a.w), pair(b.x, b.y), pair(b.z, b.w)};
}

#ifndef MLA_LOAD
#define MLA_LOAD "ld.global.nc.L1::no_allocate"
#endif
#ifndef MLA_PREFETCH
#define MLA_PREFETCH 1
#endif
/// The row of a key that names none.
static __device__ const uint4 kZeroRow[kLatentBytes / sizeof(uint4)] = {};

/// What a lane holds of a cache row: 16 bytes of each 128 values and of the rope dims, and the scales.
struct RowPart {
  uint4 values[cuda::kLatentGroups], rope;
  float4 scales;
};

/// How a warp converts four rows: eight lanes a row, so that a load has 128 bytes of each. The lanes of a row are
/// spread so that eight consecutive ones store into different banks.
struct RowLane {
  static constexpr int kRows = 4;  // of a warp at a time
  int row, half, quarter;          // of the set; of 128 values; of 64

  __device__ RowLane()
      : row(cuda::lane_id() / 4 % 2 + cuda::lane_id() / 16 * 2),
        half(cuda::lane_id() / 8 % 2),
        quarter(cuda::lane_id() % 4) {}

  /// The 64-byte half of the rope dims: another in the neighbouring row.
  __device__ int rope_half() const { return half ^ row % 2; }

  __device__ static uint4 load(const uint8_t* from) {
    uint4 x;
    asm volatile(MLA_LOAD ".v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from)
                 : "memory");
    return x;
  }
  __device__ void load(RowPart& part, const uint8_t* row_start) const {
    const uint8_t* const values = row_start + half * 64 + quarter * 16;
    part.scales = __builtin_bit_cast(float4, load(row_start + cuda::kLatentScaleOffset));
#pragma unroll
    for (int i = 0; i < cuda::kLatentGroups; ++i) part.values[i] = load(values + i * kLatentScaleGroup);
    part.rope = load(row_start + cuda::kLatentRopeOffset + rope_half() * 64 + quarter * 16);
  }

  /// Into row `key` of a key block.
  __device__ void store(const RowPart& part, uint16_t* block, int key) const {
    const auto put = [&](int chunk, int unit, uint4 x) {
      *reinterpret_cast<uint4*>(block + unit_offset(chunk, key, unit)) = x;
    };
    const float scales[] = {part.scales.x, part.scales.y, part.scales.z, part.scales.w};
#pragma unroll
    for (int i = 0; i < cuda::kLatentGroups; ++i) {
      const uint4 x = part.values[i];
      put(2 * i + half, 2 * quarter, dequantise(x.x, x.y, scales[i]));
      put(2 * i + half, 2 * quarter + 1, dequantise(x.z, x.w, scales[i]));
    }
    put(kValueDims / kChunkDims, 4 * rope_half() + quarter, part.rope);
  }
};

/// Each warp has 16 neighbouring keys of a block, and holds the bytes of eight: a turn stores them, and loads take their
/// place. The loads of a turn wait together in the next (ptxas tells loads apart within a basic block only), so that
/// more of them in flight would not be better; a prefetch into L2, a block ahead, shortens the wait.
template <class T>
__device__ void produce(Shared<T>& shared, const SparseMlaParams& p, const KeyList& list, CacheSource) {
  constexpr int kWarpKeys = kTileKeys / (T::kProducerThreads / cuda::kWarpSize), kHeld = 2;
  constexpr int kTurnKeys = kHeld * RowLane::kRows, kTurns = kWarpKeys / kTurnKeys;
  static_assert(kWarpKeys == 16 && kTurns == 2);
  const int first_key = (cuda::warp_id() - kMathWarps) * kWarpKeys;
  const RowLane lane;
  const auto page_size = static_cast<uint32_t>(p.cache.page_size);
  /// Of the lane's own key, one of 16.
  const auto entry = [&](int block) { return list.entry(block * kTileKeys + first_key + cuda::lane_id() % kWarpKeys); };
  const auto address = [&](int slot) -> const uint8_t* {
    const auto s = static_cast<uint32_t>(slot);
    if (!list.names_row(slot)) return reinterpret_cast<const uint8_t*>(kZeroRow);
    return p.cache.data + s / page_size * p.cache.page_stride + s % page_size * kLatentBytes;
  };
  const auto prefetch = [&](const uint8_t* own) {
#if MLA_PREFETCH == 1
    constexpr int kLine = 128;
    own += cuda::lane_id() / kWarpKeys * 3 * kLine;
#pragma unroll
    for (int i = 0; i < 3; ++i) asm volatile("prefetch.global.L2 [%0];" ::"l"(own + i * kLine));
#elif MLA_PREFETCH == 2
    if (cuda::lane_id() < kWarpKeys) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(own), "n"(kLatentBytes));
#endif
  };
  RowPart parts[kHeld];
  const auto load = [&](int set, const uint8_t* own, int turn) {
    const int from = turn * kTurnKeys + set * RowLane::kRows + lane.row;
    const auto bits = __shfl_sync(cuda::kFullMask, reinterpret_cast<uint64_t>(own), from);
    lane.load(parts[set], reinterpret_cast<const uint8_t*>(bits));
  };
  int own_slot = entry(0), next_slot = entry(1);
  const uint8_t* own = address(own_slot);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) load(i, own, 0);
  prefetch(own);
  const int turns = kTurns * list.blocks();
  for (int turn = 0; turn < turns; ++turn) {
    const int block = turn / kTurns, stage = block % kStages, part = turn % kTurns;
    if (part == 0) {
      const uint32_t valid = __ballot_sync(cuda::kFullMask, list.names_row(own_slot));
      own_slot = next_slot;
      next_slot = entry(block + 2);
      cuda::wait(&shared.key_empty[stage], (block / kStages & 1) ^ 1);
      if (cuda::lane_id() == 0) {
        reinterpret_cast<uint16_t*>(shared.valid[stage])[first_key / kWarpKeys] = static_cast<uint16_t>(valid);
      }
    } else {
      own = address(own_slot);  // of the next block
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      lane.store(parts[i], shared.keys[stage], first_key + part * kTurnKeys + i * RowLane::kRows + lane.row);
      load(i, own, 1 - part);
    }
    if (part == 0) {
      prefetch(address(own_slot));
    } else {
#ifdef MLA_FENCE
      cuda::fence_async_proxy();
#endif
      __syncwarp();  // the readers have the fence between these writes and the tensor cores
      if (cuda::lane_id() == 0) cuda::arrive(&shared.key_full[stage]);
    }
  }
}

}  // namespace indexcache::sm90::attention
