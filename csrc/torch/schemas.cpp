// Every schema of torch.ops.indexcache, and nothing else. They are public API: see README.md before changing one.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(indexcache, m) {
  // Quantisation
  m.def(
      "quantize_index_q(Tensor q, Tensor weights, Tensor? cos_sin, Tensor? positions, *, float scale, "
      "bool interleaved=False, bool hadamard=False, bool ue8m0=False) -> (Tensor, Tensor)");
  m.def(
      "quantize_index_k(Tensor k, Tensor? norm_weight, Tensor? norm_bias, Tensor? cos_sin, Tensor? positions, *, "
      "float eps=1e-6, bool interleaved=False, bool hadamard=False, bool ue8m0=False) -> (Tensor, Tensor)");
  m.def(
      "store_index_k(Tensor k, Tensor? norm_weight, Tensor? norm_bias, Tensor? cos_sin, Tensor? positions, "
      "Tensor slots, Tensor(a!) index_k_cache, *, float eps=1e-6, bool interleaved=False, bool hadamard=False, "
      "bool ue8m0=False) -> ()");
  m.def("gather_index_k(Tensor index_k_cache, Tensor slots) -> (Tensor, Tensor)");
  m.def("store_latent_kv(Tensor kv, Tensor slots, Tensor(a!) kv_cache) -> ()");
  m.def("gather_latent_kv(Tensor kv_cache, Tensor slots) -> Tensor");

  // Indexer
  m.def(
      "indexer_logits(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor starts, Tensor ends) -> Tensor");
  m.def(
      "indexer_logits.out(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor starts, Tensor ends, *, "
      "Tensor(a!) out) -> ()");
  m.def(
      "indexer_logits_paged(Tensor q, Tensor index_k_cache, Tensor weights, Tensor context_lens, "
      "Tensor block_table, SymInt max_context_len) -> Tensor");
  m.def(
      "indexer_logits_paged.out(Tensor q, Tensor index_k_cache, Tensor weights, Tensor context_lens, "
      "Tensor block_table, SymInt max_context_len, *, Tensor(a!) out) -> ()");
  m.def("topk(Tensor logits, Tensor starts, Tensor ends, SymInt k) -> Tensor");
  m.def("topk.out(Tensor logits, Tensor starts, Tensor ends, SymInt k, *, Tensor(a!) out) -> ()");
  m.def(
      "topk_to_slots(Tensor logits, Tensor starts, Tensor ends, SymInt k, Tensor block_table, Tensor requests, "
      "SymInt page_size) -> Tensor");
  m.def(
      "topk_to_slots.out(Tensor logits, Tensor starts, Tensor ends, SymInt k, Tensor block_table, Tensor requests, "
      "SymInt page_size, *, Tensor(a!) out) -> ()");
  m.def("topk_reads(Tensor logits, Tensor starts, Tensor ends, SymInt k) -> Tensor");
  m.def(
      "indexer_topk(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor starts, Tensor ends, SymInt topk) "
      "-> Tensor");
  m.def(
      "indexer_topk.out(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor starts, Tensor ends, "
      "SymInt topk, *, Tensor(a!) out) -> ()");
  m.def(
      "indexer_topk_paged(Tensor q, Tensor index_k_cache, Tensor weights, Tensor context_lens, Tensor block_table, "
      "SymInt topk) -> Tensor");
  m.def(
      "indexer_topk_paged.out(Tensor q, Tensor index_k_cache, Tensor weights, Tensor context_lens, "
      "Tensor block_table, SymInt topk, *, Tensor(a!) out) -> ()");
  m.def("to_slots(Tensor indices, Tensor block_table, Tensor requests, SymInt page_size) -> Tensor");
  m.def(
      "to_slots.out(Tensor indices, Tensor block_table, Tensor requests, SymInt page_size, *, Tensor(a!) out) -> ()");

  // Attention
  m.def(
      "sparse_mla(Tensor q, Tensor kv, Tensor indices, float sm_scale, SymInt d_v=512, Tensor? sink=None, "
      "Tensor? lengths=None) -> (Tensor, Tensor)");
  m.def(
      "sparse_mla.out(Tensor q, Tensor kv, Tensor indices, float sm_scale, SymInt d_v=512, Tensor? sink=None, "
      "Tensor? lengths=None, *, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "sparse_mla_paged(Tensor q, Tensor kv_cache, Tensor slots, float sm_scale, Tensor? sink=None, "
      "Tensor? lengths=None) -> (Tensor, Tensor)");
  m.def(
      "sparse_mla_paged.out(Tensor q, Tensor kv_cache, Tensor slots, float sm_scale, Tensor? sink=None, "
      "Tensor? lengths=None, *, Tensor(a!) out, Tensor(b!) lse) -> ()");
}
