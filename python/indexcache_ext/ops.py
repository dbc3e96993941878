"""The ops, one typed function each: thin calls of ``torch.ops.indexcache.<name>`` with the schema's names and defaults.

Symbols: T query tokens, N key rows, H indexer heads, D index head dim, K entries per query, h attention heads,
B requests, P pages of a request. e4m3 = ``torch.float8_e4m3fn``.

- Window: query t sees key columns ``max(0, starts[t]) <= n < min(N, ends[t])``; empty and inverted windows are legal.
- Index: a row number of the key tensor. Slot: ``page * page_size + offset``, a row of a paged cache. Anything outside
  the keys or the cache, -1 above all, means "no token" and is never read.
- Every op runs on the inputs' device (CPU or CUDA) and current stream, never synchronises, and leaves its inputs
  untouched except the caches and the ``out`` and ``lse`` buffers, which must be dense.
- Errors: a wrong dtype, rank, size, device or stride raises RuntimeError that names op, argument, expected and got.
  None of these ops has a backward: an input that requires grad while grad mode is on is refused by every op with a
  floating-point result.

Sources: IndexCache (arXiv 2603.12201); the DeepSeek-V3.2 report for the indexer and sparse attention; FlashMLA for the
656-byte latent row; DeepGEMM for the index-key page.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "gather_index_k", "gather_latent_kv", "indexer_logits", "indexer_logits_paged", "indexer_topk",
    "indexer_topk_paged", "quantize_index_k", "quantize_index_q", "sparse_mla", "sparse_mla_paged", "store_index_k",
    "store_latent_kv", "to_slots", "topk", "topk_reads", "topk_to_slots",
]  # fmt: skip

_ops = torch.ops.indexcache


# --- Quantisation -----------------------------------------------------------------------------------------------------


def quantize_index_q(
    q: Tensor, weights: Tensor, cos_sin: Tensor | None, positions: Tensor | None, *, scale: float,
    interleaved: bool = False, hadamard: bool = False, ue8m0: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """RoPE, optional Hadamard transform, and e4m3 quantisation of indexer queries, per token and head.

    The quantisation scale is ``max(amax, 1e-4) / 448`` of each D-vector. It is folded into the head weights, since
    ``relu(s * x) = s * relu(x)`` for s > 0, together with ``scale`` (the stock models use ``H**-0.5 * D**-0.5``).

    Args:
        q: bf16 or f32 [T, H, D].
        weights: f32 [T, H], the head gates.
        cos_sin: f32 [max_position, rot], cosines in the first half of the columns, sines in the second; rot is even
            and at most D, and the first rot dims are rotated. None: no RoPE.
        positions: int32 or int64 [T], rows of ``cos_sin``. Given together with it or not at all.
        scale: factor of the folded weights.
        interleaved: rotate the pairs (0, 1), (2, 3), … instead of (i, i + rot/2).
        hadamard: Walsh-Hadamard transform times ``D**-0.5`` before quantising; D must be a power of two.
        ue8m0: round the quantisation scale up to a power of two.

    Returns:
        q8 e4m3 [T, H, D] and folded weights f32 [T, H] = ``weights * q_scale * scale``. A vector with a NaN or an
        infinity, or at a position outside the table, becomes NaN throughout, and a NaN score is never selected.
    """
    return _ops.quantize_index_q.default(
        q, weights, cos_sin, positions, scale=scale, interleaved=interleaved, hadamard=hadamard, ue8m0=ue8m0
    )


def quantize_index_k(
    k: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, cos_sin: Tensor | None,
    positions: Tensor | None, *, eps: float = 1e-6, interleaved: bool = False, hadamard: bool = False,
    ue8m0: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """LayerNorm, RoPE, optional Hadamard transform, and e4m3 quantisation of index keys.

    Args:
        k: bf16 or f32 [N, D].
        norm_weight: f32 [D], or None for no LayerNorm.
        norm_bias: f32 [D] or None; needs ``norm_weight``.
        cos_sin, positions, interleaved, hadamard, ue8m0: as in :func:`quantize_index_q`, positions [N].
        eps: added to the variance in LayerNorm.

    Returns:
        k8 e4m3 [N, D] and k_scale f32 [N]; the key is ``k8 * k_scale``. Non-finite vectors as in
        :func:`quantize_index_q`.
    """
    return _ops.quantize_index_k.default(
        k, norm_weight, norm_bias, cos_sin, positions,
        eps=eps, interleaved=interleaved, hadamard=hadamard, ue8m0=ue8m0,
    )  # fmt: skip


def store_index_k(
    k: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, cos_sin: Tensor | None,
    positions: Tensor | None, slots: Tensor, index_k_cache: Tensor, *, eps: float = 1e-6, interleaved: bool = False,
    hadamard: bool = False, ue8m0: bool = False,
) -> None:  # fmt: skip
    """:func:`quantize_index_k` written into a paged cache, in place.

    Args:
        slots: int32 or int64 [N]; a slot outside the cache is skipped.
        index_k_cache: uint8 [pages, 64, D + 4], dense inside a page: 64 * D value bytes, then 64 f32 scales (the
            page of DeepGEMM and of the serving stacks).
    """
    _ops.store_index_k.default(
        k, norm_weight, norm_bias, cos_sin, positions, slots, index_k_cache,
        eps=eps, interleaved=interleaved, hadamard=hadamard, ue8m0=ue8m0,
    )  # fmt: skip


def gather_index_k(index_k_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Read index keys back from the paged cache.

    Args:
        index_k_cache: uint8 [pages, 64, D + 4], as in :func:`store_index_k`.
        slots: int32 or int64 [M].

    Returns:
        k8 e4m3 [M, D] and k_scale f32 [M]; zeros for a slot outside the cache.
    """
    return _ops.gather_index_k.default(index_k_cache, slots)


