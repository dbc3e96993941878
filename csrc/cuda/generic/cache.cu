// Moving rows in and out of the paged caches, a warp per row; and positions to slots, a thread per entry.
#include "csrc/common/paged.h"
#include "csrc/cuda/common/latent_row.cuh"
#include "csrc/cuda/common/launch.cuh"
#include "csrc/cuda/common/warp.cuh"
#include "csrc/cuda/generic/generic.h"

namespace indexcache::generic {
namespace {

using cuda::bf16_bits;
using cuda::kWarpSize;
using cuda::lane_id;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

__global__ void gather_index_k_kernel(const GatherIndexKParams p) {
  for (int64_t i = cuda::grid_warp(); i < p.rows; i += cuda::grid_warps()) {
    const int64_t slot = p.slots[i];
    const bool held = holds(p.cache, slot);
    const uint8_t* page = held ? page_of(p.cache, slot) : nullptr;
    const int64_t offset = held ? slot % kIndexPage : 0;
    for (int d = lane_id(); d < p.dim; d += kWarpSize) p.k8[i * p.dim + d] = held ? page[offset * p.dim + d] : 0;
    if (lane_id() == 0) {
      p.k_scale[i] = held ? cuda::load_float(page + kIndexPage * p.dim + offset * sizeof(float)) : 0.0f;
    }
  }
}

template <class T>
__global__ void store_latent_kv_kernel(const StoreLatentKvParams p) {
  constexpr int kValues = kLatentScaleGroup / kWarpSize;  // per lane and group
  for (int64_t i = cuda::grid_warp(); i < p.tokens; i += cuda::grid_warps()) {
    const int64_t slot = p.slots[i];
    if (!holds(p.cache, slot)) continue;
    const T* kv = static_cast<const T*>(p.kv) + i * p.row_stride;
    uint8_t* row = row_of(p.cache, slot, kLatentBytes);
    for (int group = 0; group < cuda::kLatentGroups; ++group) {
      const int first = group * kLatentScaleGroup + lane_id();
      float x[kValues], amax = 0.0f;
      bool finite = true;
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        x[j] = cuda::to_float(kv[first + j * kWarpSize]);
        amax = fmaxf(amax, fabsf(x[j]));
        finite = finite && is_finite(x[j]);
      }
      finite = __all_sync(cuda::kFullMask, finite);
      amax = cuda::warp_max(amax);
      const float scale = finite ? e4m3_scale(amax, false) : quiet_nan();
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        row[first + j * kWarpSize] = finite ? float_to_e4m3(x[j] / scale) : kE4m3Nan;
      }
      if (lane_id() == 0) cuda::store_float(row + cuda::kLatentScaleOffset + group * sizeof(float), scale);
    }
    for (int d = lane_id(); d < kRopeDim; d += kWarpSize) {
      bf16_bits rope;
      cuda::store(&rope, cuda::to_float(kv[kLatentDim + d]));
      cuda::store_bf16(row + cuda::kLatentRopeOffset + d * sizeof(bf16_bits), rope);
    }
  }
}

__global__ void gather_latent_kv_kernel(const GatherLatentKvParams p) {
  for (int64_t i = cuda::grid_warp(); i < p.rows; i += cuda::grid_warps()) {
    const int64_t slot = p.slots[i];
    const uint8_t* row = holds(p.cache, slot) ? row_of(p.cache, slot, kLatentBytes) : nullptr;
    bf16_bits* kv = p.kv + i * (kLatentDim + kRopeDim);
    for (int d = lane_id(); d < kLatentDim + kRopeDim; d += kWarpSize) {
      cuda::store(kv + d, row == nullptr ? 0.0f : cuda::latent_element(row, d, cuda::latent_scale(row, d)));
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
  cuda::launch("gather_index_k", gather_index_k_kernel, cuda::ceil_div(p.rows, kWarps), kThreads, 0, stream, p);
}

void store_latent_kv(const StoreLatentKvParams& p, Stream stream) {
  const auto kernel = p.dtype == DType::f32 ? store_latent_kv_kernel<float> : store_latent_kv_kernel<bf16_bits>;
  cuda::launch("store_latent_kv", kernel, cuda::ceil_div(p.tokens, kWarps), kThreads, 0, stream, p);
}

void gather_latent_kv(const GatherLatentKvParams& p, Stream stream) {
  cuda::launch("gather_latent_kv", gather_latent_kv_kernel, cuda::ceil_div(p.rows, kWarps), kThreads, 0, stream, p);
}

void to_slots(const ToSlotsParams& p, Stream stream) {
  cuda::launch("to_slots", to_slots_kernel, cuda::ceil_div(p.tokens * p.k, kThreads), kThreads, 0, stream, p);
}

}  // namespace indexcache::generic
