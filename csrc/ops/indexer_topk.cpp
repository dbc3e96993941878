// Selection without the [T, N] logits: chunks of rows go through one scratch buffer, logits first, then top-k.
// The same kernels as indexer_logits and topk run on each chunk, so the result is theirs bit for bit.
#include <algorithm>

#include "csrc/ops/dispatch.h"
#include "csrc/ops/indexer.h"

namespace indexcache {
namespace {

using ops::Check;

constexpr int64_t kMaxScratch = int64_t{256} << 20;  // the contract, all backends
constexpr int64_t kCpuScratch = int64_t{2} << 20;    // a chunk stays in the last-level cache between the two kernels
constexpr int64_t kCpuRows = 16;                     // but enough rows share the expansion of a tile of keys

/// Rows of `columns` f32 that go through the scratch buffer at a time, at least one.
int64_t rows_per_chunk(const Check& check, int64_t columns) {
  constexpr int64_t kRowEntry = sizeof(float);
  check.at_most("keys per query", columns, kMaxScratch / kRowEntry);
  const int64_t row_bytes = kRowEntry * std::max<int64_t>(1, columns);
  const int64_t most = kMaxScratch / row_bytes;
  return check.device().type == DeviceType::cpu ? std::min(most, std::max(kCpuRows, kCpuScratch / row_bytes)) : most;
}

float* scratch_rows(Context& ctx, const Check& check, int64_t rows, int64_t columns) {
  return static_cast<float*>(ctx.scratch(rows * columns * static_cast<int64_t>(sizeof(float)), check.device()));
}

}  // namespace

TensorView indexer_topk(Context& ctx, const TensorView& q, const TensorView& k, const TensorView& k_scale,
                        const TensorView& weights, const TensorView& starts, const TensorView& ends, int64_t topk,
                        const MaybeView& out) {
  const Check check("indexer_topk", q), selecting("topk", q);
  const IndexerLogitsParams all = ops::indexer_params(check, q, k, k_scale, weights, starts, ends);
  check.at_least("topk", topk, 1);
  const int64_t chunk = std::min(all.queries, rows_per_chunk(check, all.keys));
  const TensorView result = check.result(ctx, "out", out, DType::i32, {all.queries, topk});
  if (all.queries == 0) return result;
  const CallShape shape{.heads = all.heads, .dim = all.dim, .k = topk, .dtype = q.dtype};
  float* logits = scratch_rows(ctx, check, chunk, all.keys);
  for (int64_t row = 0; row < all.queries; row += chunk) {
    IndexerLogitsParams part = all;
    part.queries = std::min(chunk, all.queries - row);
    part.q += row * all.heads * all.dim;
    part.weights += row * all.heads;
    part.starts += row;
    part.ends += row;
    part.logits = logits;
    if (all.keys > 0) ops::launch(check, ctx, shape, part, INDEXCACHE_SM90_KERNELS(indexer_logits));
    const TopkParams selection{.logits = logits,
                               .dtype = DType::f32,
                               .rows = part.queries,
                               .columns = all.keys,
                               .row_stride = all.keys,
                               .starts = part.starts,
                               .ends = part.ends,
                               .k = topk,
                               .out = result.as<int32_t>() + row * topk};
    ops::launch(selecting, ctx, {.k = topk, .dtype = DType::f32}, selection, INDEXCACHE_SM90_KERNELS(topk));
  }
  return result;
}

TensorView indexer_topk_paged(Context& ctx, const TensorView& q, const TensorView& index_k_cache,
                              const TensorView& weights, const TensorView& context_lens, const TensorView& block_table,
                              int64_t topk, const MaybeView& out) {
  const Check check("indexer_topk_paged", q), selecting("topk", q);
  const IndexerLogitsPagedParams all =
      ops::indexer_paged_params(check, q, index_k_cache, weights, context_lens, block_table);
  check.at_least("topk", topk, 1);
  const int64_t queries = all.queries_per_request;
  const int64_t columns = all.table_pages * kIndexPage;  // lengths are on the device: the table bounds the context
  const int64_t rows = rows_per_chunk(check, columns);
  const TensorView result = check.result(ctx, "out", out, DType::i32, {all.requests, queries, topk});
  if (all.requests * queries == 0) return result;
  // Whole requests per chunk, or, where one request's queries do not fit, some queries of one request.
  const int64_t query_chunk = std::min(queries, rows);
  const int64_t request_chunk = query_chunk < queries ? 1 : std::min(all.requests, rows / queries);
  const CallShape shape{.heads = all.heads, .dim = all.dim, .k = topk, .dtype = q.dtype};
  float* logits = scratch_rows(ctx, check, request_chunk * query_chunk, columns);
  for (int64_t request = 0; request < all.requests; request += request_chunk) {
    for (int64_t query = 0; query < queries; query += query_chunk) {
      const int64_t row = request * queries + query;
      IndexerLogitsPagedParams part = all;
      part.requests = std::min(request_chunk, all.requests - request);
      part.queries_per_request = std::min(query_chunk, queries - query);
      part.q += row * all.heads * all.dim;
      part.weights += row * all.heads;
      part.context_lens += row;
      part.block_table += request * all.table_pages;
      part.logits = logits;
      part.columns = part.logits_stride = columns;
      if (columns > 0) ops::launch(check, ctx, shape, part, INDEXCACHE_SM90_KERNELS(indexer_logits_paged));
      const TopkParams selection{.logits = logits,
                                 .dtype = DType::f32,
                                 .rows = part.requests * part.queries_per_request,
                                 .columns = columns,
                                 .row_stride = columns,
                                 .starts = nullptr,
                                 .ends = part.context_lens,
                                 .k = topk,
                                 .out = result.as<int32_t>() + row * topk};
      ops::launch(selecting, ctx, {.k = topk, .dtype = DType::f32}, selection, INDEXCACHE_SM90_KERNELS(topk));
    }
  }
  return result;
}

}  // namespace indexcache