def store_latent_kv(kv: Tensor, slots: Tensor, kv_cache: Tensor) -> None:
    """Quantise latent rows into the paged 656-byte cache, in place.

    Args:
        kv: bf16 or f32 [M, 576]: 512 latent values, 64 rotary values.
        slots: int32 or int64 [M]; a slot outside the cache is skipped.
        kv_cache: uint8 [pages, page_size, 656], per token 512 e4m3 | 4 f32 scales, one per 128 latent values | 64 bf16
            (the FP8 layout of FlashMLA). Any page size.
    """
    _ops.store_latent_kv.default(kv, slots, kv_cache)


def gather_latent_kv(kv_cache: Tensor, slots: Tensor) -> Tensor:
    """Dequantised bf16 [M, 576] rows of ``kv_cache`` (see :func:`store_latent_kv`); zeros for a slot outside it.

    Args:
        kv_cache: uint8 [pages, page_size, 656].
        slots: int32 or int64 [M].
    """
    return _ops.gather_latent_kv.default(kv_cache, slots)


# --- Indexer ----------------------------------------------------------------------------------------------------------


def indexer_logits(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, starts: Tensor, ends: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Index scores ``k_scale[n] * sum_h weights[t, h] * relu(q[t, h] . k[n])`` (DeepSeek-V3.2 report, eq. 1).

    Args:
        q: e4m3 [T, H, D].
        k: e4m3 [N, D].
        k_scale: f32 [N].
        weights: f32 [T, H], the folded weights of :func:`quantize_index_q`.
        starts, ends: int32 [T], the window of each query.
        out: f32 [T, N] to write into.

    Returns:
        f32 [T, N], -inf outside the window. Products and head sum are in f32.
    """
    if out is None:
        return _ops.indexer_logits.default(q, k, k_scale, weights, starts, ends)
    _ops.indexer_logits.out(q, k, k_scale, weights, starts, ends, out=out)
    return out


def indexer_logits_paged(
    q: Tensor, index_k_cache: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor,
    max_context_len: int, *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`indexer_logits` against the paged cache, n queries for each of B requests.

    Args:
        q: e4m3 [B, n, H, D].
        index_k_cache: uint8 [pages, 64, D + 4], as in :func:`store_index_k`.
        weights: f32 [B, n, H].
        context_lens: int32 [B, n], the keys that query j of a request sees; none where <= 0.
        block_table: int32 [B, P], the pages of each request.
        max_context_len: columns of the result.
        out: f32 [B, n, max_context_len] to write into.

    Returns:
        f32 [B, n, max_context_len], -inf past the length and where the block table names no page of the cache.
    """
    if out is None:
        return _ops.indexer_logits_paged.default(q, index_k_cache, weights, context_lens, block_table, max_context_len)
    _ops.indexer_logits_paged.out(q, index_k_cache, weights, context_lens, block_table, max_context_len, out=out)
    return out


def topk(logits: Tensor, starts: Tensor, ends: Tensor, k: int, *, out: Tensor | None = None) -> Tensor:
    """The k best columns of each row's window, exactly: by value descending, then column ascending.

    Args:
        logits: f32 or bf16 [R, L], any row stride. NaN and -inf are never selected; +inf is; -0 equals +0.
        starts, ends: int32 [R], the window of each row.
        k: entries per row, at least 1.
        out: int32 [R, k] to write into.

    Returns:
        int32 [R, k], columns in ascending order, then -1.
    """
    if out is None:
        return _ops.topk.default(logits, starts, ends, k)
    _ops.topk.out(logits, starts, ends, k, out=out)
    return out


def topk_to_slots(
    logits: Tensor, starts: Tensor, ends: Tensor, k: int, block_table: Tensor, requests: Tensor, page_size: int, *,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``to_slots(topk(logits, starts, ends, k), block_table, requests, page_size)`` bit for bit, in one launch.

    Args:
        logits, starts, ends, k: as in :func:`topk`; column n of row r is position n of request ``requests[r]``.
        block_table, page_size: as in :func:`to_slots`.
        requests: int32 [R].
        out: int32 [R, k] to write into.

    Returns:
        int32 [R, k], slots in the order of their columns; -1 past the selection, and where :func:`to_slots` has -1.
    """
    if out is None:
        return _ops.topk_to_slots.default(logits, starts, ends, k, block_table, requests, page_size)
    _ops.topk_to_slots.out(logits, starts, ends, k, block_table, requests, page_size, out=out)
    return out


def topk_reads(logits: Tensor, starts: Tensor, ends: Tensor, k: int) -> Tensor:
    """How many times the kernel that serves :func:`topk` of these arguments reads each row: 1 is its fast path.

    A diagnostic that runs the selection, and needs memory for it. The values are the backend's own and no contract.

    Args:
        logits, starts, ends, k: as in :func:`topk`.

    Returns:
        int32 [R].
    """
    return _ops.topk_reads.default(logits, starts, ends, k)


def indexer_topk(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, starts: Tensor, ends: Tensor, topk: int, *,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The indexer of a Full layer: ``topk(indexer_logits(…), starts, ends, topk)`` bit for bit.

    Never holds the T x N logits: at most 256 MiB of scratch.

    Args:
        q, k, k_scale, weights, starts, ends: as in :func:`indexer_logits`.
        topk: entries per query, at least 1.
        out: int32 [T, topk] to write into.

    Returns:
        int32 [T, topk] rows of ``k``, ascending, then -1.
    """
    if out is None:
        return _ops.indexer_topk.default(q, k, k_scale, weights, starts, ends, topk)
    _ops.indexer_topk.out(q, k, k_scale, weights, starts, ends, topk, out=out)
    return out


def indexer_topk_paged(
    q: Tensor, index_k_cache: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, topk: int, *,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`indexer_topk` against the paged cache.

    Args:
        q, index_k_cache, weights, context_lens, block_table: as in :func:`indexer_logits_paged`.
        topk: entries per query, at least 1.
        out: int32 [B, n, topk] to write into.

    Returns:
        int32 [B, n, topk] positions inside each request, ascending, then -1; :func:`to_slots` maps them to the cache.
    """
    if out is None:
        return _ops.indexer_topk_paged.default(q, index_k_cache, weights, context_lens, block_table, topk)
    _ops.indexer_topk_paged.out(q, index_k_cache, weights, context_lens, block_table, topk, out=out)
    return out


def to_slots(
    indices: Tensor, block_table: Tensor, requests: Tensor, page_size: int, *, out: Tensor | None = None
) -> Tensor:
    """Turn positions inside requests into slots of a paged cache.

    Args:
        indices: int32 [T, K], positions inside request ``requests[t]``.
        block_table: int32 [B, P], the pages of each request.
        requests: int32 [T].
        page_size: tokens of a page, at least 1.
        out: int32 [T, K] to write into.

    Returns:
        int32 [T, K]; -1 for a negative position, one past the table, a negative page, a request outside [0, B), and a
        slot past 2**31 - 1.
    """
    if out is None:
        return _ops.to_slots.default(indices, block_table, requests, page_size)
    _ops.to_slots.out(indices, block_table, requests, page_size, out=out)
    return out


# --- Attention --------------------------------------------------------------------------------------------------------


def _check_pair(op: str, out: Tensor | None, lse: Tensor | None) -> None:
    if (out is None) != (lse is None):
        given, missing = ("lse", "out") if out is None else ("out", "lse")
        raise ValueError(f"indexcache::{op}: expected out and lse to be given together, got {given} without {missing}")


def sparse_mla(
    q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float, d_v: int = 512, sink: Tensor | None = None,
    lengths: Tensor | None = None, *, out: Tensor | None = None, lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Multi-query attention of each token over its own list of latent rows (MLA in absorbed form).

    ``s = sm_scale * q[t, head] . kv[j]`` over the row's valid indices, softmax, ``out = sum p * kv[j, :d_v]``.
    A repeated index counts twice. A query with no valid index gives out = 0 and lse = -inf.

    Args:
        q: bf16 or f32 [T, h, d_qk].
        kv: [N, d_qk] of q's dtype.
        indices: int32 [T, K], rows of ``kv``; K may be 0.
        sm_scale: softmax scale.
        d_v: leading columns of ``kv`` that are values, at most d_qk.
        sink: f32 [h], natural log: multiplies ``out`` by ``e**lse / (e**lse + e**sink)``, leaves ``lse`` alone.
        lengths: int32 [T]: only the first ``lengths[t]`` entries of a row count (clamped to 0…K).
        out, lse: buffers of the results' shapes and dtypes to write into; both or neither (else ValueError).

    Returns:
        out [T, h, d_v] of q's dtype and lse f32 [T, h], natural log.
    """
    _check_pair("sparse_mla", out, lse)
    if out is None or lse is None:
        return _ops.sparse_mla.default(q, kv, indices, sm_scale, d_v, sink, lengths)
    _ops.sparse_mla.out(q, kv, indices, sm_scale, d_v, sink, lengths, out=out, lse=lse)
    return out, lse


def sparse_mla_paged(
    q: Tensor, kv_cache: Tensor, slots: Tensor, sm_scale: float, sink: Tensor | None = None,
    lengths: Tensor | None = None, *, out: Tensor | None = None, lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`sparse_mla` over the bf16 rows that :func:`gather_latent_kv` makes of the 656-byte cache.

    d_qk = 576, d_v = 512; prefill and decode alike.

    Args:
        q: bf16 or f32 [T, h, 576].
        kv_cache: uint8 [pages, page_size, 656], as in :func:`store_latent_kv`.
        slots: int32 [T, K].
        sm_scale, sink, lengths, out, lse: as in :func:`sparse_mla`.

    Returns:
        out [T, h, 512] of q's dtype and lse f32 [T, h].
    """
    _check_pair("sparse_mla_paged", out, lse)
    if out is None or lse is None:
        return _ops.sparse_mla_paged.default(q, kv_cache, slots, sm_scale, sink, lengths)
    _ops.sparse_mla_paged.out(q, kv_cache, slots, sm_scale, sink, lengths, out=out, lse=lse)
    return out, lse
