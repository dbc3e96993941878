// Moving rows in and out of the paged caches, a few lanes per row; and positions to slots, a thread per entry.
// Words of 16 bytes where the rows are aligned to them, else the same kernels byte by byte.
#include "csrc/common/paged.h"
#include "csrc/cuda/common/index_page.cuh"
#include "csrc/cuda/common/latent_row.cuh"
#include "csrc/cuda/common/launch.cuh"
#include "csrc/cuda/common/row_group.cuh"
#include "csrc/cuda/generic/generic.h"

namespace indexcache::generic {
namespace {

using cuda::bf16_bits;
using cuda::kWarpSize;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kWide = sizeof(uint4);
constexpr int kChunk = kWide / sizeof(bf16_bits);  // values that a lane moves at once

bool aligned_pages(const PagedCache& cache) {
  return cuda::aligned(cache.data, kWide) && cache.page_stride % kWide == 0;
}

/// A group of lanes copies kRows rows at once, word by word; those past the last are the last again.
template <class Word, class Group, int kRows>
__global__ void __launch_bounds__(kThreads) gather_index_k_kernel(const GatherIndexKParams p) {
  const int words = p.dim / static_cast<int>(sizeof(Word));
  const int64_t warp_rows = Group::kRows * kRows;
  for (int64_t first = cuda::grid_warp() * warp_rows; first < p.rows; first += cuda::grid_warps() * warp_rows) {
    int64_t rows[kRows];
    cuda::IndexEntry from[kRows];
    float scales[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      rows[i] = min(first + i * Group::kRows + Group::row(), p.rows - 1);
      from[i] = cuda::index_entry(p.cache, p.slots[rows[i]], p.dim);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) scales[i] = from[i].scale != nullptr ? cuda::load_float(from[i].scale) : 0.0f;
    for (int word = Group::lane(); word < words; word += Group::kLanes) {
      Word values[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        values[i] = from[i].values != nullptr ? reinterpret_cast<const Word*>(from[i].values)[word] : Word{};
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) reinterpret_cast<Word*>(p.k8 + rows[i] * p.dim)[word] = values[i];
    }
    if (Group::lane() == 0) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) p.k_scale[rows[i]] = scales[i];
    }
  }
}

// Half a warp per latent row: a lane has eight values of each scale group, and half the lanes eight of the rotary part.
using LatentGroup = cuda::RowGroup<kLatentScaleGroup / kChunk>;
constexpr int kRopeLanes = kRopeDim / kChunk;
constexpr int kScales = cuda::kLatentGroups;
static_assert(kScales * sizeof(float) == sizeof(uint4));

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) store_latent_kv_kernel(const StoreLatentKvParams p) {
  const int lane = LatentGroup::lane();
  const int64_t step = cuda::grid_warps() * LatentGroup::kRows;
  for (int64_t first = cuda::grid_warp() * LatentGroup::kRows; first < p.tokens; first += step) {
    const int64_t token = first + LatentGroup::row(), from = min(token, p.tokens - 1);
    const T* kv = static_cast<const T*>(p.kv) + from * p.row_stride;
    float x[kScales][kChunk], rope[kChunk];
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      cuda::load_values<kChunk, kAligned>(kv + i * kLatentScaleGroup + lane * kChunk, x[i]);
    }
    if (lane < kRopeLanes) cuda::load_values<kChunk, kAligned>(kv + kLatentDim + lane * kChunk, rope);
    __syncwarp();  // what is above is on its way before anything waits for the slot
    const int64_t slot = p.slots[from];
    const bool held = token < p.tokens && holds(p.cache, slot);
    uint8_t* row = held ? row_of(p.cache, slot, kLatentBytes) : nullptr;
    float scales[kScales];
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      float amax = 0.0f;
#pragma unroll
      for (const float value : x[i]) amax = cuda::max_or_nan(amax, fabsf(value));
      amax = LatentGroup::max(amax);
      scales[i] = is_finite(amax) ? e4m3_scale(amax, false) : quiet_nan();
    }
    if (held) {
#pragma unroll
      for (int i = 0; i < kScales; ++i) {
        const cuda::E4m3Encoder encoder(scales[i]);
        encoder.store<kChunk, kAligned>(x[i], row + i * kLatentScaleGroup + lane * kChunk);
      }
      if (lane == 0) {
        uint4 words;
        __builtin_memcpy(&words, scales, sizeof words);
        cuda::store_word<kAligned>(row + cuda::kLatentScaleOffset, words);
      }
      if (lane < kRopeLanes) {
        cuda::store_word<kAligned>(row + cuda::kLatentRopeOffset + lane * sizeof(uint4), cuda::bf16_chunk(rope));
      }
    }
  }
}

