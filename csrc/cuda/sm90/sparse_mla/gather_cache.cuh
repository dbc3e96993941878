// The producer for rows of the 656-byte cache: dequantises them in registers.
#pragma once

#include "csrc/cuda/common/latent_row.cuh"
#include "csrc/cuda/common/mbarrier.cuh"
#include "csrc/cuda/sm90/sparse_mla/gather.cuh"

namespace indexcache::sm90::attention {

/// Arrivals that fill a key block: of warps.
constexpr int full_arrivals(CacheSource, int) { return 4; }

/// Eight e4m3 times a scale, rounded once, as gather_latent_kv does.
__device__ inline uint4 dequantise(uint32_t low, uint32_t high, float scale) {
  const float4 a = cuda::e4m3x4_to_float(low), b = cuda::e4m3x4_to_float(high);
  const auto pair = [&](float x, float y) {
    const __nv_bfloat162 packed = __floats2bfloat162_rn(x * scale, y * scale);
    return __builtin_bit_cast(uint32_t, static_cast<__nv_bfloat162_raw>(packed));
  };
  return {pair(a.x, a.y), pair(a.z, a.w), pair(b.x, b.y), pair(b.z, b.w)};
}

/// What a thread holds of a cache row: a quarter of each 64 values and of the rope dims.
struct RowQuarter {
  static constexpr int kThreads = 4;  // per row
  uint4 values[8], rope[2];
  float4 scales;

  /// `from` null gives zeros.
  __device__ static uint4 load(const uint8_t* from, int offset) {
    uint4 x;
    asm volatile(
        "{\n  .reg .pred p;\n  setp.ne.u64 p, %4, 0;\n"
        "  mov.u32 %0, 0;\n  mov.u32 %1, 0;\n  mov.u32 %2, 0;\n  mov.u32 %3, 0;\n"
        "  @p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%5];\n}"
        : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
        : "l"(from), "l"(from + offset)
        : "memory");
    return x;
  }
  __device__ void load_value(const uint8_t* from, int i, int part) { values[i] = load(from, (i * kThreads + part) * 16); }
  __device__ void load_rope(const uint8_t* from, int i, int part) {
    rope[i] = load(from, cuda::kLatentRopeOffset + (i * kThreads + part) * 16);
  }
  __device__ void load_scales(const uint8_t* from) {
    scales = __builtin_bit_cast(float4, load(from, cuda::kLatentScaleOffset));
  }
};

/// Four threads convert a row, 64 bytes at a time, and a warp eight rows, so that its 16-byte stores meet no bank twice.
/// The warpgroup has half a key block at a time; whatever it has stored makes room for a load of the next half.
template <class T, class Started>
__device__ void produce(Shared<T>& shared, const SparseMlaParams& p, const KeyList& list, uint32_t ring,
                        const Started& started) {
  constexpr int kHalfKeys = kTileKeys / 2;
  static_assert(T::kProducerThreads == RowQuarter::kThreads * kHalfKeys);
  const int thread = threadIdx.x - kMathThreads, part = thread % RowQuarter::kThreads;
  const int row = thread / RowQuarter::kThreads;
  const auto page_size = static_cast<uint32_t>(p.cache.page_size);
  const auto address = [&](int slot) -> const uint8_t* {
    const auto s = static_cast<uint32_t>(slot);
    if (slot < 0) return nullptr;
    return p.cache.data + s / page_size * p.cache.page_stride + s % page_size * kLatentBytes;
  };
  const uint8_t* from = address(list.row(row));
  int next_slot = list.row(kHalfKeys + row);
  RowQuarter own;
  own.load_scales(from);
#pragma unroll
  for (int i = 0; i < 8; ++i) own.load_value(from, i, part);
#pragma unroll
  for (int i = 0; i < 2; ++i) own.load_rope(from, i, part);
  const int halves = 2 * list.blocks();
  if (halves == 0) started();
  for (int half = 0; half < halves; ++half) {
    const int block = half / 2;
    const uint32_t stage = (ring + block) % kStages, parity = (ring + block) / kStages & 1;
    from = address(next_slot);  // an entry behind the list names no row
    next_slot = list.row((half + 2) * kHalfKeys + row);
    const float4 scales = own.scales;
    own.load_scales(from);
    if (half % 2 == 0) {
      for (auto& empty : shared.key_empty[stage]) cuda::wait(&empty, parity ^ 1);
      if (thread < cuda::kWarpSize) store_valid(shared, stage, list, read_marks<T>(list, block));
    }
    auto* const to = shared.keys[stage] + half % 2 * kHalfKeys * kChunkDims;  // 32 rows keep the swizzle
    const auto store = [&](int chunk, int unit, uint4 x) {
      *reinterpret_cast<uint4*>(to + unit_offset(chunk, row, unit)) = x;
    };
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float scale = i < 2 ? scales.x : i < 4 ? scales.y : i < 6 ? scales.z : scales.w;
      const uint4 x = own.values[i];
      own.load_value(from, i, part);
      store(i, 2 * part, dequantise(x.x, x.y, scale));
      store(i, 2 * part + 1, dequantise(x.z, x.w, scale));
      if (i % 2 == 1) __syncwarp();  // keeps ptxas from moving all loads behind all arithmetic
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      store(T::kChunks - 1, i * RowQuarter::kThreads + part, own.rope[i]);
      own.load_rope(from, i, part);
    }
    if (half % 2 == 1) {
      cuda::fence_async_proxy();
      __syncwarp();
      if (cuda::lane_id() < kParts) cuda::arrive(&shared.key_full[stage][cuda::lane_id()]);
      if (block == 0) started();
    }
  }
}

template <class T>
struct Producer<T, CacheSource> {
  Shared<T>& shared;
  const SparseMlaParams& p;
  __device__ Producer(Shared<T>& shared, const SparseMlaParams& p, const KeyList&) : shared(shared), p(p) {}
  template <class Started>
  __device__ void run(const KeyList& list, const KeyList&, uint32_t ring, const Started& started) {
    produce(shared, p, list, ring, started);
  }
};

}  // namespace indexcache::sm90::attention
