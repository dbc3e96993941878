// From parameters to a kernel: which tile, how many splits, groups of tokens or not, tensor maps.
#include "csrc/cuda/sm90/sparse_mla/launch.cuh"

#include "csrc/cuda/common/tensor_map.h"
#include "csrc/cuda/sm90/sm90.h"

namespace indexcache::sm90 {
namespace {

using namespace attention;

/// The copy engine wants strides of whole 16 bytes, up to 40 bits; that of a single token or head may be anything.
bool copied_by(int64_t bytes) { return bytes > 0 && bytes % 16 == 0 && bytes < int64_t{1} << 40; }

/// What the support table cannot say: the generic kernel takes the other calls. A scale that is not positive: the
/// kernels take the maximum of scores to be that of dot products.
bool fits(const SparseMlaParams& p) {
  if (!(p.sm_scale > 0) || p.k > kMaxListed || !cuda::aligned(p.out, 16)) return false;
  const bool queries = cuda::aligned(p.q, 16) && copied_by(2 * p.q_token_stride) && copied_by(2 * p.q_head_stride);
  if (p.cache.data != nullptr) return queries && cuda::aligned(p.cache.data, 16) && p.cache.page_stride % 16 == 0;
  return queries && cuda::aligned(p.kv, 16) && 2 * p.kv_stride % 16 == 0;
}

const char* op_of(const SparseMlaParams& p) { return p.cache.data != nullptr ? "sparse_mla_paged" : "sparse_mla"; }

/// In tiles of `tokens` tokens, `heads` heads and a chunk of dims.
CUtensorMap query_map(const SparseMlaParams& p, int heads, int tokens) {
  const auto size = [](int64_t x) { return static_cast<uint64_t>(x); };
  return cuda::tensor_map(op_of(p), {.type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                     .data = p.q,
                                     .rank = 3,
                                     .sizes = {size(p.d_qk), size(p.heads), size(p.tokens)},
                                     .strides = {size(2 * p.q_head_stride), size(2 * p.q_token_stride)},
                                     .tile = {kChunkDims, static_cast<uint32_t>(heads), static_cast<uint32_t>(tokens)},
                                     .swizzle = cuda::Swizzle::bytes128});
}

Call call_of(const SparseMlaParams& p, const Cut& how) {
  return {.p = p,
          .queries = query_map(p, how.tile_heads, 1),
          .cut = how,
          .head_tiles = head_tiles(p.heads, how.tile_heads)};
}

template <bool kGrouped>
void launch_dense(const Call& call, Stream stream) {
  const char* const op = op_of(call.p);
  if (call.p.d_qk == 576) return launch<Tile<DenseSource, 576, kGrouped>>(op, call, stream);
  launch<Tile<DenseSource, 512, kGrouped>>(op, call, stream);
}

/// Tokens of a group, 1: the call has none. The cache's producer knows no unions.
int group_of(const SparseMlaParams& p) { return p.cache.data != nullptr ? 1 : group_tokens(p.tokens, p.heads, p.k); }

/// The call of some of the tokens of `p`.
SparseMlaParams tokens_of(SparseMlaParams p, int64_t first, int64_t tokens) {
  p.q = static_cast<const uint16_t*>(p.q) + first * p.q_token_stride;
  p.indices += first * p.k;
  if (p.lengths != nullptr) p.lengths += first;
  p.out = static_cast<uint16_t*>(p.out) + first * p.heads * kValueDims;
  p.lse += first * p.heads;
  p.tokens = tokens;
  return p;
}

/// Few heads: chunks of the tokens, by the unions of `group` each.
void launch_grouped(const SparseMlaParams& p, int group, Stream stream) {
  const int64_t chunk = union_chunk(p.tokens, p.k, group).tokens;
  for (int64_t first = 0; first < p.tokens; first += chunk) {
    const SparseMlaParams part = tokens_of(p, first, std::min(chunk, p.tokens - first));
    Call call = call_of(part, {kTileHeads, 1});
    call.group_queries = query_map(part, p.heads, group);
    call.unions = unions_at(p.scratch, union_size(part.tokens, p.k, group), group);
    build_unions(op_of(p), part, call.unions, stream);
    launch_dense<true>(call, stream);
  }
}

}  // namespace

int64_t sparse_mla_scratch(const SparseMlaParams& p) {
  if (p.tokens == 0 || p.heads == 0 || !fits(p)) return 0;
  const int group = group_of(p);
  return group > 1 ? union_chunk(p.tokens, p.k, group).bytes : 0;
}

void sparse_mla(const SparseMlaParams& p, Stream stream) {
  if (p.tokens == 0 || p.heads == 0) return;
  if (!fits(p)) return generic::sparse_mla(p, stream);
  if (const int group = group_of(p); group > 1) return launch_grouped(p, group, stream);
  const Call call = call_of(p, cut(p.tokens, p.heads, p.k));
  if (p.cache.data != nullptr) return launch<Tile<CacheSource, 576>>(op_of(p), call, stream);
  launch_dense<false>(call, stream);
}

}  // namespace indexcache::sm90