template <bool kAligned>
__global__ void __launch_bounds__(kThreads) gather_latent_kv_kernel(const GatherLatentKvParams p) {
  const int lane = LatentGroup::lane();
  const int64_t step = cuda::grid_warps() * LatentGroup::kRows;
  for (int64_t i = cuda::grid_warp() * LatentGroup::kRows + LatentGroup::row(); i < p.rows; i += step) {
    const int64_t slot = p.slots[i];
    uint2 values[kScales] = {};
    uint4 scales = {}, rope = {};
    if (holds(p.cache, slot)) {
      const uint8_t* row = row_of(p.cache, slot, kLatentBytes);
#pragma unroll
      for (int j = 0; j < kScales; ++j) {
        values[j] = cuda::load_word<uint2, kAligned>(row + j * kLatentScaleGroup + lane * kChunk);
      }
      scales = cuda::load_word<uint4, kAligned>(row + cuda::kLatentScaleOffset);
      if (lane < kRopeLanes) {
        rope = cuda::load_word<uint4, kAligned>(row + cuda::kLatentRopeOffset + lane * sizeof(uint4));
      }
    }
    bf16_bits* kv = p.kv + i * (kLatentDim + kRopeDim) + lane * kChunk;
    const float scale[kScales] = {bits_float(scales.x), bits_float(scales.y), bits_float(scales.z),
                                  bits_float(scales.w)};
#pragma unroll
    for (int j = 0; j < kScales; ++j) {
      const float4 low = cuda::e4m3x4_to_float(values[j].x), high = cuda::e4m3x4_to_float(values[j].y);
      const float s = scale[j];
      const float x[] = {low.x * s,  low.y * s,  low.z * s,  low.w * s,
                         high.x * s, high.y * s, high.z * s, high.w * s};
      cuda::store_word<kAligned>(kv + j * kLatentScaleGroup, cuda::bf16_chunk(x));
    }
    if (lane < kRopeLanes) {
      float x[kChunk];
      cuda::load_values<kChunk>(reinterpret_cast<const bf16_bits*>(&rope), x);
      cuda::store_word<kAligned>(kv + kLatentDim, cuda::bf16_chunk(x));  // a NaN as float_to_bf16 writes it
    }
  }
}

__global__ void to_slots_kernel(const ToSlotsParams p) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.tokens * p.k; i += step) {
    p.slots[i] = slot_of(p.table, i / p.k, p.indices[i]);
  }
}

}  // namespace

void gather_index_k(const GatherIndexKParams& p, Stream stream) {
  const bool wide = p.dim % kWide == 0 && cuda::aligned(p.k8, kWide) && aligned_pages(p.cache);
  using Wide = cuda::RowGroup<8>;  // 128 bytes
  using Narrow = cuda::RowGroup<kWarpSize>;
  constexpr int kRows = 2;  // of a group at once: twice the loads in flight
  const auto kernel = wide ? gather_index_k_kernel<uint4, Wide, kRows> : gather_index_k_kernel<uint8_t, Narrow, 1>;
  const int64_t blocks = cuda::ceil_div(p.rows, kWarps * (wide ? Wide::kRows * kRows : Narrow::kRows));
  cuda::launch("gather_index_k", kernel, blocks, kThreads, 0, stream, p);
}

void store_latent_kv(const StoreLatentKvParams& p, Stream stream) {
  const bool f32 = p.dtype == DType::f32;
  const int64_t stride = p.row_stride * (f32 ? sizeof(float) : sizeof(bf16_bits));
  const bool aligned = cuda::aligned(p.kv, kWide) && stride % kWide == 0 && aligned_pages(p.cache);
  const auto from_f32 = aligned ? store_latent_kv_kernel<float, true> : store_latent_kv_kernel<float, false>;
  const auto from_bf16 = aligned ? store_latent_kv_kernel<bf16_bits, true> : store_latent_kv_kernel<bf16_bits, false>;
  const int64_t blocks = cuda::ceil_div(p.tokens, kWarps * LatentGroup::kRows);
  cuda::launch("store_latent_kv", f32 ? from_f32 : from_bf16, blocks, kThreads, 0, stream, p);
}

void gather_latent_kv(const GatherLatentKvParams& p, Stream stream) {
  const bool aligned = cuda::aligned(p.kv, kWide) && aligned_pages(p.cache);
  const auto kernel = aligned ? gather_latent_kv_kernel<true> : gather_latent_kv_kernel<false>;
  cuda::launch("gather_latent_kv", kernel, cuda::ceil_div(p.rows, kWarps * LatentGroup::kRows), kThreads, 0, stream, p);
}

void to_slots(const ToSlotsParams& p, Stream stream) {
  cuda::launch("to_slots", to_slots_kernel, cuda::ceil_div(p.tokens * p.k, kThreads), kThreads, 0, stream, p);
}

}  // namespace indexcache::generic
