#include <limits>

#include "csrc/ops/dispatch.h"

namespace indexcache {

using ops::Check;

TensorView topk(Context& ctx, const TensorView& logits, const TensorView& starts, const TensorView& ends, int64_t k,
                const MaybeView& out) {
  const Check check("topk", logits);
  check.tensor("logits", logits, {DType::f32}, {"rows", "columns"}, {.dense_from = 1});
  const int64_t rows = logits.size(0);
  check.tensor("starts", starts, {DType::i32}, {rows});
  check.tensor("ends", ends, {DType::i32}, {rows});
  check.at_least("k", k, 1);
  check.at_most("columns", logits.size(1), std::numeric_limits<int32_t>::max());
  const TensorView result = check.result(ctx, "out", out, DType::i32, {rows, k});
  if (rows == 0) return result;
  const TopkParams params{.logits = logits.as<float>(),
                          .rows = rows,
                          .columns = logits.size(1),
                          .row_stride = logits.stride(0),
                          .starts = starts.as<int32_t>(),
                          .ends = ends.as<int32_t>(),
                          .k = k,
                          .out = result.as<int32_t>()};
  ops::launch(check, ctx, {.k = k, .dtype = DType::f32}, params, INDEXCACHE_SM90_KERNELS(topk));
  return result;
}

TensorView to_slots(Context& ctx, const TensorView& indices, const TensorView& block_table, const TensorView& requests,
                    int64_t page_size, const MaybeView& out) {
  const Check check("to_slots", indices);
  check.tensor("indices", indices, {DType::i32}, {"tokens", "k"});
  const int64_t tokens = indices.size(0), k = indices.size(1);
  check.tensor("block_table", block_table, {DType::i32}, {"requests", "pages"});
  check.tensor("requests", requests, {DType::i32}, {tokens});
  check.at_least("page_size", page_size, 1);
  const TensorView result = check.result(ctx, "out", out, DType::i32, {tokens, k});
  if (tokens * k == 0) return result;
  const ToSlotsParams params{.indices = indices.as<int32_t>(),
                             .tokens = tokens,
                             .k = k,
                             .block_table = block_table.as<int32_t>(),
                             .requests = block_table.size(0),
                             .table_pages = block_table.size(1),
                             .request = requests.as<int32_t>(),
                             .page_size = page_size,
                             .slots = result.as<int32_t>()};
  ops::launch(check, ctx, {.k = k, .dtype = DType::i32}, params, INDEXCACHE_KERNELS(to_slots));
  return result;
}

}  // namespace indexcache
