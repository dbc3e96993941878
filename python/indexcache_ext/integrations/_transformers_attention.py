"""The attention layers of the supported models in absorbed MLA form on torch.ops.indexcache.

DeepSeek-V3.2 report (arXiv 2512.02556), section 2: lightning indexer, top-k, then multi-query attention over latents.
Absorbed: q_nope is carried into the latent space by the key half of kv_b_proj, and the attention output leaves it by
the value half, so keys and values of all heads are one row [latent | rope] per token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as deepseek
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm

from ._transformers_forward import Forward

_SCALE_BYTES = 4  # the f32 scale behind the D bytes of an e4m3 index key


class _SparseMla:
    """Replaces the forward of a stock attention class, whose weights and attributes it uses unchanged."""

    stock: type[nn.Module]
    interleaved: bool  # how the indexer pairs its RoPE dims; the main attention is interleaved in both models
    extra_results: tuple = ()

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        indexcache_forward: Forward | None = None,
        **kwargs: Any,
    ) -> tuple:
        if indexcache_forward is None:
            raise RuntimeError("indexcache: call the model, not a single layer: its forward opens the selection")
        batch, length, _ = hidden_states.shape
        cos, sin = position_embeddings
        q_latent = self.q_a_layernorm(self.q_a_proj(hidden_states))
        query = self.q_b_proj(q_latent).view(batch, length, -1, self.qk_head_dim)
        q_nope, q_rope = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        compressed = self.kv_a_proj_with_mqa(hidden_states)
        latent, k_rope = compressed.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        q_rope, k_rope = glm.apply_rotary_pos_emb_interleave(q_rope, k_rope.unsqueeze(2), cos, sin, unsqueeze_dim=2)
        kv = torch.cat([self.kv_a_layernorm(latent), k_rope.squeeze(2)], dim=-1)
        kv = indexcache_forward.append_latent(past_key_values, self.layer_idx, kv)

        w_key, w_value = _absorbed(self)
        q = torch.cat([torch.einsum("bshn,hnl->bshl", q_nope, w_key), q_rope], dim=-1)
        inputs = hidden_states, q_latent, position_embeddings, past_key_values
        run_indexer = partial(_run_indexer, self, indexcache_forward, *inputs)
        indices = indexcache_forward.holder.select(self.layer_idx, run_indexer)
        dropout = self.attention_dropout if self.training else 0.0
        q = q.flatten(0, 1).to(kv.dtype)
        if indexcache_forward.watch is not None:
            indexcache_forward.watch(indexcache_forward, self.layer_idx, q, kv.flatten(0, 1), self.scaling)
        out = _attend(q, kv.flatten(0, 1), indices, self.scaling, self.kv_lora_rank, dropout)
        out = torch.einsum("thl,hvl->thv", out, w_value).reshape(batch, length, -1)
        return self.o_proj(out), None, *self.extra_results


class GlmMoeDsaSparseAttention(_SparseMla, glm.GlmMoeDsaAttention):
    """GLM-5.x. The third result, the selection for the next layer, is None: the forward's own holder carries it."""

    stock = glm.GlmMoeDsaAttention
    interleaved = True
    extra_results = (None,)


class DeepseekV32SparseAttention(_SparseMla, deepseek.DeepseekV32Attention):
    """DeepSeek-V3.2."""

    stock = deepseek.DeepseekV32Attention
    interleaved = False


SPARSE_CLASSES = {cls.stock: cls for cls in (GlmMoeDsaSparseAttention, DeepseekV32SparseAttention)}


def index_key_bytes(indexer: nn.Module, quantised: bool) -> int:
    """Bytes that one Full layer caches for one token."""
    return indexer.head_dim + _SCALE_BYTES if quantised else indexer.head_dim * indexer.wk.weight.element_size()


def _absorbed(attention: nn.Module) -> tuple[Tensor, Tensor]:
    """The key half [h, nope, latent] and the value half [h, v, latent] of kv_b_proj."""
    projection = attention.kv_b_proj
    if type(projection) is not nn.Linear:  # an adapter's or a quantiser's layer computes more than its weight says
        raise TypeError(
            f"indexcache: layer {attention.layer_idx}: expected kv_b_proj to be a plain nn.Linear, whose weight is"
            f" absorbed into the query, got {type(projection).__name__}; merge adapters first"
        )
    per_head = projection.weight.view(-1, attention.qk_nope_head_dim + attention.v_head_dim, attention.kv_lora_rank)
    return per_head.split([attention.qk_nope_head_dim, attention.v_head_dim], dim=1)


def _attend(q: Tensor, kv: Tensor, indices: Tensor, scale: float, d_v: int, dropout: float) -> Tensor:
    """Attention of q [T,h,d_qk] over the listed rows of kv [N,d_qk]: [T,h,d_v]."""
    differentiated = torch.is_grad_enabled() and (q.requires_grad or kv.requires_grad)
    if not differentiated and dropout == 0.0:
        return torch.ops.indexcache.sparse_mla(q, kv, indices, scale, d_v)[0]
    # sparse_mla has no gradient and no dropout: gather the rows and let autograd see plain torch.
    hidden = (indices < 0)[:, None]
    rows = F.embedding(indices.clamp(min=0), kv)
    scores = torch.einsum("thd,tkd->thk", q, rows).float() * scale
    weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(hidden, 0.0)
    weights = F.dropout(weights.to(q.dtype), dropout)
    return torch.einsum("thk,tkd->thd", weights, rows[..., :d_v])


