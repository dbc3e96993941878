"""The ops in plain torch and float64: a specification to read and the oracle that every backend is compared with.

One function per forward op, with the names, arguments and defaults of its schema, on any device. Integer and e4m3
results have the op's dtype; every float result is float64 and unrounded, whatever the op returns. Inputs are trusted:
the ops check dtypes and shapes, this module does not. Clear before fast: loops bound the memory to about 256 MiB.

Symbols: T query tokens, N key rows, H indexer heads, D index head dim, K entries per query, h attention heads.
Window: query t sees columns ``max(0, starts[t]) <= n < min(N, ends[t])``. Index: a row number, anything outside
``[0, N)`` means "no token". Slot: ``page * page_size + offset``, under the same rule.

Sources: DeepSeek-V3.2 (arXiv 2512.02556, eqs. 1-2) for the indexer and the sparse attention; RoFormer (arXiv
2104.09864) for RoPE; the attention sink as in gpt-oss (arXiv 2508.10925).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0
SCALE_FLOOR = 1e-4  # of amax, so that a vector of zeros has a scale
INDEX_PAGE = 64  # tokens of a page of the index-key cache
LATENT, ROPE = 512, 64  # value part and rotary part of a latent row
LATENT_GROUP = 128  # latent values that share a scale
LATENT_BYTES = LATENT + 4 * (LATENT // LATENT_GROUP) + 2 * ROPE

_CHUNK_ELEMENTS = 1 << 24


def _chunks(rows: int, elements_per_row: int) -> Iterator[slice]:
    """Slices of ``range(rows)`` that hold about 16M elements each."""
    step = max(1, _CHUNK_ELEMENTS // max(1, elements_per_row))
    return (slice(first, first + step) for first in range(0, rows, step))


# --- Quantisation -----------------------------------------------------------------------------------------------------


def rope(x: Tensor, cos_sin: Tensor, positions: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the first ``cos_sin.size(1)`` entries of ``x`` [T, ..., D] by the angles of ``positions`` [T].

    ``cos_sin`` [max_position, rot] holds cos in its first half and sin in its second. ``interleaved`` pairs entries
    (0, 1), (2, 3), ..., otherwise (i, i + rot/2). A position outside the table gives NaN.
    """
    max_position, rot = cos_sin.shape
    known = (positions >= 0) & (positions < max_position)
    table = F.pad(cos_sin.double(), (0, 0, 0, 1), value=torch.nan)  # one more row, for the unknown positions
    angles = table[torch.where(known, positions, max_position).long()]
    cos, sin = angles.view(len(x), *[1] * (x.dim() - 2), rot).chunk(2, dim=-1)
    x = x.double()
    head, tail = x[..., :rot], x[..., rot:]
    first, second = (head[..., 0::2], head[..., 1::2]) if interleaved else head.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    head = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    # The untouched tail of a vector without a position is no more usable than its head.
    tail = torch.where(known.view(len(x), *[1] * (x.dim() - 1)), tail, torch.nan)
    return torch.cat([head, tail], dim=-1)


