// From parameters to a kernel: which tile, how many splits, the tensor map of the queries.
#include "csrc/cuda/sm90/sparse_mla/launch.cuh"

#include "csrc/cuda/common/tensor_map.h"
#include "csrc/cuda/sm90/sm90.h"

namespace indexcache::sm90 {
namespace {

using namespace attention;

/// The copy engine and 16-byte copies want addresses and strides of 16 bytes.
bool whole_units(int64_t bytes) { return bytes > 0 && bytes % 16 == 0; }

bool fits(const SparseMlaParams& p) {
  if (!cuda::aligned(p.out, 16)) return false;
  const bool queries = cuda::aligned(p.q, 16) && whole_units(2 * p.q_token_stride) && whole_units(2 * p.q_head_stride);
  if (p.cache.data != nullptr) return queries && cuda::aligned(p.cache.data, 16) && p.cache.page_stride % 16 == 0;
  return queries && cuda::aligned(p.kv, 16) && 2 * p.kv_stride % 16 == 0;
}

}  // namespace

void sparse_mla(const SparseMlaParams& p, Stream stream) {
  if (p.tokens == 0 || p.heads == 0) return;
  if (!fits(p)) return generic::sparse_mla(p, stream);
  const char* op = p.cache.data != nullptr ? "sparse_mla_paged" : "sparse_mla";
  const auto d_qk = static_cast<uint64_t>(p.d_qk);
  const int64_t head_tiles = cuda::ceil_div(p.heads, kTileHeads);
  const Call call{.p = p,
                  .queries = cuda::tensor_map(op, {.type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                                   .data = p.q,
                                                   .rank = 3,
                                                   .sizes = {d_qk, static_cast<uint64_t>(p.heads),
                                                             static_cast<uint64_t>(p.tokens)},
                                                   .strides = {static_cast<uint64_t>(2 * p.q_head_stride),
                                                               static_cast<uint64_t>(2 * p.q_token_stride)},
                                                   .tile = {kChunkDims, kTileHeads, 1},
                                                   .swizzle = cuda::Swizzle::bytes128}),
                  .outputs = cuda::tensor_map(op, {.type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                                   .data = p.out,
                                                   .rank = 3,
                                                   .sizes = {kValueDims, static_cast<uint64_t>(p.heads),
                                                             static_cast<uint64_t>(p.tokens)},
                                                   .strides = {2 * kValueDims, static_cast<uint64_t>(2 * kValueDims * p.heads)},
                                                   .tile = {kChunkDims, kTileHeads, 1},
                                                   .swizzle = cuda::Swizzle::bytes128}),
                  .head_tiles = static_cast<int>(head_tiles),
                  .splits = splits(p.tokens, head_tiles, p.k)};
  if (p.cache.data != nullptr) return launch<Tile<CacheSource, 576>>(op, call, stream);
  return p.d_qk == 576 ? launch<Tile<DenseSource, 576>>(op, call, stream) : launch<Tile<DenseSource, 512>>(op, call, stream);
}

}  // namespace indexcache::sm90
