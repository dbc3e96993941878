// From parameters to a kernel: which tile, how many splits, the tensor map of the queries.
#include "csrc/cuda/sm90/sparse_mla/launch.cuh"

#include "csrc/cuda/common/tensor_map.h"
#include "csrc/cuda/sm90/sm90.h"

namespace indexcache::sm90 {
namespace {

using namespace attention;

/// The copy engine and 16-byte copies want addresses and strides of 16 bytes.
bool whole_units(int64_t bytes) { return bytes > 0 && bytes % 16 == 0; }

/// The maximum of scores is that of dot products if the scale is positive.
bool fits(const SparseMlaParams& p) {
  if (!(p.sm_scale > 0) || !cuda::aligned(p.out, 16)) return false;
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
  const Cut how = cut(p.tokens, p.heads, p.k);
  const Call call{.p = p,
                  .queries = cuda::tensor_map(op, {.type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                                   .data = p.q,
                                                   .rank = 3,
                                                   .sizes = {d_qk, static_cast<uint64_t>(p.heads),
                                                             static_cast<uint64_t>(p.tokens)},
                                                   .strides = {static_cast<uint64_t>(2 * p.q_head_stride),
                                                               static_cast<uint64_t>(2 * p.q_token_stride)},
                                                   .tile = {kChunkDims, static_cast<uint32_t>(how.tile_heads), 1},
                                                   .swizzle = cuda::Swizzle::bytes128}),
                  .cut = how,
                  .head_tiles = head_tiles(p.heads, how.tile_heads)};
  if (p.cache.data != nullptr) return launch<Tile<CacheSource, 576>>(op, call, stream);
  if (p.d_qk == 576) return launch<Tile<DenseSource, 576>>(op, call, stream);
  launch<Tile<DenseSource, 512>>(op, call, stream);
}

}  // namespace indexcache::sm90