def hadamard(x: Tensor) -> Tensor:
    """Walsh-Hadamard transform in Sylvester order of the last dimension (a power of two), times ``D**-0.5``."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device=x.device)
    while len(matrix) < x.size(-1):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return x.double() @ matrix * x.size(-1) ** -0.5


def quantize(x: Tensor, *, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """e4m3 values of ``x`` [..., D] and their scales [...]: ``scale = max(amax, 1e-4) / 448``, ``e4m3(x / scale)``.

    ``ue8m0`` rounds the scale up to a power of two. A vector with a NaN or an infinity gets a NaN scale and NaN bytes.
    """
    x = x.double()
    scale = x.abs().amax(-1).clamp(min=SCALE_FLOOR) / E4M3_MAX
    if ue8m0:
        mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    finite = x.isfinite().all(-1)
    scale = torch.where(finite, scale, torch.nan)
    values = (x / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    nan_byte = torch.tensor(0x7F, dtype=torch.uint8, device=x.device)
    return torch.where(finite[..., None], values.view(torch.uint8), nan_byte).view(torch.float8_e4m3fn), scale


def index_vector(
    x: Tensor, cos_sin: Tensor | None, positions: Tensor | None, *, interleaved: bool = False, transform: bool = False
) -> Tensor:
    """What an index query or key is just before it is quantised: RoPE if there is a table, then Hadamard if asked."""
    x = x.double()
    if cos_sin is not None:
        x = rope(x, cos_sin, positions, interleaved=interleaved)
    return hadamard(x) if transform else x


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float = 1e-6) -> Tensor:
    """LayerNorm of the last dimension with the biased variance; ``x`` itself where there is no weight."""
    if weight is None:
        return x.double()
    return F.layer_norm(x.double(), (x.size(-1),), weight.double(), None if bias is None else bias.double(), eps)


def quantize_index_q(
    q: Tensor, weights: Tensor, cos_sin: Tensor | None, positions: Tensor | None, *,
    scale: float, interleaved: bool = False, hadamard: bool = False, ue8m0: bool = False,
) -> tuple[Tensor, Tensor]:
    """Index queries [T, H, D] -> e4m3 [T, H, D] and folded weights float64 [T, H] = ``weights * q_scale * scale``."""
    vector = index_vector(q, cos_sin, positions, interleaved=interleaved, transform=hadamard)
    q8, q_scale = quantize(vector, ue8m0=ue8m0)
    return q8, weights.double() * q_scale * scale


def quantize_index_k(
    k: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, cos_sin: Tensor | None,
    positions: Tensor | None, *,
    eps: float = 1e-6, interleaved: bool = False, hadamard: bool = False, ue8m0: bool = False,
) -> tuple[Tensor, Tensor]:
    """Index keys [N, D] -> LayerNorm, RoPE, Hadamard -> e4m3 [N, D] and scales float64 [N]."""
    normed = layer_norm(k, norm_weight, norm_bias, eps=eps)
    vector = index_vector(normed, cos_sin, positions, interleaved=interleaved, transform=hadamard)
    return quantize(vector, ue8m0=ue8m0)


def store_index_k(
    k: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, cos_sin: Tensor | None,
    positions: Tensor | None, slots: Tensor, index_k_cache: Tensor, *,
    eps: float = 1e-6, interleaved: bool = False, hadamard: bool = False, ue8m0: bool = False,
) -> None:
    """``quantize_index_k`` written to ``slots`` [N] of ``index_k_cache`` uint8 [pages, 64, D + 4].

    A page holds 64 * D value bytes, then 64 f32 scales. A slot outside the cache is skipped.
    """
    options = {"eps": eps, "interleaved": interleaved, "hadamard": hadamard, "ue8m0": ue8m0}
    k8, k_scale = quantize_index_k(k, norm_weight, norm_bias, cos_sin, positions, **options)
    values, scales = index_page_parts(index_k_cache)
    kept, page, offset = locate(slots, index_k_cache)
    values[page, offset] = k8.view(torch.uint8)[kept]
    scales[page, offset] = k_scale[kept].float().view(torch.uint8).view(-1, 4)


def gather_index_k(index_k_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Values e4m3 [M, D] and scales float64 [M] of ``slots`` [M]; a slot outside the cache gives zeros."""
    values, scales = index_page_parts(index_k_cache)
    kept, page, offset = locate(slots, index_k_cache)
    k8 = values.new_zeros(len(slots), values.size(-1))
    k_scale = torch.zeros(len(slots), dtype=torch.float64, device=slots.device)
    k8[kept] = values[page, offset]
    k_scale[kept] = scales[page, offset].view(torch.float32).squeeze(-1).double()
    return k8.view(torch.float8_e4m3fn), k_scale


