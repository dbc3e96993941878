// From parameters to a kernel: which tile, how many units, the tensor maps.
#include "csrc/cuda/sm90/indexer/launch.cuh"

#include <cuda_runtime_api.h>

#include <algorithm>

#include "csrc/cuda/common/convert.cuh"
#include "csrc/cuda/common/device.h"
#include "csrc/cuda/common/tensor_map.h"
#include "csrc/cuda/sm90/sm90.h"

namespace indexcache::sm90 {
namespace {

using namespace indexer;

/// The copy engine wants addresses and strides of 16 bytes. Any slice of rows has them, as a row is at least 64 bytes,
/// or 32 of weights. What has not goes to the generic kernel, whose sums differ in the last bits.
bool aligned(const void* data) { return cuda::aligned(data, 16); }

template <int dim>
constexpr cuda::Swizzle kSwizzle = dim == 128 ? cuda::Swizzle::bytes128 : cuda::Swizzle::bytes64;

/// e4m3 [keys, dim] in tiles of kTileKeys.
template <int dim>
CUtensorMap keys_map(const char* op, const void* data, int64_t keys) {
  return cuda::tensor_map(op, {.type = CU_TENSOR_MAP_DATA_TYPE_UINT8,
                               .data = data,
                               .rank = 2,
                               .sizes = {dim, static_cast<uint64_t>(keys)},
                               .strides = {dim},
                               .tile = {dim, kTileKeys},
                               .swizzle = kSwizzle<dim>});
}

/// e4m3 [queries, heads, dim] in sets: a few heads of each query of the set, then the next few of each, and so on.
template <class T>
CUtensorMap queries_map(const char* op, const void* data, int64_t queries) {
  constexpr uint32_t kGroups = T::kHeads / T::kGroupHeads;
  return cuda::tensor_map(op, {.type = CU_TENSOR_MAP_DATA_TYPE_UINT8,
                               .data = data,
                               .rank = 4,
                               .sizes = {T::kDim, T::kGroupHeads, static_cast<uint64_t>(queries), kGroups},
                               .strides = {T::kDim, T::kHeads * T::kDim, T::kGroupHeads * T::kDim},
                               .tile = {T::kDim, T::kGroupHeads, T::kGroupQueries, kGroups},
                               .swizzle = kSwizzle<T::kDim>});
}

template <int heads, int dim>
void run_dense(const IndexerLogitsParams& p, Stream stream) {
  using T = Tile<heads, kDenseColumns / heads, dim>;
  const char* op = "indexer_logits";
  const int sms = cuda::sm_count();
  const int64_t blocks = ceil_div(p.queries, T::kQueries), tiles = ceil_div(p.keys, kTileKeys);
  const int64_t chunk_tiles = unit_tiles(blocks, tiles, sms);
  const int64_t units = blocks * ceil_div(tiles, chunk_tiles);
  const DenseCall call{.p = p,
                       .queries = queries_map<T>(op, p.q, p.queries),
                       .keys = keys_map<dim>(op, p.k, p.keys),
                       .query_blocks = static_cast<int>(blocks),
                       .units = static_cast<int>(units),
                       .chunk_tiles = static_cast<int>(chunk_tiles)};
  launch_dense<T>(call, static_cast<int>(std::min<int64_t>(units, sms)), stream);
}

template <int heads, int queries, int dim>
void run_paged(const IndexerLogitsPagedParams& p, Stream stream) {
  using T = Tile<heads, queries, dim>;
  const char* op = "indexer_logits_paged";
  const int64_t groups = ceil_div(p.queries_per_request, queries);
  const int64_t most_keys = std::min(p.columns, p.table_pages * kTileKeys);
  const int64_t most_pages = p.requests * groups * ceil_div(p.columns, kTileKeys);
  const auto blocks = static_cast<int>(std::min<int64_t>(most_pages, cuda::sm_count()));
  const int64_t page_stride = p.cache.pages == 1 ? T::kPageBytes : p.cache.page_stride;
  const PagedCall call{
      .p = p,
      .queries = queries_map<T>(op, p.q, p.requests * p.queries_per_request),
      .keys = cuda::tensor_map(op, {.type = CU_TENSOR_MAP_DATA_TYPE_UINT8,
                                    .data = p.cache.data,
                                    .rank = 3,
                                    .sizes = {dim, T::kPageRows, static_cast<uint64_t>(p.cache.pages)},
                                    .strides = {dim, static_cast<uint64_t>(page_stride)},
                                    .tile = {dim, T::kPageRows, 1},
                                    .swizzle = kSwizzle<dim>}),
      .groups = static_cast<int>(p.requests * groups),
      .groups_per_request = static_cast<int>(groups),
      .most_keys = static_cast<int>(most_keys),
      .share = 1.0 / blocks};
  launch_paged<T>(call, blocks, stream);
}

template <int heads, int dim>
void run_paged_wide(const IndexerLogitsPagedParams& p, Stream stream) {
  switch (p.queries_per_request) {
    case 1: return run_paged<heads, 1, dim>(p, stream);
    case 2: return run_paged<heads, 2, dim>(p, stream);
    default: return run_paged<heads, 4, dim>(p, stream);
  }
}

template <int dim>
void run_dense(const IndexerLogitsParams& p, Stream stream) {
  switch (p.heads) {
    case 8: return run_dense<8, dim>(p, stream);
    case 16: return run_dense<16, dim>(p, stream);
    case 32: return run_dense<32, dim>(p, stream);
    default: return run_dense<64, dim>(p, stream);
  }
}

/// The narrowest tile that holds the queries of a request, but no narrower than 32 columns.
template <int dim>
void run_paged(const IndexerLogitsPagedParams& p, Stream stream) {
  switch (p.heads) {
    case 8: return run_paged<8, 4, dim>(p, stream);
    case 16: return run_paged<16, 4, dim>(p, stream);
    case 32: return run_paged_wide<32, dim>(p, stream);
    default: return run_paged_wide<64, dim>(p, stream);
  }
}

}  // namespace

void indexer_logits(const IndexerLogitsParams& p, Stream stream) {
  if (p.queries == 0 || p.keys == 0) return;
  if (!aligned(p.q) || !aligned(p.k) || !aligned(p.weights)) {
    return generic::indexer_logits(p, stream);
  }
  return p.dim == 64 ? run_dense<64>(p, stream) : run_dense<128>(p, stream);
}

void indexer_logits_paged(const IndexerLogitsPagedParams& p, Stream stream) {
  if (p.requests == 0 || p.queries_per_request == 0 || p.columns == 0) return;
  const PagedCache& cache = p.cache;
  const bool whole_rows = cache.pages == 1 || cache.page_stride % p.dim == 0;  // a rule of tensor maps
  if (!aligned(p.q) || !aligned(p.weights) || !aligned(cache.data) || !whole_rows || cache.pages == 0) {
    return generic::indexer_logits_paged(p, stream);
  }
  return p.dim == 64 ? run_paged<64>(p, stream) : run_paged<128>(p, stream);
}

}  // namespace indexcache::sm90
