// Indexer scores: a block per (query, tile of keys), a thread per two keys.
//
// A score is one thread's sum over heads, in order, of dot products over dims, in order. Nothing else enters, so the
// same query and key give the same bits in any batch, chunk or window, and from the paged cache as from dense keys.
#include "csrc/cuda/common/convert.cuh"
#include "csrc/cuda/common/launch.cuh"
#include "csrc/cuda/common/warp.cuh"
#include "csrc/cuda/generic/generic.h"

namespace indexcache::generic {
namespace {

constexpr int kThreads = 128;
constexpr int kKeysPerThread = 2;
constexpr int kTileKeys = kThreads * kKeysPerThread;
constexpr int kChunkDims = 128;           // dims in shared memory at a time
constexpr int kChunkWords = kChunkDims / 4;
constexpr int kPitch = kChunkWords + 1;   // words per key; odd: 32 keys at the same dim hit 32 banks
constexpr int kGroupHeads = 8;            // heads that share one read of a key

struct Tile {
  uint32_t keys[kTileKeys * kPitch];
  float4 queries[kGroupHeads][kChunkWords];
};

/// Where a key lies; null where the cache holds none.
struct Key {
  const uint8_t* values;
  const uint8_t* scale;
};

struct Window {
  int64_t begin, end;
};

struct DenseKeys {
  IndexerLogitsParams p;
  __device__ int64_t queries() const { return p.queries; }
  __device__ int64_t columns() const { return p.keys; }
  __device__ Window window(int64_t query) const {
    return {max(p.starts[query], 0), min(p.keys, int64_t{p.ends[query]})};
  }
  __device__ Key key(int64_t, int64_t n) const {
    return {p.k + n * p.dim, reinterpret_cast<const uint8_t*>(p.k_scale + n)};
  }
};

struct PagedKeys {
  IndexerLogitsPagedParams p;
  __device__ int64_t queries() const { return p.requests * p.queries_per_request; }
  __device__ int64_t columns() const { return p.columns; }
  __device__ Window window(int64_t query) const { return {0, min(p.columns, int64_t{p.context_lens[query]})}; }
  __device__ Key key(int64_t query, int64_t n) const {
    if (n / kIndexPage >= p.table_pages) return {};
    const int64_t page = p.block_table[query / p.queries_per_request * p.table_pages + n / kIndexPage];
    if (page < 0 || page >= p.cache.pages) return {};
    const uint8_t* values = p.cache.data + page * p.cache.page_stride;
    const uint8_t* scales = values + kIndexPage * p.dim;
    return {values + n % kIndexPage * p.dim, scales + n % kIndexPage * sizeof(float)};
  }
};

/// A warp per key, a word per lane. Keys outside the window, and dims past the last, become zeros.
template <class Keys>
__device__ void stage_keys(Tile& tile, const Keys& keys, int64_t query, int64_t first_key, Window window,
                           int first_dim) {
  const int dim = first_dim + 4 * cuda::lane_id();
#pragma unroll 4
  for (int i = cuda::warp_id(); i < kTileKeys; i += kThreads / cuda::kWarpSize) {
    const int64_t n = first_key + i;
    const Key key = n >= window.begin && n < window.end ? keys.key(query, n) : Key{};
    const uint32_t word = key.scale == nullptr ? 0 : cuda::load_bytes(key.values + dim, keys.p.dim - dim);
    tile.keys[i * kPitch + cuda::lane_id()] = word;
  }
}

template <class Keys>
__device__ void stage_queries(Tile& tile, const Keys& keys, int64_t query, int first_head, int first_dim) {
  const int dim = first_dim + 4 * cuda::lane_id();
  for (int i = cuda::warp_id(); i < kGroupHeads; i += kThreads / cuda::kWarpSize) {
    const int head = first_head + i;
    const uint8_t* values = keys.p.q + (query * keys.p.heads + head) * keys.p.dim + dim;
    const uint32_t word = head < keys.p.heads ? cuda::load_bytes(values, keys.p.dim - dim) : 0;
    tile.queries[i][cuda::lane_id()] = cuda::e4m3x4_to_float(word);
  }
}

__device__ float dot4(float4 a, float4 b, float sum) {
  sum = fmaf(a.x, b.x, sum);
  sum = fmaf(a.y, b.y, sum);
  sum = fmaf(a.z, b.z, sum);
  return fmaf(a.w, b.w, sum);
}

/// Adds the products of the dims in shared memory.
__device__ void accumulate(const Tile& tile, int words, float (&dots)[kGroupHeads][kKeysPerThread]) {
  for (int word = 0; word < words; ++word) {
    float4 key[kKeysPerThread];
#pragma unroll
    for (int j = 0; j < kKeysPerThread; ++j) {
      key[j] = cuda::e4m3x4_to_float(tile.keys[(threadIdx.x + j * kThreads) * kPitch + word]);
    }
#pragma unroll
    for (int h = 0; h < kGroupHeads; ++h) {
      const float4 query = tile.queries[h][word];
#pragma unroll
      for (int j = 0; j < kKeysPerThread; ++j) dots[h][j] = dot4(query, key[j], dots[h][j]);
    }
  }
}

/// sum_h weight * relu(dot) of this thread's keys of the tile.
template <class Keys>
__device__ void score_tile(Tile& tile, const Keys& keys, int64_t query, int64_t first_key, Window window,
                           float (&sums)[kKeysPerThread]) {
  const int heads = keys.p.heads, dims = keys.p.dim;
  const float* weights = keys.p.weights + query * heads;
  for (int head = 0; head < heads; head += kGroupHeads) {
    float dots[kGroupHeads][kKeysPerThread] = {};
    for (int dim = 0; dim < dims; dim += kChunkDims) {
      __syncthreads();
      if (head == 0 || dims > kChunkDims) stage_keys(tile, keys, query, first_key, window, dim);
      stage_queries(tile, keys, query, head, dim);
      __syncthreads();
      accumulate(tile, min(kChunkWords, (dims - dim + 3) / 4), dots);
    }
#pragma unroll
    for (int h = 0; h < kGroupHeads; ++h) {
      if (head + h >= heads) break;
      const float weight = weights[head + h];
#pragma unroll
      for (int j = 0; j < kKeysPerThread; ++j) {
        const float relu = dots[h][j] < 0.0f ? 0.0f : dots[h][j];  // NaN stays
        sums[j] = fmaf(weight, relu, sums[j]);
      }
    }
  }
}

template <class Keys>
__global__ void __launch_bounds__(kThreads, 5) logits_kernel(const Keys keys) {
  __shared__ Tile tile;
  const int64_t tiles = cuda::ceil_div(keys.columns(), kTileKeys);
  for (int64_t work = blockIdx.x; work < keys.queries() * tiles; work += gridDim.x) {
    const int64_t query = work / tiles, first_key = work % tiles * kTileKeys;
    const Window window = keys.window(query);
    float sums[kKeysPerThread] = {};
    if (first_key < window.end && first_key + kTileKeys > window.begin) {
      score_tile(tile, keys, query, first_key, window, sums);
    }
    for (int j = 0; j < kKeysPerThread; ++j) {
      const int64_t n = first_key + threadIdx.x + j * kThreads;
      if (n >= keys.columns()) continue;
      const Key key = n >= window.begin && n < window.end ? keys.key(query, n) : Key{};
      keys.p.logits[query * keys.p.logits_stride + n] =
          key.scale == nullptr ? -__builtin_inff() : cuda::load_float(key.scale) * sums[j];
    }
  }
}

}  // namespace

void indexer_logits(const IndexerLogitsParams& p, Stream stream) {
  const int64_t blocks = p.queries * cuda::ceil_div(p.keys, kTileKeys);
  cuda::launch("indexer_logits", logits_kernel<DenseKeys>, blocks, kThreads, 0, stream, DenseKeys{p});
}

void indexer_logits_paged(const IndexerLogitsPagedParams& p, Stream stream) {
  const int64_t blocks = p.requests * p.queries_per_request * cuda::ceil_div(p.columns, kTileKeys);
  cuda::launch("indexer_logits_paged", logits_kernel<PagedKeys>, blocks, kThreads, 0, stream, PagedKeys{p});
}

}  // namespace indexcache::generic
