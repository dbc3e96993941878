#include <bit>

#include "csrc/ops/dispatch.h"

namespace indexcache {
namespace {

using ops::Check;

/// Checks what q and k share: rotary table with positions, and the Hadamard size.
IndexTransform transform(const Check& check, int64_t tokens, int64_t dim, const MaybeView& cos_sin,
                         const MaybeView& positions, const QuantizeOptions& options) {
  IndexTransform result;
  result.hadamard = options.hadamard;
  result.ue8m0 = options.ue8m0;
  if (cos_sin.has_value() != positions.has_value()) {
    check.fail(cos_sin ? "positions" : "cos_sin", "given together with the other", "None");
  }
  if (cos_sin) {
    check.tensor("cos_sin", *cos_sin, {DType::f32}, {"max_position", "rot"});
    check.tensor("positions", *positions, {DType::i32, DType::i64}, {tokens});
    const int64_t rot = cos_sin->size(1);
    if (rot % 2 != 0 || rot > dim) {
      check.fail("cos_sin", "of an even width up to the head dim " + std::to_string(dim), to_string(*cos_sin));
    }
    result.rope = {cos_sin->as<float>(), cos_sin->size(0), ops::narrow(rot), options.interleaved,
                   ops::int_array(*positions)};
  }
  if (options.hadamard && !std::has_single_bit(static_cast<uint64_t>(dim))) {
    check.fail("hadamard", "False for a head dim that is no power of two", "True with head dim " + std::to_string(dim));
  }
  return result;
}

/// The checks and parameters that quantize_index_k and store_index_k share.
QuantizeIndexKParams key_params(const Check& check, const TensorView& k, const MaybeView& norm_weight,
                                const MaybeView& norm_bias, const MaybeView& cos_sin, const MaybeView& positions,
                                double eps, const QuantizeOptions& options) {
  check.tensor("k", k, {DType::bf16, DType::f32}, {"keys", "dim"});
  const int64_t tokens = k.size(0), dim = k.size(1);
  check.at_least("dim", dim, 1);
  check.tensor("norm_weight", norm_weight, {DType::f32}, {dim});
  check.tensor("norm_bias", norm_bias, {DType::f32}, {dim});
  if (norm_bias && !norm_weight) check.fail("norm_weight", "given where norm_bias is", "None");
  return {.k = k.data,
          .dtype = k.dtype,
          .tokens = tokens,
          .dim = ops::narrow(dim),
          .norm_weight = ops::pointer_or_null<float>(norm_weight),
          .norm_bias = ops::pointer_or_null<float>(norm_bias),
          .eps = static_cast<float>(eps),
          .transform = transform(check, tokens, dim, cos_sin, positions, options),
          .k8 = nullptr,
          .k_scale = nullptr,
          .cache = {},
          .slots = {}};
}

void run(const Check& check, Context& ctx, const QuantizeIndexKParams& params) {
  if (params.tokens == 0) return;
  ops::launch(check, ctx, {.dim = params.dim, .dtype = params.dtype}, params, INDEXCACHE_KERNELS(quantize_index_k));
}

}  // namespace

Pair quantize_index_q(Context& ctx, const TensorView& q, const TensorView& weights, const MaybeView& cos_sin,
                      const MaybeView& positions, double scale, QuantizeOptions options) {
  const Check check("quantize_index_q", q);
  check.tensor("q", q, {DType::bf16, DType::f32}, {"tokens", "heads", "dim"});
  const int64_t tokens = q.size(0), heads = q.size(1), dim = q.size(2);
  check.at_least("dim", dim, 1);
  check.tensor("weights", weights, {DType::f32}, {tokens, heads});
  const IndexTransform options_checked = transform(check, tokens, dim, cos_sin, positions, options);
  const Pair result{check.result(ctx, "q8", {}, DType::e4m3, {tokens, heads, dim}),
                    check.result(ctx, "folded_weights", {}, DType::f32, {tokens, heads})};
  if (tokens * heads == 0) return result;
  const QuantizeIndexQParams params{.q = q.data,
                                    .dtype = q.dtype,
                                    .tokens = tokens,
                                    .heads = ops::narrow(heads),
                                    .dim = ops::narrow(dim),
                                    .weights = weights.as<float>(),
                                    .transform = options_checked,
                                    .scale = static_cast<float>(scale),
                                    .q8 = result.first.as<uint8_t>(),
                                    .folded = result.second.as<float>()};
  ops::launch(check, ctx, {.heads = heads, .dim = dim, .dtype = q.dtype}, params, INDEXCACHE_KERNELS(quantize_index_q));
  return result;
}

Pair quantize_index_k(Context& ctx, const TensorView& k, const MaybeView& norm_weight, const MaybeView& norm_bias,
                      const MaybeView& cos_sin, const MaybeView& positions, double eps, QuantizeOptions options) {
  const Check check("quantize_index_k", k);
  QuantizeIndexKParams params = key_params(check, k, norm_weight, norm_bias, cos_sin, positions, eps, options);
  const Pair result{check.result(ctx, "k8", {}, DType::e4m3, {params.tokens, k.size(1)}),
                    ctx.output(DType::f32, {{params.tokens}}, k.device)};
  params.k8 = result.first.as<uint8_t>();
  params.k_scale = result.second.as<float>();
  run(check, ctx, params);
  return result;
}

void store_index_k(Context& ctx, const TensorView& k, const MaybeView& norm_weight, const MaybeView& norm_bias,
                   const MaybeView& cos_sin, const MaybeView& positions, const TensorView& slots,
                   const TensorView& index_k_cache, double eps, QuantizeOptions options) {
  const Check check("store_index_k", k);
  QuantizeIndexKParams params = key_params(check, k, norm_weight, norm_bias, cos_sin, positions, eps, options);
  check.tensor("slots", slots, {DType::i32, DType::i64}, {params.tokens});
  params.cache = check.cache("index_k_cache", index_k_cache, kIndexPage, k.size(1) + 4);
  params.slots = ops::int_array(slots);
  run(check, ctx, params);
}

Pair gather_index_k(Context& ctx, const TensorView& index_k_cache, const TensorView& slots) {
  const Check check("gather_index_k", index_k_cache);
  if (index_k_cache.rank != 3 || index_k_cache.size(2) < 5) {
    check.fail("index_k_cache", "uint8 [pages, 64, dim + 4]", to_string(index_k_cache));
  }
  const int64_t dim = index_k_cache.size(2) - 4;
  const PagedCache cache = check.cache("index_k_cache", index_k_cache, kIndexPage, dim + 4);
  check.tensor("slots", slots, {DType::i32, DType::i64}, {"rows"});
  const int64_t rows = slots.size(0);
  const Pair result{check.result(ctx, "k8", {}, DType::e4m3, {rows, dim}),
                    ctx.output(DType::f32, {{rows}}, slots.device)};
  if (rows == 0) return result;
  const GatherIndexKParams params{.cache = cache,
                                  .slots = ops::int_array(slots),
                                  .rows = rows,
                                  .dim = ops::narrow(dim),
                                  .k8 = result.first.as<uint8_t>(),
                                  .k_scale = result.second.as<float>()};
  ops::launch(check, ctx, {.dim = dim, .dtype = DType::u8}, params, INDEXCACHE_KERNELS(gather_index_k));
  return result;
}

}  // namespace indexcache