@torch.no_grad()
def _run_indexer(
    attention: nn.Module,
    forward: Forward,
    hidden: Tensor,
    q_latent: Tensor,
    rope: tuple[Tensor, Tensor],
    cache: Cache | None,
    out: Tensor,
) -> None:
    """Write the selection of a Full layer, key rows of the whole batch, into `out`."""
    info, windows = forward.info, forward.windows
    run = _select_quantised if info.quantised else _select_unquantised
    run(attention, forward, hidden, q_latent, rope, cache, out)
    windows.to_key_rows_(out)
    info.count(indexer_calls=windows.batch * windows.length)
    if forward.observe is not None:

        def unquantised() -> Tensor:
            exact = torch.empty_like(out)
            _select_unquantised(attention, forward, hidden, q_latent, rope, None, exact)
            windows.to_key_rows_(exact)
            return exact

        forward.observe(forward, attention.layer_idx, out, unquantised)


def _head_weights(indexer: nn.Module, hidden: Tensor) -> Tensor:
    """The signed head weights f32 [batch, length, H]."""
    return indexer.weights_proj(hidden.to(indexer.weights_proj.weight.dtype)).float() * indexer.n_heads**-0.5


def _select_quantised(
    attention: nn.Module,
    forward: Forward,
    hidden: Tensor,
    q_latent: Tensor,
    rope: tuple[Tensor, Tensor],
    cache: Cache | None,
    out: Tensor,
) -> None:
    ops, indexer, windows = torch.ops.indexcache, attention.indexer, forward.windows
    heads, dim, norm = indexer.n_heads, indexer.head_dim, indexer.k_norm
    options = {
        "interleaved": attention.interleaved,
        "hadamard": forward.info.hadamard,
        "ue8m0": forward.info.ue8m0,
    }
    table, positions = forward.rope_table(*rope)
    q8, weights = ops.quantize_index_q(
        indexer.wq_b(q_latent).view(-1, heads, dim),
        _head_weights(indexer, hidden).view(-1, heads),
        table,
        positions,
        scale=indexer.softmax_scale,
        **options,
    )
    k8, k_scale = ops.quantize_index_k(
        indexer.wk(hidden).view(-1, dim),
        norm.weight.float(),
        norm.bias.float(),
        table,
        positions,
        eps=norm.eps,
        **options,
    )
    # Value bytes and scale as one uint8 row: caches can move it, and it is reordered as one.
    row = torch.cat([k8.view(torch.uint8), k_scale.view(-1, 1).view(torch.uint8)], dim=-1)
    row = row.view(windows.batch, windows.length, dim + _SCALE_BYTES)
    row = windows.visible(forward.append_index_keys(cache, attention.layer_idx, row).flatten(0, 1))
    k8 = row[:, :dim].contiguous().view(torch.float8_e4m3fn)
    k_scale = row[:, dim:].contiguous().view(torch.float32).squeeze(-1)
    ops.indexer_topk.out(q8, k8, k_scale, weights, windows.starts, windows.ends, out.shape[1], out=out)


def _select_unquantised(
    attention: nn.Module,
    forward: Forward,
    hidden: Tensor,
    q_latent: Tensor,
    rope: tuple[Tensor, Tensor],
    cache: Cache | None,
    out: Tensor,
) -> None:
    """The stock indexer's arithmetic, matrix shapes included: the same bits from the same inputs, and as much memory."""
    indexer, windows = attention.indexer, forward.windows
    rot, dim = indexer.qk_rope_head_dim, indexer.head_dim
    rotate = glm.apply_rotary_pos_emb_interleave if attention.interleaved else deepseek.apply_rotary_pos_emb
    q = indexer.wq_b(q_latent).view(windows.batch, windows.length, indexer.n_heads, dim)
    k = indexer.k_norm(indexer.wk(hidden)).unsqueeze(2)
    q_rope, k_rope = rotate(q[..., :rot], k[..., :rot], *rope, unsqueeze_dim=2)
    q = torch.cat([q_rope, q[..., rot:]], dim=-1).float()
    k = torch.cat([k_rope, k[..., rot:]], dim=-1).squeeze(2)
    k = forward.append_index_keys(cache, attention.layer_idx, k).float()
    weights = _head_weights(indexer, hidden)
    for b in range(windows.batch):
        first, stop = windows.bounds[b : b + 2]
        tokens = slice(b * windows.length, (b + 1) * windows.length)
        scores = F.relu(torch.matmul(q[b], k[b].T.unsqueeze(0)) * indexer.softmax_scale)
        logits = torch.matmul(weights[b].unsqueeze(-2), scores).squeeze(-2)
        if windows.rows is not None:
            logits = logits[:, windows.rows[first:stop] - b * windows.keys]
        starts, ends = (edge[tokens] - first for edge in (windows.starts, windows.ends))
        columns = torch.ops.indexcache.topk(logits, starts, ends, out.shape[1])
        out[tokens] = torch.where(columns >= 0, columns + first, -1)
