// Checked indexer calls, shared by the ops that return logits and those that go on to select.
#pragma once

#include "csrc/ops/check.h"

namespace indexcache::ops {

/// Parameters of one dense call; `logits` is still to be set.
IndexerLogitsParams indexer_params(const Check& check, const TensorView& q, const TensorView& k,
                                   const TensorView& k_scale, const TensorView& weights, const TensorView& starts,
                                   const TensorView& ends);

/// Parameters of one paged call; `logits` and `columns` are still to be set.
IndexerLogitsPagedParams indexer_paged_params(const Check& check, const TensorView& q, const TensorView& index_k_cache,
                                              const TensorView& weights, const TensorView& context_lens,
                                              const TensorView& block_table);

}  // namespace indexcache::ops