def store_latent_kv(kv: Tensor, slots: Tensor, kv_cache: Tensor) -> None:
    """Latent rows [M, 576] into ``slots`` [M] of ``kv_cache`` uint8 [pages, page_size, 656].

    A row is 512 e4m3 | 4 f32 scales, one per 128 values, not powers of two | 64 bf16 rope.
    """
    latent, k_rope = kv[:, :LATENT], kv[:, LATENT:]
    values, scale = quantize(latent.unflatten(1, (-1, LATENT_GROUP)))
    row = torch.cat(
        [
            values.flatten(1).view(torch.uint8),
            scale.float().view(torch.uint8),
            k_rope.bfloat16().contiguous().view(torch.uint8),
        ],
        dim=1,
    )
    kept, page, offset = locate(slots, kv_cache)
    kv_cache[page, offset] = row[kept]


def gather_latent_kv(kv_cache: Tensor, slots: Tensor) -> Tensor:
    """Dequantised rows float64 [M, 576] of ``slots`` [M]; a slot outside the cache gives zeros."""
    kept, page, offset = locate(slots, kv_cache)
    row = kv_cache.new_zeros(len(slots), LATENT_BYTES)
    row[kept] = kv_cache[page, offset]
    values, scale, k_rope = row.split([LATENT, LATENT_BYTES - LATENT - 2 * ROPE, 2 * ROPE], dim=1)
    values = values.contiguous().view(torch.float8_e4m3fn).double().unflatten(1, (-1, LATENT_GROUP))
    latent = values * scale.contiguous().view(torch.float32).double()[..., None]
    return torch.cat([latent.flatten(1), k_rope.contiguous().view(torch.bfloat16).double()], dim=1)


