#include <limits>

#include "csrc/ops/dispatch.h"

namespace indexcache {
namespace {

using ops::Check;

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

/// Checks what the dense and the paged op share, allocates the results and launches. `params` brings the key side.
Pair run(const Check& check, Context& ctx, const TensorView& q, const TensorView& rows, const char* rows_name,
         const MaybeView& sink, const MaybeView& lengths, const AttentionOut& out, SparseMlaParams params) {
  const int64_t tokens = q.size(0), heads = q.size(1);
  check.at_most("heads", heads, kMaxInt);
  check.tensor(rows_name, rows, {DType::i32}, {tokens, "k"});
  check.tensor("sink", sink, {DType::f32}, {heads});
  check.tensor("lengths", lengths, {DType::i32}, {tokens});
  const Pair result{check.result(ctx, "out", out.out, q.dtype, {tokens, heads, params.d_v}),
                    check.result(ctx, "lse", out.lse, DType::f32, {tokens, heads})};
  if (tokens * heads == 0) return result;
  params.q = q.data;
  params.dtype = q.dtype;
  params.tokens = tokens;
  params.heads = ops::narrow(heads);
  params.d_qk = ops::narrow(q.size(2));
  params.q_token_stride = q.stride(0);
  params.q_head_stride = q.stride(1);
  params.indices = rows.as<int32_t>();
  params.k = rows.size(1);
  params.lengths = ops::pointer_or_null<int32_t>(lengths);
  params.sink = ops::pointer_or_null<float>(sink);
  params.out = result.first.data;
  params.lse = result.second.as<float>();
  const CallShape shape{.heads = heads, .dim = params.d_qk, .d_v = params.d_v, .k = params.k, .dtype = q.dtype};
  ops::launch(check, ctx, shape, params, INDEXCACHE_SM90_SCRATCH_KERNELS(sparse_mla));
  return result;
}

}  // namespace

Pair sparse_mla(Context& ctx, const TensorView& q, const TensorView& kv, const TensorView& indices, double sm_scale,
                int64_t d_v, const MaybeView& sink, const MaybeView& lengths, const AttentionOut& out) {
  const Check check("sparse_mla", q);
  check.tensor("q", q, {DType::bf16, DType::f32}, {"tokens", "heads", "d_qk"}, {.dense_from = 2});
  check.at_least("d_qk", q.size(2), 1);
  check.at_most("d_qk", q.size(2), kMaxInt);
  check.tensor("kv", kv, {q.dtype}, {"keys", q.size(2)}, {.dense_from = 1});
  check.at_most("keys", kv.size(0), kMaxInt);
  check.at_least("d_v", d_v, 1);
  check.at_most("d_v", d_v, q.size(2));
  SparseMlaParams params{};
  params.kv = kv.data;
  params.keys = kv.size(0);
  params.kv_stride = kv.stride(0);
  params.d_v = ops::narrow(d_v);
  params.sm_scale = static_cast<float>(sm_scale);
  return run(check, ctx, q, indices, "indices", sink, lengths, out, params);
}

Pair sparse_mla_paged(Context& ctx, const TensorView& q, const TensorView& kv_cache, const TensorView& slots,
                      double sm_scale, const MaybeView& sink, const MaybeView& lengths, const AttentionOut& out) {
  const Check check("sparse_mla_paged", q);
  check.tensor("q", q, {DType::bf16, DType::f32}, {"tokens", "heads", kLatentDim + kRopeDim}, {.dense_from = 2});
  SparseMlaParams params{};
  params.cache = check.cache("kv_cache", kv_cache, -1, kLatentBytes);
  params.keys = params.cache.pages * params.cache.page_size;
  params.d_v = kLatentDim;
  params.sm_scale = static_cast<float>(sm_scale);
  return run(check, ctx, q, slots, "slots", sink, lengths, out, params);
}

}  // namespace indexcache
