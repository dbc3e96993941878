#include "csrc/ops/dispatch.h"

namespace indexcache {

using ops::Check;

void store_latent_kv(Context& ctx, const TensorView& kv, const TensorView& slots, const TensorView& kv_cache) {
  const Check check("store_latent_kv", kv);
  check.tensor("kv", kv, {DType::bf16, DType::f32}, {"tokens", kLatentDim + kRopeDim}, {.dense_from = 1});
  const int64_t tokens = kv.size(0);
  check.tensor("slots", slots, {DType::i32, DType::i64}, {tokens});
  const PagedCache cache = check.cache("kv_cache", kv_cache, -1, kLatentBytes);
  if (tokens == 0) return;
  const StoreLatentKvParams params{.kv = kv.data,
                                   .dtype = kv.dtype,
                                   .tokens = tokens,
                                   .row_stride = kv.stride(0),
                                   .slots = ops::int_array(slots),
                                   .cache = cache};
  ops::launch(check, ctx, {.dim = kLatentDim + kRopeDim, .dtype = kv.dtype}, params,
              INDEXCACHE_KERNELS(store_latent_kv));
}

TensorView gather_latent_kv(Context& ctx, const TensorView& kv_cache, const TensorView& slots) {
  const Check check("gather_latent_kv", kv_cache);
  const PagedCache cache = check.cache("kv_cache", kv_cache, -1, kLatentBytes);
  check.tensor("slots", slots, {DType::i32, DType::i64}, {"rows"});
  const int64_t rows = slots.size(0);
  const TensorView kv = check.result(ctx, "kv", {}, DType::bf16, {rows, kLatentDim + kRopeDim});
  if (rows == 0) return kv;
  const GatherLatentKvParams params{
      .cache = cache, .slots = ops::int_array(slots), .rows = rows, .kv = kv.as<uint16_t>()};
  ops::launch(check, ctx, {.dim = kLatentDim + kRopeDim, .dtype = DType::u8}, params,
              INDEXCACHE_KERNELS(gather_latent_kv));
  return kv;
}

}  // namespace indexcache
