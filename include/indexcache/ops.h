// The ops: one function each, the same contract as the torch schema (see README.md for the table).
//
// Every function checks its arguments, throws Error before any launch, allocates its results through `ctx` unless the
// caller passes `out`, picks a backend from device and shape, and launches on ctx.stream(). Symbols: T query tokens,
// N key rows, H indexer heads, D index head dim, K entries per query, h attention heads. e4m3 = float8_e4m3fn.
//
// Window: query t sees columns max(0, starts[t]) <= n < min(N, ends[t]). Index: a row number; anything outside [0, N)
// means "no token" and is never read. Slot: page * page_size + offset of a paged cache, under the same rule.
#pragma once

#include <cstdint>
#include <optional>

#include "indexcache/context.h"
#include "indexcache/error.h"
#include "indexcache/tensor_view.h"

namespace indexcache {

using MaybeView = std::optional<TensorView>;

struct Pair {
  TensorView first, second;
};

// --- Quantisation -------------------------------------------------------------------------------------------------
// scale = max(amax, 1e-4) / 448 per vector; value = e4m3(x / scale), nearest-even, saturating.
// A vector with a NaN or an infinity, or whose position is outside the table, gets NaN bytes and a NaN scale:
// its scores are NaN, and NaN is never selected.

struct QuantizeOptions {
  bool interleaved = false;  // RoPE pairs (0,1), (2,3), … instead of (i, i + rot/2)
  bool hadamard = false;     // Walsh-Hadamard transform times D^-0.5; D must be a power of two
  bool ue8m0 = false;        // scale rounded up to a power of two
};

/// q [T,H,D] bf16/f32, weights [T,H] f32, cos_sin [max_position, rot] f32 with positions [T] i32/i64, or neither.
/// Returns q8 [T,H,D] e4m3 and folded weights [T,H] f32 = weights * q_scale * scale.
Pair quantize_index_q(Context& ctx, const TensorView& q, const TensorView& weights, const MaybeView& cos_sin,
                      const MaybeView& positions, double scale, QuantizeOptions options);

/// k [N,D] bf16/f32; LayerNorm (f32) if norm_weight [D] is given, RoPE, Hadamard. Returns k8 [N,D] e4m3, k_scale [N] f32.
Pair quantize_index_k(Context& ctx, const TensorView& k, const MaybeView& norm_weight, const MaybeView& norm_bias,
                      const MaybeView& cos_sin, const MaybeView& positions, double eps, QuantizeOptions options);

/// The same, written to slots [N] of index_k_cache u8 [pages, 64, D + 4]; a slot outside the cache is skipped.
void store_index_k(Context& ctx, const TensorView& k, const MaybeView& norm_weight, const MaybeView& norm_bias,
                   const MaybeView& cos_sin, const MaybeView& positions, const TensorView& slots,
                   const TensorView& index_k_cache, double eps, QuantizeOptions options);

/// k8 [M,D] e4m3 and k_scale [M] f32 of slots [M]; a slot outside the cache gives zeros.
Pair gather_index_k(Context& ctx, const TensorView& index_k_cache, const TensorView& slots);

/// kv [M,576] bf16/f32 into slots [M] of kv_cache u8 [pages, page_size, 656]; scales f32, one per 128 latent values.
void store_latent_kv(Context& ctx, const TensorView& kv, const TensorView& slots, const TensorView& kv_cache);

/// Dequantised bf16 [M,576] of slots [M]; a slot outside the cache gives zeros.
TensorView gather_latent_kv(Context& ctx, const TensorView& kv_cache, const TensorView& slots);

// --- Indexer ------------------------------------------------------------------------------------------------------
// score(t,n) = k_scale[n] * sum_h weights[t,h] * max(0, q[t,h,:] . k[n,:]), products and head sum in f32.

/// q [T,H,D] e4m3, k [N,D] e4m3, k_scale [N] f32, weights [T,H] f32, starts/ends [T] i32 -> f32 [T,N], -inf outside.
TensorView indexer_logits(Context& ctx, const TensorView& q, const TensorView& k, const TensorView& k_scale,
                          const TensorView& weights, const TensorView& starts, const TensorView& ends,
                          const MaybeView& out = {});

/// q [B,n,H,D] e4m3, index_k_cache u8 [pages,64,D+4], weights [B,n,H] f32, context_lens [B,n] i32, block_table [B,P] i32
/// -> f32 [B,n,max_context_len], -inf past the length and where the block table names no page of the cache.
TensorView indexer_logits_paged(Context& ctx, const TensorView& q, const TensorView& index_k_cache,
                                const TensorView& weights, const TensorView& context_lens,
                                const TensorView& block_table, int64_t max_context_len, const MaybeView& out = {});

/// logits f32 or bf16 [R,L] (any row stride), starts/ends [R] i32 -> i32 [R,k]: the k best columns of the window by
/// (value descending, column ascending), listed in ascending column order, then -1. NaN and -inf are never selected.
TensorView topk(Context& ctx, const TensorView& logits, const TensorView& starts, const TensorView& ends, int64_t k,
                const MaybeView& out = {});

/// Equals to_slots(topk(logits, starts, ends, k), block_table, requests, page_size), in one launch: i32 [R,k] slots in
/// the order of their columns, by block_table i32 [B,P] and requests i32 [R]; -1 where a row or its table has none.
TensorView topk_to_slots(Context& ctx, const TensorView& logits, const TensorView& starts, const TensorView& ends,
                         int64_t k, const TensorView& block_table, const TensorView& requests, int64_t page_size,
                         const MaybeView& out = {});

/// -> i32 [R]: how many times the kernel that serves topk() of these arguments reads each row, 1 on its fast path.
/// A diagnostic: the values are the backend's own, and no contract.
TensorView topk_reads(Context& ctx, const TensorView& logits, const TensorView& starts, const TensorView& ends,
                      int64_t k);

/// Equals topk(indexer_logits(…)) bit for bit, with at most 256 MiB of scratch.
TensorView indexer_topk(Context& ctx, const TensorView& q, const TensorView& k, const TensorView& k_scale,
                        const TensorView& weights, const TensorView& starts, const TensorView& ends, int64_t topk,
                        const MaybeView& out = {});

/// -> i32 [B,n,topk]: positions inside each request, the same guarantee.
TensorView indexer_topk_paged(Context& ctx, const TensorView& q, const TensorView& index_k_cache,
                              const TensorView& weights, const TensorView& context_lens, const TensorView& block_table,
                              int64_t topk, const MaybeView& out = {});

/// indices i32 [T,K]: positions inside request requests[t] (i32 [T]) -> slots i32 [T,K] by block_table i32 [B,P];
/// -1 for a negative position, one past the table, a negative page, a request outside [0,B), a slot past 2^31 - 1.
TensorView to_slots(Context& ctx, const TensorView& indices, const TensorView& block_table, const TensorView& requests,
                    int64_t page_size, const MaybeView& out = {});

// --- Attention ----------------------------------------------------------------------------------------------------
// s = sm_scale * q . kv over the row's valid indices, softmax, out = sum p * kv[:d_v]; lse is natural-log.
// No valid key: out = 0, lse = -inf. sink multiplies out by e^lse / (e^lse + e^sink) and leaves lse alone.

struct AttentionOut {
  MaybeView out, lse;
};

/// q [T,h,d_qk] bf16/f32, kv [N,d_qk] of q's dtype, indices i32 [T,K], sink f32 [h], lengths i32 [T]
/// -> out [T,h,d_v] of q's dtype, lse f32 [T,h].
Pair sparse_mla(Context& ctx, const TensorView& q, const TensorView& kv, const TensorView& indices, double sm_scale,
                int64_t d_v, const MaybeView& sink, const MaybeView& lengths, const AttentionOut& out = {});

/// The same over the bf16 rows that gather_latent_kv makes of kv_cache u8 [pages, page_size, 656], by slots i32 [T,K]:
/// d_qk = 576, d_v = 512.
Pair sparse_mla_paged(Context& ctx, const TensorView& q, const TensorView& kv_cache, const TensorView& slots,
                      double sm_scale, const MaybeView& sink, const MaybeView& lengths, const AttentionOut& out = {});

}  // namespace indexcache
