#include <limits>

#include "csrc/ops/dispatch.h"
#include "csrc/ops/indexer.h"

namespace indexcache {

using ops::Check;

namespace ops {

IndexerLogitsParams indexer_params(const Check& check, const TensorView& q, const TensorView& k,
                                   const TensorView& k_scale, const TensorView& weights, const TensorView& starts,
                                   const TensorView& ends) {
  check.tensor("q", q, {DType::e4m3}, {"tokens", "heads", "dim"});
  const int64_t tokens = q.size(0), heads = q.size(1), dim = q.size(2);
  check.at_least("dim", dim, 1);
  check.tensor("k", k, {DType::e4m3}, {"keys", dim});
  const int64_t keys = k.size(0);
  check.tensor("k_scale", k_scale, {DType::f32}, {keys});
  check.tensor("weights", weights, {DType::f32}, {tokens, heads});
  check.tensor("starts", starts, {DType::i32}, {tokens});
  check.tensor("ends", ends, {DType::i32}, {tokens});
  check.at_most("keys", keys, std::numeric_limits<int32_t>::max());
  return {.q = q.as<uint8_t>(),
          .weights = weights.as<float>(),
          .queries = tokens,
          .heads = narrow(heads),
          .dim = narrow(dim),
          .k = k.as<uint8_t>(),
          .k_scale = k_scale.as<float>(),
          .keys = keys,
          .starts = starts.as<int32_t>(),
          .ends = ends.as<int32_t>(),
          .logits = nullptr,
          .logits_stride = keys};
}

IndexerLogitsPagedParams indexer_paged_params(const Check& check, const TensorView& q, const TensorView& index_k_cache,
                                              const TensorView& weights, const TensorView& context_lens,
                                              const TensorView& block_table) {
  check.tensor("q", q, {DType::e4m3}, {"requests", "queries", "heads", "dim"});
  const int64_t requests = q.size(0), queries = q.size(1), heads = q.size(2), dim = q.size(3);
  check.at_least("dim", dim, 1);
  const PagedCache cache = check.cache("index_k_cache", index_k_cache, kIndexPage, dim + 4);
  check.tensor("weights", weights, {DType::f32}, {requests, queries, heads});
  check.tensor("context_lens", context_lens, {DType::i32}, {requests, queries});
  check.tensor("block_table", block_table, {DType::i32}, {requests, "pages"});
  return {.q = q.as<uint8_t>(),
          .weights = weights.as<float>(),
          .requests = requests,
          .queries_per_request = queries,
          .heads = narrow(heads),
          .dim = narrow(dim),
          .cache = cache,
          .context_lens = context_lens.as<int32_t>(),
          .block_table = block_table.as<int32_t>(),
          .table_pages = block_table.size(1),
          .logits = nullptr,
          .columns = 0,
          .logits_stride = 0};
}

}  // namespace ops

TensorView indexer_logits(Context& ctx, const TensorView& q, const TensorView& k, const TensorView& k_scale,
                          const TensorView& weights, const TensorView& starts, const TensorView& ends,
                          const MaybeView& out) {
  const Check check("indexer_logits", q);
  IndexerLogitsParams params = ops::indexer_params(check, q, k, k_scale, weights, starts, ends);
  const TensorView logits = check.result(ctx, "out", out, DType::f32, {params.queries, params.keys});
  if (params.queries * params.keys == 0) return logits;
  params.logits = logits.as<float>();
  ops::launch(check, ctx, {.heads = params.heads, .dim = params.dim, .dtype = q.dtype}, params,
              INDEXCACHE_SM90_KERNELS(indexer_logits));
  return logits;
}

TensorView indexer_logits_paged(Context& ctx, const TensorView& q, const TensorView& index_k_cache,
                                const TensorView& weights, const TensorView& context_lens,
                                const TensorView& block_table, int64_t max_context_len, const MaybeView& out) {
  const Check check("indexer_logits_paged", q);
  IndexerLogitsPagedParams params =
      ops::indexer_paged_params(check, q, index_k_cache, weights, context_lens, block_table);
  check.at_least("max_context_len", max_context_len, 0);
  check.at_most("max_context_len", max_context_len, std::numeric_limits<int32_t>::max());
  const TensorView logits =
      check.result(ctx, "out", out, DType::f32, {params.requests, params.queries_per_request, max_context_len});
  if (logits.numel() == 0) return logits;
  params.logits = logits.as<float>();
  params.columns = params.logits_stride = max_context_len;
  ops::launch(check, ctx, {.heads = params.heads, .dim = params.dim, .dtype = q.dtype}, params,
              INDEXCACHE_SM90_KERNELS(indexer_logits_paged));
  return logits;
}

}  // namespace indexcache
