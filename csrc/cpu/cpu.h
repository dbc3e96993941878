// The CPU backend: one function per kernel family, threaded through ctx.parallel_for.
#pragma once

#include "indexcache/context.h"
#include "indexcache/params.h"

namespace indexcache::cpu {

void quantize_index_q(const QuantizeIndexQParams& p, Context& ctx);
void quantize_index_k(const QuantizeIndexKParams& p, Context& ctx);
void gather_index_k(const GatherIndexKParams& p, Context& ctx);
void store_latent_kv(const StoreLatentKvParams& p, Context& ctx);
void gather_latent_kv(const GatherLatentKvParams& p, Context& ctx);
void indexer_logits(const IndexerLogitsParams& p, Context& ctx);
void indexer_logits_paged(const IndexerLogitsPagedParams& p, Context& ctx);
void topk(const TopkParams& p, Context& ctx);
void to_slots(const ToSlotsParams& p, Context& ctx);
void sparse_mla(const SparseMlaParams& p, Context& ctx);

/// "avx512_bf16", "avx512", "avx2" or "baseline": the best that this machine runs, or what INDEXCACHE_CPU_ISA lowers it
/// to.
const char* instruction_set();

}  // namespace indexcache::cpu