def locate(slots: Tensor, cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which of ``slots`` lie inside ``cache``, and the page and offset of those."""
    pages, page_size = cache.shape[:2]
    kept = (slots >= 0) & (slots < pages * page_size)
    inside = slots[kept].long()
    return kept, inside // max(1, page_size), inside % max(1, page_size)


def index_page_parts(index_k_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the values [pages, 64, D] and of the scale bytes [pages, 64, 4]."""
    dim = index_k_cache.size(2) - 4
    flat = index_k_cache.flatten(1)
    value_bytes, scale_bytes = flat[:, : INDEX_PAGE * dim], flat[:, INDEX_PAGE * dim :]
    return value_bytes.unflatten(1, (INDEX_PAGE, dim)), scale_bytes.unflatten(1, (INDEX_PAGE, 4))


# --- Indexer ----------------------------------------------------------------------------------------------------------


def window_mask(starts: Tensor, ends: Tensor, columns: int) -> Tensor:
    """bool [..., columns]: which columns each query sees. Empty and inverted windows see none."""
    column = torch.arange(columns, device=starts.device)
    return (column >= starts[..., None]) & (column < ends[..., None])


def indexer_logits(q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """``k_scale[n] * sum_h weights[t, h] * max(0, q[t, h] . k[n])`` float64 [T, N], -inf outside the window.

    q e4m3 [T, H, D], k e4m3 [N, D], k_scale [N], weights [T, H], starts and ends int32 [T].
    """
    tokens, heads, _ = q.shape
    logits = torch.empty(tokens, len(k), dtype=torch.float64, device=q.device)
    keys = k.double().T
    for rows in _chunks(tokens, heads * len(k)):
        dots = torch.relu(q[rows].double() @ keys)
        scores = (weights[rows].double().unsqueeze(1) @ dots).squeeze(1) * k_scale.double()
        logits[rows] = scores.masked_fill(~window_mask(starts[rows], ends[rows], len(k)), -torch.inf)
    return logits


def indexer_logits_paged(
    q: Tensor, index_k_cache: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, max_context_len: int
) -> Tensor:
    """``indexer_logits`` over a paged cache: float64 [B, n, max_context_len], positions inside each request.

    q e4m3 [B, n, H, D], weights [B, n, H], context_lens int32 [B, n] = keys visible to a query, block_table int32
    [B, P]. -inf past the length and where the table names no page of the cache.
    """
    batch, queries = context_lens.shape
    logits = q.new_empty(batch, queries, max_context_len, dtype=torch.float64)
    for b in range(batch):
        slots = _position_slots(block_table[b], max_context_len)
        slots = torch.where(slots < len(index_k_cache) * INDEX_PAGE, slots, -1)
        k8, k_scale = gather_index_k(index_k_cache, slots)
        zeros = torch.zeros_like(context_lens[b])
        scores = indexer_logits(q[b], k8, k_scale, weights[b], zeros, context_lens[b])
        logits[b] = scores.masked_fill(slots < 0, -torch.inf)
    return logits


def topk(logits: Tensor, starts: Tensor, ends: Tensor, k: int) -> Tensor:
    """The ``k`` best columns of each window by (value descending, column ascending): int32 [R, k].

    Listed in ascending column order, then -1. NaN and -inf are never selected, +inf is, -0 equals +0. Exact for the
    logits it is given, bfloat16, float32 or float64 [R, L].
    """
    rows_total, columns = logits.shape
    result = torch.full((rows_total, k), -1, dtype=torch.int32, device=logits.device)
    if columns == 0:
        return result
    for rows in _chunks(rows_total, columns):
        score = logits[rows] + 0.0  # -0 becomes +0, lest a sort tells them apart
        seen = window_mask(starts[rows], ends[rows], columns) & ~score.isnan()
        score = score.masked_fill(~seen, -torch.inf)
        value, column = score.sort(dim=-1, descending=True, stable=True)
        column = column.masked_fill(value == -torch.inf, columns)[:, :k].sort(dim=-1).values
        result[rows, : column.size(1)] = column.masked_fill(column == columns, -1).int()
    return result


def indexer_topk(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, starts: Tensor, ends: Tensor, topk: int
) -> Tensor:
    """``topk(indexer_logits(...))`` on the float64 scores: int32 [T, topk]."""
    return _topk(indexer_logits(q, k, k_scale, weights, starts, ends), starts, ends, topk)


def indexer_topk_paged(
    q: Tensor, index_k_cache: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, topk: int
) -> Tensor:
    """The best positions inside each request, over a paged cache: int32 [B, n, topk]."""
    columns = block_table.size(1) * INDEX_PAGE
    logits = indexer_logits_paged(q, index_k_cache, weights, context_lens, block_table, columns).flatten(0, 1)
    ends = context_lens.flatten()
    return _topk(logits, torch.zeros_like(ends), ends, topk).view(*context_lens.shape, topk)


def to_slots(indices: Tensor, block_table: Tensor, requests: Tensor, page_size: int) -> Tensor:
    """Positions int32 [T, K] inside request ``requests[t]`` -> slots int32 [T, K] by ``block_table`` int32 [B, P].

    -1 for a negative position, one past the table, a negative page, a request outside [0, B), a slot past 2**31 - 1.
    """
    batch, pages = block_table.shape
    request, position = requests.long()[:, None], indices.long()
    column, offset = position // page_size, position % page_size
    known = (request >= 0) & (request < batch) & (position >= 0) & (column < pages)
    cell = torch.where(known, request * pages + column, batch * pages)
    page = F.pad(block_table.long().flatten(), (0, 1), value=-1)[cell]  # the last cell stands for "not in the table"
    known = (page >= 0) & (page <= (2**31 - 1 - offset) // page_size)
    return torch.where(known, page * page_size + offset, -1).int()


def topk_to_slots(
    logits: Tensor, starts: Tensor, ends: Tensor, k: int, block_table: Tensor, requests: Tensor, page_size: int
) -> Tensor:
    """``to_slots(topk(...), ...)``: column n of row r is position n of request ``requests[r]``. int32 [R, k]."""
    return to_slots(topk(logits, starts, ends, k), block_table, requests, page_size)


_topk = topk  # under a name that the `topk` argument of the callers does not hide


def _position_slots(table_row: Tensor, positions: int) -> Tensor:
    """Slots int64 [positions] of a request whose pages are ``table_row`` [P]; -1 where it has no page."""
    position = torch.arange(positions, device=table_row.device)
    pages = F.pad(table_row.long(), (0, 1), value=-1)
    page = pages[(position // INDEX_PAGE).clamp(max=len(table_row))]
    return torch.where(page >= 0, page * INDEX_PAGE + position % INDEX_PAGE, -1)


# --- Attention --------------------------------------------------------------------------------------------------------


def sparse_mla(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    sink: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q [T, h, d_qk] over the listed rows of kv [N, d_qk]: out float64 [T, h, d_v], lse float64 [T, h].

    ``s = sm_scale * q . kv`` over the valid entries of ``indices`` int32 [T, K] (a repeated one counts twice), softmax,
    ``out = sum p * kv[:d_v]``; lse is natural-log. ``lengths`` int32 [T] uses only the first entries of a row. ``sink``
    f32 [h] multiplies out by ``e^lse / (e^lse + e^sink)``. No valid key: out = 0, lse = -inf.
    """
    return attend(q, dense_rows(kv), len(kv), indices, sm_scale, d_v, sink, lengths)


def sparse_mla_paged(
    q: Tensor,
    kv_cache: Tensor,
    slots: Tensor, sm_scale: float, sink: Tensor | None = None, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``sparse_mla`` of q [T, h, 576] over ``slots`` int32 [T, K] of the 656-byte cache, dequantised to bf16."""

    keys = kv_cache.size(0) * kv_cache.size(1)
    return attend(q, cached_rows(kv_cache), keys, slots, sm_scale, LATENT, sink, lengths)


Rows = Callable[[Tensor], Tensor]  # entries [T, K] -> their rows float64 [T, K, d_qk], zeros for those outside the keys


def dense_rows(kv: Tensor) -> Rows:
    """Looks rows up in kv [N, d_qk]."""
    padded = F.pad(kv, (0, 0, 0, 1))  # row N is zeros: what an invalid entry reads

    def fetch(entries: Tensor) -> Tensor:
        return padded[torch.where((entries >= 0) & (entries < len(kv)), entries, len(kv)).long()].double()

    return fetch


def cached_rows(kv_cache: Tensor) -> Rows:
    """Looks rows up in the 656-byte cache: a row is its bf16 dequantisation, an f32 product rounded."""

    def fetch(entries: Tensor) -> Tensor:
        rows = gather_latent_kv(kv_cache, entries.flatten()).float().bfloat16().double()
        return rows.view(*entries.shape, LATENT + ROPE)

    return fetch


def attend(
    q: Tensor, rows: Rows, keys: int, indices: Tensor, sm_scale: float, d_v: int,
    sink: Tensor | None, lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What ``sparse_mla`` does, whatever holds the rows."""
    tokens, heads, d_qk = q.shape
    entries = indices.size(1)
    used = torch.full((tokens,), entries, device=q.device) if lengths is None else lengths
    listed = torch.arange(entries, device=q.device) < used[:, None]
    indices = torch.where(listed, indices, -1)
    out = q.new_empty(tokens, heads, d_v, dtype=torch.float64)
    lse = q.new_empty(tokens, heads, dtype=torch.float64)
    for part in _chunks(tokens, entries * (d_qk + heads)):
        valid = (indices[part] >= 0) & (indices[part] < keys)
        kv = rows(indices[part])
        score = sm_scale * (q[part].double() @ kv.transpose(1, 2))
        score = score.masked_fill(~valid[:, None], -torch.inf)
        lse[part] = score.logsumexp(-1)
        empty = ~valid.any(-1)[:, None, None]
        weight = torch.exp(score - lse[part][..., None]).masked_fill(empty, 0.0)
        out[part] = weight @ kv[..., :d_v]
    if sink is not None:
        share = torch.sigmoid(lse - sink.double())
        out = torch.where(lse[..., None] == -torch.inf, 0.0, out * share[..., None])
    return out, lse
