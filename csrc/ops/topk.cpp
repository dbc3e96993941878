#include <algorithm>
#include <limits>

#include "csrc/ops/dispatch.h"

namespace indexcache {
namespace {

using ops::Check;

/// The arguments of every selection among given logits; where the result goes is the caller's.
TopkParams selection(const Check& check, const TensorView& logits, const TensorView& starts, const TensorView& ends,
                     int64_t k) {
  check.tensor("logits", logits, {DType::bf16, DType::f32}, {"rows", "columns"}, {.dense_from = 1});
  const int64_t rows = logits.size(0);
  check.tensor("starts", starts, {DType::i32}, {rows});
  check.tensor("ends", ends, {DType::i32}, {rows});
  check.at_least("k", k, 1);
  check.at_most("columns", logits.size(1), std::numeric_limits<int32_t>::max());
  return {.logits = logits.data,
          .dtype = logits.dtype,
          .rows = rows,
          .columns = logits.size(1),
          .row_stride = logits.stride(0),
          .starts = starts.as<int32_t>(),
          .ends = ends.as<int32_t>(),
          .k = k};
}

/// The table for `rows` rows of positions.
SlotTable slot_table(const Check& check, const TensorView& block_table, const TensorView& requests, int64_t rows,
                     int64_t page_size) {
  check.tensor("block_table", block_table, {DType::i32}, {"requests", "pages"});
  check.tensor("requests", requests, {DType::i32}, {rows});
  check.at_least("page_size", page_size, 1);
  return {.block_table = block_table.as<int32_t>(),
          .requests = block_table.size(0),
          .table_pages = block_table.size(1),
          .page_size = page_size,
          .request = requests.as<int32_t>()};
}

CallShape shape_of(const TopkParams& params) { return {.k = params.k, .dtype = params.dtype}; }

}  // namespace

TensorView topk(Context& ctx, const TensorView& logits, const TensorView& starts, const TensorView& ends, int64_t k,
                const MaybeView& out) {
  const Check check("topk", logits);
  TopkParams params = selection(check, logits, starts, ends, k);
  const TensorView result = check.result(ctx, "out", out, DType::i32, {params.rows, k});
  if (params.rows == 0) return result;
  params.out = result.as<int32_t>();
  ops::launch(check, ctx, shape_of(params), params, INDEXCACHE_SM90_KERNELS(topk));
  return result;
}

TensorView topk_to_slots(Context& ctx, const TensorView& logits, const TensorView& starts, const TensorView& ends,
                         int64_t k, const TensorView& block_table, const TensorView& requests, int64_t page_size,
                         const MaybeView& out) {
  const Check check("topk_to_slots", logits);
  TopkParams params = selection(check, logits, starts, ends, k);
  params.slots = slot_table(check, block_table, requests, params.rows, page_size);
  const TensorView result = check.result(ctx, "out", out, DType::i32, {params.rows, k});
  if (params.rows == 0) return result;
  // An empty table may come as a null pointer, which asks for columns. None of it is read: any other pointer will do.
  if (params.slots.block_table == nullptr) params.slots.block_table = params.slots.request;
  params.out = result.as<int32_t>();
  ops::launch(check, ctx, shape_of(params), params, INDEXCACHE_SM90_KERNELS(topk));
  return result;
}

TensorView topk_reads(Context& ctx, const TensorView& logits, const TensorView& starts, const TensorView& ends,
                      int64_t k) {
  const Check check("topk_reads", logits);
  TopkParams params = selection(check, logits, starts, ends, k);
  const TensorView result = check.result(ctx, "out", {}, DType::i32, {params.rows});
  if (params.rows == 0) return result;
  const CallShape shape = shape_of(params);
  // The selection is thrown away. A k past the columns only adds -1 to it, and could ask for any amount of memory.
  params.k = std::min(k, std::max<int64_t>(1, params.columns));
  const int64_t bytes = params.rows * params.k * static_cast<int64_t>(sizeof(int32_t));
  params.out = static_cast<int32_t*>(ctx.scratch(bytes, check.device()));
  params.reads = result.as<int32_t>();
  ops::launch(check, ctx, shape, params, INDEXCACHE_SM90_KERNELS(topk));
  return result;
}

TensorView to_slots(Context& ctx, const TensorView& indices, const TensorView& block_table, const TensorView& requests,
                    int64_t page_size, const MaybeView& out) {
  const Check check("to_slots", indices);
  check.tensor("indices", indices, {DType::i32}, {"tokens", "k"});
  const int64_t tokens = indices.size(0), k = indices.size(1);
  const SlotTable table = slot_table(check, block_table, requests, tokens, page_size);
  const TensorView result = check.result(ctx, "out", out, DType::i32, {tokens, k});
  if (tokens * k == 0) return result;
  const ToSlotsParams params{.indices = indices.as<int32_t>(),
                             .tokens = tokens,
                             .k = k,
                             .table = table,
                             .slots = result.as<int32_t>()};
  ops::launch(check, ctx, {.k = k, .dtype = DType::i32}, params, INDEXCACHE_KERNELS(to_slots));
  return result;
}

}  // namespace indexcache
