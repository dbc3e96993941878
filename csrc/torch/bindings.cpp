// The ops for torch: each function converts its arguments, calls the op and hands back what it allocated. The same
// functions serve the CPU and the CUDA dispatch key; the op itself chooses the backend.
#include <tuple>

#include "csrc/torch/context.h"

namespace indexcache::torch_binding {
namespace {

using MaybeTensor = std::optional<Tensor>;
using TensorPair = std::tuple<Tensor, Tensor>;

Tensor single(const TorchContext& ctx) { return ctx.result(0); }
TensorPair pair(const TorchContext& ctx) { return {ctx.result(0), ctx.result(1)}; }

// --- Quantisation -------------------------------------------------------------------------------------------------

TensorPair quantize_index_q_op(Tensor q, Tensor weights, MaybeTensor cos_sin, MaybeTensor positions, double scale,
                               bool interleaved, bool hadamard, bool ue8m0) {
  TorchContext ctx;
  quantize_index_q(ctx, view(q), view(weights), view(cos_sin), view(positions), scale, {interleaved, hadamard, ue8m0});
  return pair(ctx);
}

TensorPair quantize_index_k_op(Tensor k, MaybeTensor norm_weight, MaybeTensor norm_bias, MaybeTensor cos_sin,
                               MaybeTensor positions, double eps, bool interleaved, bool hadamard, bool ue8m0) {
  TorchContext ctx;
  quantize_index_k(ctx, view(k), view(norm_weight), view(norm_bias), view(cos_sin), view(positions), eps,
                   {interleaved, hadamard, ue8m0});
  return pair(ctx);
}

void store_index_k_op(Tensor k, MaybeTensor norm_weight, MaybeTensor norm_bias, MaybeTensor cos_sin,
                      MaybeTensor positions, Tensor slots, Tensor index_k_cache, double eps, bool interleaved,
                      bool hadamard, bool ue8m0) {
  TorchContext ctx;
  store_index_k(ctx, view(k), view(norm_weight), view(norm_bias), view(cos_sin), view(positions), view(slots),
                view(index_k_cache), eps, {interleaved, hadamard, ue8m0});
}

TensorPair gather_index_k_op(Tensor index_k_cache, Tensor slots) {
  TorchContext ctx;
  gather_index_k(ctx, view(index_k_cache), view(slots));
  return pair(ctx);
}

void store_latent_kv_op(Tensor kv, Tensor slots, Tensor kv_cache) {
  TorchContext ctx;
  store_latent_kv(ctx, view(kv), view(slots), view(kv_cache));
}

Tensor gather_latent_kv_op(Tensor kv_cache, Tensor slots) {
  TorchContext ctx;
  gather_latent_kv(ctx, view(kv_cache), view(slots));
  return single(ctx);
}

// --- Indexer ------------------------------------------------------------------------------------------------------

Tensor indexer_logits_op(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor starts, Tensor ends) {
  TorchContext ctx;
  indexer_logits(ctx, view(q), view(k), view(k_scale), view(weights), view(starts), view(ends));
  return single(ctx);
}

void indexer_logits_out(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor starts, Tensor ends, Tensor out) {
  TorchContext ctx;
  indexer_logits(ctx, view(q), view(k), view(k_scale), view(weights), view(starts), view(ends), view(out));
}

Tensor indexer_logits_paged_op(Tensor q, Tensor index_k_cache, Tensor weights, Tensor context_lens, Tensor block_table,
                               int64_t max_context_len) {
  TorchContext ctx;
  indexer_logits_paged(ctx, view(q), view(index_k_cache), view(weights), view(context_lens), view(block_table),
                       max_context_len);
  return single(ctx);
}

void indexer_logits_paged_out(Tensor q, Tensor index_k_cache, Tensor weights, Tensor context_lens, Tensor block_table,
                              int64_t max_context_len, Tensor out) {
  TorchContext ctx;
  indexer_logits_paged(ctx, view(q), view(index_k_cache), view(weights), view(context_lens), view(block_table),
                       max_context_len, view(out));
}

Tensor topk_op(Tensor logits, Tensor starts, Tensor ends, int64_t k) {
  TorchContext ctx;
  topk(ctx, view(logits), view(starts), view(ends), k);
  return single(ctx);
}

void topk_out(Tensor logits, Tensor starts, Tensor ends, int64_t k, Tensor out) {
  TorchContext ctx;
  topk(ctx, view(logits), view(starts), view(ends), k, view(out));
}

Tensor topk_to_slots_op(Tensor logits, Tensor starts, Tensor ends, int64_t k, Tensor block_table, Tensor requests,
                        int64_t page_size) {
  TorchContext ctx;
  topk_to_slots(ctx, view(logits), view(starts), view(ends), k, view(block_table), view(requests), page_size);
  return single(ctx);
}

void topk_to_slots_out(Tensor logits, Tensor starts, Tensor ends, int64_t k, Tensor block_table, Tensor requests,
                       int64_t page_size, Tensor out) {
  TorchContext ctx;
  topk_to_slots(ctx, view(logits), view(starts), view(ends), k, view(block_table), view(requests), page_size,
                view(out));
}

Tensor topk_reads_op(Tensor logits, Tensor starts, Tensor ends, int64_t k) {
  TorchContext ctx;
  topk_reads(ctx, view(logits), view(starts), view(ends), k);
  return single(ctx);
}

Tensor indexer_topk_op(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor starts, Tensor ends, int64_t topk) {
  TorchContext ctx;
  indexer_topk(ctx, view(q), view(k), view(k_scale), view(weights), view(starts), view(ends), topk);
  return single(ctx);
}

void indexer_topk_out(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor starts, Tensor ends, int64_t topk,
                      Tensor out) {
  TorchContext ctx;
  indexer_topk(ctx, view(q), view(k), view(k_scale), view(weights), view(starts), view(ends), topk, view(out));
}

Tensor indexer_topk_paged_op(Tensor q, Tensor index_k_cache, Tensor weights, Tensor context_lens, Tensor block_table,
                             int64_t topk) {
  TorchContext ctx;
  indexer_topk_paged(ctx, view(q), view(index_k_cache), view(weights), view(context_lens), view(block_table), topk);
  return single(ctx);
}

void indexer_topk_paged_out(Tensor q, Tensor index_k_cache, Tensor weights, Tensor context_lens, Tensor block_table,
                            int64_t topk, Tensor out) {
  TorchContext ctx;
  indexer_topk_paged(ctx, view(q), view(index_k_cache), view(weights), view(context_lens), view(block_table), topk,
                     view(out));
}

Tensor to_slots_op(Tensor indices, Tensor block_table, Tensor requests, int64_t page_size) {
  TorchContext ctx;
  to_slots(ctx, view(indices), view(block_table), view(requests), page_size);
  return single(ctx);
}

void to_slots_out(Tensor indices, Tensor block_table, Tensor requests, int64_t page_size, Tensor out) {
  TorchContext ctx;
  to_slots(ctx, view(indices), view(block_table), view(requests), page_size, view(out));
}

// --- Attention ----------------------------------------------------------------------------------------------------

TensorPair sparse_mla_op(Tensor q, Tensor kv, Tensor indices, double sm_scale, int64_t d_v, MaybeTensor sink,
                         MaybeTensor lengths) {
  TorchContext ctx;
  sparse_mla(ctx, view(q), view(kv), view(indices), sm_scale, d_v, view(sink), view(lengths));
  return pair(ctx);
}

void sparse_mla_out(Tensor q, Tensor kv, Tensor indices, double sm_scale, int64_t d_v, MaybeTensor sink,
                    MaybeTensor lengths, Tensor out, Tensor lse) {
  TorchContext ctx;
  sparse_mla(ctx, view(q), view(kv), view(indices), sm_scale, d_v, view(sink), view(lengths), {view(out), view(lse)});
}

TensorPair sparse_mla_paged_op(Tensor q, Tensor kv_cache, Tensor slots, double sm_scale, MaybeTensor sink,
                               MaybeTensor lengths) {
  TorchContext ctx;
  sparse_mla_paged(ctx, view(q), view(kv_cache), view(slots), sm_scale, view(sink), view(lengths));
  return pair(ctx);
}

void sparse_mla_paged_out(Tensor q, Tensor kv_cache, Tensor slots, double sm_scale, MaybeTensor sink,
                          MaybeTensor lengths, Tensor out, Tensor lse) {
  TorchContext ctx;
  sparse_mla_paged(ctx, view(q), view(kv_cache), view(slots), sm_scale, view(sink), view(lengths),
                   {view(out), view(lse)});
}

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("quantize_index_q", TORCH_BOX(&quantize_index_q_op));
  m.impl("quantize_index_k", TORCH_BOX(&quantize_index_k_op));
  m.impl("store_index_k", TORCH_BOX(&store_index_k_op));
  m.impl("gather_index_k", TORCH_BOX(&gather_index_k_op));
  m.impl("store_latent_kv", TORCH_BOX(&store_latent_kv_op));
  m.impl("gather_latent_kv", TORCH_BOX(&gather_latent_kv_op));
  m.impl("indexer_logits", TORCH_BOX(&indexer_logits_op));
  m.impl("indexer_logits.out", TORCH_BOX(&indexer_logits_out));
  m.impl("indexer_logits_paged", TORCH_BOX(&indexer_logits_paged_op));
  m.impl("indexer_logits_paged.out", TORCH_BOX(&indexer_logits_paged_out));
  m.impl("topk", TORCH_BOX(&topk_op));
  m.impl("topk.out", TORCH_BOX(&topk_out));
  m.impl("topk_to_slots", TORCH_BOX(&topk_to_slots_op));
  m.impl("topk_to_slots.out", TORCH_BOX(&topk_to_slots_out));
  m.impl("topk_reads", TORCH_BOX(&topk_reads_op));
  m.impl("indexer_topk", TORCH_BOX(&indexer_topk_op));
  m.impl("indexer_topk.out", TORCH_BOX(&indexer_topk_out));
  m.impl("indexer_topk_paged", TORCH_BOX(&indexer_topk_paged_op));
  m.impl("indexer_topk_paged.out", TORCH_BOX(&indexer_topk_paged_out));
  m.impl("to_slots", TORCH_BOX(&to_slots_op));
  m.impl("to_slots.out", TORCH_BOX(&to_slots_out));
  m.impl("sparse_mla", TORCH_BOX(&sparse_mla_op));
  m.impl("sparse_mla.out", TORCH_BOX(&sparse_mla_out));
  m.impl("sparse_mla_paged", TORCH_BOX(&sparse_mla_paged_op));
  m.impl("sparse_mla_paged.out", TORCH_BOX(&sparse_mla_paged_out));
}

}  // namespace
}  // namespace indexcache::torch_binding

STABLE_TORCH_LIBRARY_IMPL(indexcache, CPU, m) { indexcache::torch_binding::register_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(indexcache, CUDA, m) { indexcache::torch_binding::register_ops(m); }
