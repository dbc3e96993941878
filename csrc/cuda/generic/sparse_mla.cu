// Sparse attention with online softmax in f32: a block per (token, 32 heads, 512 value dims), a warp per 4 heads.
//
// A block takes a row's keys 32 at a time, and their dims 128 at a time through shared memory: first for the scores (a
// lane per key), then again for the values (a lane per 4 dims). The second read hits the cache; in return any d_qk and
// d_v fit. Only the row's own list decides the order of the sums, so its bits do not depend on the batch.
#include "csrc/cuda/common/latent_row.cuh"
#include "csrc/cuda/common/launch.cuh"
#include "csrc/cuda/common/warp.cuh"
#include "csrc/cuda/generic/generic.h"

namespace indexcache::generic {
namespace {

using cuda::bf16_bits;
using cuda::kWarpSize;
using cuda::lane_id;
using cuda::warp_id;

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpHeads = 4;
constexpr int kBlockHeads = kWarps * kWarpHeads;
constexpr int kTileKeys = kWarpSize;
constexpr int kChunkDims = 128;
constexpr int kLaneDims = kChunkDims / kWarpSize;
constexpr int kPitch = kChunkDims + 4;  // floats per key: eight lanes read 16 bytes of eight keys in 32 banks
constexpr int kValueChunks = 4;
constexpr int kBlockValues = kValueChunks * kChunkDims;
static_assert(kChunkDims == kLatentScaleGroup, "a chunk of a cache row has one scale");
static_assert(kLaneDims == 4 && kWarpHeads == 4, "a lane's share is one float4");

struct Tile {
  float keys[kTileKeys][kPitch];
  float queries[kBlockHeads][kChunkDims];
  float4 probabilities[kWarps][kTileKeys];  // of the warp's four heads
  const uint8_t* rows[kTileKeys];           // null: no key
};

// Where the rows lie. An entry may need the scale of its chunk, which is read once per row.

template <class T>
struct DenseRows {
  __device__ static const uint8_t* row(const SparseMlaParams& p, int64_t index) {
    return reinterpret_cast<const uint8_t*>(static_cast<const T*>(p.kv) + index * p.kv_stride);
  }
  __device__ static float scale(const uint8_t*, int) { return 1.0f; }
  __device__ static float element(const uint8_t* row, int d, float) {
    return cuda::to_float(reinterpret_cast<const T*>(row)[d]);
  }
};

struct CacheRows {
  __device__ static const uint8_t* row(const SparseMlaParams& p, int64_t slot) {
    // The entry bounds pages * page_size by 2^31 - 1. A 64-bit division would be a call, around which registers spill.
    const auto page_size = static_cast<uint32_t>(p.cache.page_size), row = static_cast<uint32_t>(slot);
    return p.cache.data + row / page_size * p.cache.page_stride + row % page_size * kLatentBytes;
  }
  __device__ static float scale(const uint8_t* row, int d) { return cuda::latent_scale(row, d); }
  __device__ static float element(const uint8_t* row, int d, float scale) {
    return cuda::latent_element(row, d, scale);
  }
};

/// What a block works on.
struct Work {
  int64_t token;
  int first_head, first_value;
};

/// Running softmax of a warp's heads; lane l of value chunk c has dims 128 c + 4 l and the next three.
struct State {
  float max[kWarpHeads], sum[kWarpHeads];
  float4 values[kValueChunks][kWarpHeads];
};

__device__ float4 scale4(float4 a, float s) { return {a.x * s, a.y * s, a.z * s, a.w * s}; }
__device__ float4 fma4(float s, float4 a, float4 sum) {
  return {fmaf(s, a.x, sum.x), fmaf(s, a.y, sum.y), fmaf(s, a.z, sum.z), fmaf(s, a.w, sum.w)};
}
__device__ float dot4(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

/// 128 dims of the tile's keys, zeros where there is no key or no dim.
template <class Rows>
__device__ void stage_keys(Tile& tile, const SparseMlaParams& p, int first_dim) {
#pragma unroll 1  // the running values fill the registers: four loads in flight, not sixteen
  for (int i = warp_id(); i < kTileKeys; i += kWarps) {
    const uint8_t* row = tile.rows[i];
    const float scale = row != nullptr ? Rows::scale(row, first_dim) : 0.0f;  // one for the chunk
#pragma unroll
    for (int j = 0; j < kLaneDims; ++j) {
      const int d = lane_id() + j * kWarpSize;
      tile.keys[i][d] = row != nullptr && first_dim + d < p.d_qk ? Rows::element(row, first_dim + d, scale) : 0.0f;
    }
  }
}

template <class T>
__device__ void stage_queries(Tile& tile, const SparseMlaParams& p, const Work& work, int first_dim) {
#pragma unroll 1
  for (int i = warp_id(); i < kBlockHeads; i += kWarps) {
    const int head = work.first_head + i;
    const T* q = static_cast<const T*>(p.q) + work.token * p.q_token_stride + head * p.q_head_stride;
#pragma unroll
    for (int j = 0; j < kLaneDims; ++j) {
      const int d = lane_id() + j * kWarpSize;
      tile.queries[i][d] = head < p.heads && first_dim + d < p.d_qk ? cuda::to_float(q[first_dim + d]) : 0.0f;
    }
  }
}

/// q . k of the warp's heads and this lane's key.
template <class T, class Rows>
__device__ void dot_products(Tile& tile, const SparseMlaParams& p, const Work& work, float (&dots)[kWarpHeads]) {
  for (int dim = 0; dim < p.d_qk; dim += kChunkDims) {
    __syncthreads();
    stage_keys<Rows>(tile, p, dim);
    stage_queries<T>(tile, p, work, dim);
    __syncthreads();
#pragma unroll 1  // more would spill
    for (int d = 0; d < kChunkDims; d += 4) {
      const float4 key = *reinterpret_cast<const float4*>(&tile.keys[lane_id()][d]);
#pragma unroll
      for (int h = 0; h < kWarpHeads; ++h) {
        dots[h] = dot4(*reinterpret_cast<const float4*>(&tile.queries[warp_id() * kWarpHeads + h][d]), key, dots[h]);
      }
    }
  }
}

/// Takes this lane's scores into the running softmax and returns their probabilities relative to the new maximum.
__device__ float4 update_softmax(State& state, const float (&scores)[kWarpHeads]) {
  float probabilities[kWarpHeads];
#pragma unroll
  for (int h = 0; h < kWarpHeads; ++h) {
    const float new_max = fmaxf(state.max[h], cuda::warp_max(scores[h]));
    const float base = new_max == -__builtin_inff() ? 0.0f : new_max;  // no key yet: exp(-inf - 0) = 0, not NaN
    const float correction = expf(state.max[h] - base);
    probabilities[h] = expf(scores[h] - base);
    state.sum[h] = state.sum[h] * correction + cuda::warp_sum(probabilities[h]);
    state.max[h] = new_max;
#pragma unroll
    for (int c = 0; c < kValueChunks; ++c) state.values[c][h] = scale4(state.values[c][h], correction);
  }
  return {probabilities[0], probabilities[1], probabilities[2], probabilities[3]};
}

template <class Rows>
__device__ void add_values(Tile& tile, const SparseMlaParams& p, const Work& work, State& state) {
#pragma unroll
  for (int c = 0; c < kValueChunks; ++c) {
    const int dim = work.first_value + c * kChunkDims;
    if (dim >= p.d_v) break;
    __syncthreads();
    stage_keys<Rows>(tile, p, dim);
    __syncthreads();
#pragma unroll 2
    for (int i = 0; i < kTileKeys; ++i) {
      const float4 weights = tile.probabilities[warp_id()][i];
      const float4 value = *reinterpret_cast<const float4*>(&tile.keys[i][lane_id() * kLaneDims]);
      state.values[c][0] = fma4(weights.x, value, state.values[c][0]);
      state.values[c][1] = fma4(weights.y, value, state.values[c][1]);
      state.values[c][2] = fma4(weights.z, value, state.values[c][2]);
      state.values[c][3] = fma4(weights.w, value, state.values[c][3]);
    }
  }
}

template <class T>
__device__ void write(const SparseMlaParams& p, const Work& work, const State& state) {
#pragma unroll
  for (int h = 0; h < kWarpHeads; ++h) {
    const int head = work.first_head + warp_id() * kWarpHeads + h;
    if (head >= p.heads) break;
    const int64_t row = work.token * p.heads + head;
    const bool empty = state.sum[h] == 0.0f;
    const float lse = empty ? -__builtin_inff() : state.max[h] + logf(state.sum[h]);
    const float kept = p.sink == nullptr ? 1.0f : 1.0f / (1.0f + expf(p.sink[head] - lse));
    const float scale = kept / state.sum[h];
    if (lane_id() == 0 && work.first_value == 0) p.lse[row] = lse;
#pragma unroll
    for (int c = 0; c < kValueChunks; ++c) {
      const float4 v = state.values[c][h];
      const float lane_values[kLaneDims] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < kLaneDims; ++j) {
        const int d = work.first_value + c * kChunkDims + lane_id() * kLaneDims + j;
        if (d >= p.d_v) continue;
        cuda::store(static_cast<T*>(p.out) + row * p.d_v + d, empty ? 0.0f : lane_values[j] * scale);
      }
    }
  }
}

template <class T, class Rows>
__device__ void attend(Tile& tile, const SparseMlaParams& p, const Work& work) {
  State state{};
  for (float& max : state.max) max = -__builtin_inff();
  const int64_t listed = p.lengths == nullptr ? p.k : min(p.k, max(int64_t{p.lengths[work.token]}, int64_t{0}));
  for (int64_t first = 0; first < listed; first += kTileKeys) {
    bool valid = false;
    if (threadIdx.x < kTileKeys) {
      const int64_t i = first + threadIdx.x;
      const int64_t index = i < listed ? p.indices[work.token * p.k + i] : -1;
      valid = index >= 0 && index < p.keys;
      tile.rows[threadIdx.x] = valid ? Rows::row(p, index) : nullptr;
    }
    if (!__syncthreads_or(valid)) continue;  // padding, mostly
    float scores[kWarpHeads] = {};
    dot_products<T, Rows>(tile, p, work, scores);
    const bool has_key = tile.rows[lane_id()] != nullptr;
    for (float& score : scores) score = has_key ? p.sm_scale * score : -__builtin_inff();
    tile.probabilities[warp_id()][lane_id()] = update_softmax(state, scores);
    add_values<Rows>(tile, p, work, state);
  }
  write<T>(p, work, state);
}

struct Groups {
  int64_t heads, values;  // blocks per token in each direction
};

__host__ __device__ Groups groups(const SparseMlaParams& p) {
  return {cuda::ceil_div(p.heads, kBlockHeads), cuda::ceil_div(p.d_v, kBlockValues)};
}

template <class T, class Rows>
__global__ void __launch_bounds__(kThreads, 2) sparse_mla_kernel(const SparseMlaParams p) {
  __shared__ Tile tile;
  const Groups per_token = groups(p);
  const int64_t blocks = per_token.heads * per_token.values;
  for (int64_t i = blockIdx.x; i < p.tokens * blocks; i += gridDim.x) {
    const int64_t group = i % blocks;
    attend<T, Rows>(tile, p,
                    {i / blocks, static_cast<int>(group / per_token.values) * kBlockHeads,
                     static_cast<int>(group % per_token.values) * kBlockValues});
  }
}

template <class T>
void launch(const SparseMlaParams& p, Stream stream) {
  const Groups per_token = groups(p);
  const int64_t blocks = p.tokens * per_token.heads * per_token.values;
  if (p.cache.data != nullptr) {
    cuda::launch("sparse_mla_paged", sparse_mla_kernel<T, CacheRows>, blocks, kThreads, 0, stream, p);
  } else {
    cuda::launch("sparse_mla", sparse_mla_kernel<T, DenseRows<T>>, blocks, kThreads, 0, stream, p);
  }
}

}  // namespace

void sparse_mla(const SparseMlaParams& p, Stream stream) {
  if (p.dtype == DType::f32) {
    launch<float>(p, stream);
  } else {
    launch<bf16_bits>(p, stream);
  }
}

}  // namespace indexcache::generic
