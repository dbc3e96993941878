"""The baselines: what one writes in plain torch, as fast as it gets without a kernel of one's own."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448
LATENT = 512
TOKENS_AT_A_TIME = 32  # of sparse_mla: the gathered rows of more would not fit, and are slower
PRODUCTS_AT_A_TIME = 1 << 26  # of indexer_logits: queries x heads x keys


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1).clamp(min=1e-4) / E4M3_MAX
    return (x / scale[..., None]).to(torch.float8_e4m3fn), scale


def rope(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """Half-split RoPE of the first dims of x [..., D]; `positions` broadcasts over what lies between."""
    cos, sin = cos_sin[positions.long()].view(len(x), *[1] * (x.dim() - 2), -1).chunk(2, dim=-1)
    half = cos.size(-1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def quantize_index_q(call: dict) -> tuple[Tensor, Tensor]:
    values, scale = quantize(rope(call["q"].float(), call["cos_sin"], call["positions"]))
    return values, call["weights"] * scale * call["scale"]


def quantize_index_k(call: dict) -> tuple[Tensor, Tensor]:
    k = F.layer_norm(call["k"].float(), call["k"].shape[-1:], call["norm_weight"], call["norm_bias"], 1e-6)
    return quantize(rope(k, call["cos_sin"], call["positions"]))


def store_latent_kv(kv: Tensor, slots: Tensor, cache: Tensor) -> Tensor:
    values, scale = quantize(kv[:, :LATENT].float().unflatten(1, (4, -1)))
    parts = (values.flatten(1), scale, kv[:, LATENT:].contiguous())
    cache.view(-1, cache.size(-1))[slots.long()] = torch.cat([part.view(torch.uint8) for part in parts], dim=1)
    return cache


def attend(q: Tensor, rows: Tensor, sm_scale: float) -> tuple[Tensor, Tensor]:
    """q [t, h, 576] over gathered rows [t, K, 576], every one of them valid."""
    scores = torch.einsum("thd,tkd->thk", q, rows).float() * sm_scale
    out = torch.einsum("thk,tkd->thd", scores.softmax(-1).to(q.dtype), rows[..., :LATENT])
    return out, scores.logsumexp(-1)


def sparse_mla(
    q: Tensor, fetch: Callable[[Tensor], Tensor], entries: Tensor, sm_scale: float
) -> tuple[Tensor, Tensor]:
    """Gather the listed rows with `fetch`, two einsums and a softmax, some tokens at a time."""
    blocks = zip(q.split(TOKENS_AT_A_TIME), entries.long().split(TOKENS_AT_A_TIME), strict=True)
    out, lse = zip(*(attend(part, fetch(listed), sm_scale) for part, listed in blocks), strict=True)
    return torch.cat(out), torch.cat(lse)


def latent_rows(cache: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """The dequantised rows of any shape of slots: 512 e4m3 in four groups, their f32 scales, 64 bf16 for RoPE."""
    row = cache.view(-1, cache.size(-1))[slots.long()]
    values = row[..., :LATENT].view(torch.float8_e4m3fn).float().unflatten(-1, (4, -1))
    scale = row[..., LATENT : LATENT + 16].contiguous().view(torch.float32)
    k_rope = row[..., LATENT + 16 :].contiguous().view(torch.bfloat16)
    return torch.cat([(values * scale[..., None]).flatten(-2).to(dtype), k_rope.to(dtype)], dim=-1)


def indexer_logits(q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """A block of queries at a time, in the fastest dtype that torch multiplies on the device."""
    dtype = torch.bfloat16 if q.is_cuda else torch.float32
    tokens, heads, _ = q.shape
    logits = torch.empty(tokens, len(k), device=q.device)
    keys, column = k.to(dtype).T, torch.arange(len(k), device=q.device)
    step = max(1, PRODUCTS_AT_A_TIME // (heads * len(k)))
    for first in range(0, tokens, step):
        rows = slice(first, first + step)
        dots = (q[rows].to(dtype).flatten(0, 1) @ keys).relu_().view(-1, heads, len(k))
        scores = (weights[rows].to(dtype)[:, None] @ dots).squeeze(1).float() * k_scale
        seen = (column >= starts[rows, None]) & (column < ends[rows, None])
        logits[rows] = scores.masked_fill_(~seen, -torch.inf)
    return logits


def indexer_logits_paged(call: dict, max_context_len: int) -> Tensor:
    """Pages to a dense key array, then the scores, request by request."""
    q, cache = call["q"], call["index_k_cache"]
    dim, logits = q.size(-1), []
    for b, table in enumerate(call["block_table"]):
        pages = cache[table.long()].flatten(1)
        k = pages[:, : 64 * dim].reshape(-1, dim).view(torch.float8_e4m3fn)[:max_context_len]
        k_scale = pages[:, 64 * dim :].contiguous().view(torch.float32).flatten()[:max_context_len]
        lens = call["context_lens"][b]
        logits.append(indexer_logits(q[b], k, k_scale, call["weights"][b], torch.zeros_like(lens), lens))
    return torch.stack(logits)
