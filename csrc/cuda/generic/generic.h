// The generic CUDA backend: any device from sm_80, any dims. Short and readable; the oracle of the fast kernels.
// Every function launches on `stream` of the current device and returns; a failed launch throws Error.
#pragma once

#include "indexcache/params.h"

struct CUstream_st;

namespace indexcache::generic {

using Stream = CUstream_st*;

void quantize_index_q(const QuantizeIndexQParams& p, Stream stream);
void quantize_index_k(const QuantizeIndexKParams& p, Stream stream);
void gather_index_k(const GatherIndexKParams& p, Stream stream);
void store_latent_kv(const StoreLatentKvParams& p, Stream stream);
void gather_latent_kv(const GatherLatentKvParams& p, Stream stream);
void indexer_logits(const IndexerLogitsParams& p, Stream stream);
void indexer_logits_paged(const IndexerLogitsPagedParams& p, Stream stream);
void topk(const TopkParams& p, Stream stream);
void to_slots(const ToSlotsParams& p, Stream stream);
void sparse_mla(const SparseMlaParams& p, Stream stream);

}  // namespace indexcache::generic
