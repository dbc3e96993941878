// The sm90 backend: kernels for compute capability 9.0 (H100, H200), where the support table sends a call to them.
// Every function launches on `stream` of the current device and returns; a failed launch throws Error.
#pragma once

#include "csrc/cuda/generic/generic.h"

namespace indexcache::sm90 {

using generic::Stream;

/// As the generic ones, for 8, 16, 32 or 64 heads of 64 or 128 dims.
void indexer_logits(const IndexerLogitsParams& p, Stream stream);
void indexer_logits_paged(const IndexerLogitsPagedParams& p, Stream stream);

/// As generic::topk, for k <= 2,048.
void topk(const TopkParams& p, Stream stream);

/// As generic::sparse_mla, for bf16, d_qk 576 or 512, d_v 512.
void sparse_mla(const SparseMlaParams& p, Stream stream);
/// Bytes that it wants at p.scratch.
int64_t sparse_mla_scratch(const SparseMlaParams& p);

}  // namespace indexcache::sm90
