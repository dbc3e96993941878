"""Training of DSA models of transformers, whose stock indexers run without gradients.

Three stages, after DeepSeek-V3.2 (arXiv 2512.02556, section 2.1):

- `language`: next-token loss with dense attention; the indexers do not take part.
- `warm-up`: only the indexers train, each by KL(p || softmax(I)) over the whole causal row, where p is its layer's
  dense attention averaged over the heads and I its own scores.
- `sparse`: every layer attends to its indexer's top-k; the next-token loss trains the rest, and KL on the selected
  set trains the indexers. Indexer inputs and p are detached, so neither loss reaches the other's weights.

The model's attention is replaced through transformers' attention interface and its indexers' `forward` is replaced
while training. Needs torch and transformers, not the compiled library.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GlmMoeDsaForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import apply_rotary_pos_emb_interleave

STAGES = ("language", "warm-up", "sparse")
LR_WARM_UP_STEPS = 100
PACE_STEPS = (10, 30)  # the steps between which the pace is measured


class IndexerInputs(NamedTuple):
    """What a layer's indexer reads: hidden states [B, S, hidden], the query latent [B, S, q_lora], cos and sin."""

    indexer: nn.Module
    hidden: Tensor
    q_resid: Tensor
    position_embeddings: tuple[Tensor, Tensor]


Selector = Callable[[IndexerInputs, int], Tensor]
# From a layer's indexer inputs and k to what its queries select, bool [B, S, S].


def all_experts(experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Every expert on every token, weighted by the router: with four experts faster than sorting the tokens."""
    shares = hidden.new_zeros(len(hidden), experts.num_experts).scatter(1, top_k_index, top_k_weights.to(hidden.dtype))
    gate, up = torch.einsum("th,eih->tei", hidden, experts.gate_up_proj).chunk(2, dim=-1)
    return torch.einsum("tei,ehi->th", experts.act_fn(gate) * up * shares.unsqueeze(-1), experts.down_proj)


def kl_per_row(p: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
    """Mean over rows of KL(p || softmax(scores over visible)); p is 0 and no score counts where not visible."""
    log_q = scores.masked_fill(~visible, -torch.inf).log_softmax(-1).masked_fill(~visible, 0)
    return (torch.xlogy(p, p) - p * log_q).sum(-1).mean()


def indexer_scores(inputs: IndexerInputs, rows: Tensor | slice = slice(None)) -> Tensor:
    """The stock indexer's scores [B, rows, S] before masking, with gradients to the indexer's weights."""
    indexer, hidden, q_resid, (cos, sin) = inputs
    rope = indexer.qk_rope_head_dim

    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, _ = apply_rotary_pos_emb_interleave(x[..., :rope], x[..., :rope], cos, sin, unsqueeze_dim=2)
        return torch.cat([turned, x[..., rope:]], dim=-1)

    q = indexer.wq_b(q_resid[:, rows]).unflatten(-1, (indexer.n_heads, indexer.head_dim))
    q = rotated(q, cos[:, rows], sin[:, rows])
    k = rotated(indexer.k_norm(indexer.wk(hidden)).unsqueeze(2), cos, sin).squeeze(2)
    weights = indexer.weights_proj(hidden[:, rows]) * (indexer.n_heads**-0.5 * indexer.softmax_scale)
    products = torch.einsum("bshd,btd->bsht", q, k)
    return torch.einsum("bsh,bsht->bst", weights, F.relu(products))


def select_topk(inputs: IndexerInputs, topk: int) -> Tensor:
    """The top-k of the stock scores, which are held for the whole sequence."""
    scores = indexer_scores(inputs)
    length = scores.shape[-1]
    visible = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    picks = scores.masked_fill(~visible, -torch.inf).topk(min(topk, length)).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, picks, True) & visible


class TrainableDsa:
    """Puts a stock model on an attention whose indexers learn, as a context manager; `stage` is one of STAGES.

    kl_rows: queries of each sequence, drawn anew for each layer, whose KL counts; None is all of them.
    select: who selects in the sparse stage.

    Each layer's KL is differentiated at once, so one layer's scores are held at a time; `kl` holds the layers' values
    of the last forward.
    """

    NAME = "indexcache_training"

    def __init__(
        self,
        model: GlmMoeDsaForCausalLM,
        stage: str,
        *,
        kl_rows: int | None = None,
        select: Selector = select_topk,
    ) -> None:
        self.model = model
        self.stage = stage
        self.kl_rows, self.select = kl_rows, select
        self.kl: list[Tensor] = []
        self.indexers = [layer.self_attn.indexer for layer in model.model.layers]
        ALL_ATTENTION_FUNCTIONS.register(self.NAME, self.attention)
        # The attention below is causal by itself, but the model slices its mask.
        ALL_MASK_ATTENTION_FUNCTIONS.register(self.NAME, lambda *args, **kwargs: torch.empty(1, 1, 1, 1))
        ALL_EXPERTS_FUNCTIONS.register(self.NAME, all_experts)

    def __enter__(self) -> TrainableDsa:
        self.stock = self.model.config._attn_implementation, self.model.config._experts_implementation
        self.model.config._attn_implementation_internal = self.NAME
        self.model.config._experts_implementation_internal = self.NAME
        for indexer in self.indexers:
            indexer.forward = _no_inputs if self.stage == "language" else partial(_inputs, indexer)
        self.hooks = [
            layer.mlp.gate.register_forward_hook(balance_experts)
            for layer in self.model.model.layers
            if hasattr(layer.mlp, "gate") and self.stage != "warm-up"
        ]
        return self

    def __exit__(self, *exception) -> None:
        self.model.config._attn_implementation_internal, self.model.config._experts_implementation_internal = self.stock
        for indexer in self.indexers:
            del indexer.forward
        for hook in self.hooks:
            hook.remove()

    def attention(
        self, module, query, key, value, attention_mask, *, scaling: float, indices: IndexerInputs | None, **kwargs
    ):
        """What transformers calls in each layer; `indices` is whatever the indexer returned: here its inputs."""
        mask = None
        if indices is not None:
            if module.layer_idx == 0:
                self.kl = []
            if self.stage == "sparse":
                with torch.no_grad():
                    mask = self.select(indices, self.model.config.index_topk)
            self.learn(indices, query.detach(), key.detach(), mask, scaling)
            mask = None if mask is None else mask.unsqueeze(1)
        half = torch.bfloat16 if query.is_cuda else query.dtype
        out = F.scaled_dot_product_attention(
            query.to(half), key.to(half), value.to(half), attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    def learn(self, inputs: IndexerInputs, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
        """KL of a layer; mask bool [B, S, S] of what counts in each row, None for all that is before it."""
        length, device = query.shape[2], query.device
        rows: Tensor | slice = slice(None)
        if self.kl_rows is not None and self.kl_rows < length:
            rows = torch.randperm(length, device=device)[: self.kl_rows]
        if mask is None:
            positions = torch.arange(length, device=device)
            visible = (positions <= positions[rows, None])[None]
        else:
            visible = mask[:, rows]
        with torch.no_grad():
            logits = (query[:, :, rows] @ key.transpose(-1, -2)).float() * scaling
            p = logits.masked_fill_(~visible.unsqueeze(1), -torch.inf).softmax(-1).mean(1)
            del logits
        with torch.enable_grad():
            loss = kl_per_row(p, indexer_scores(inputs, rows).float(), visible)
            if self.model.training:
                loss.backward()
        self.kl.append(loss.detach())


def _inputs(indexer: nn.Module, hidden_states, q_resid, position_embeddings, *args, **kwargs) -> IndexerInputs:
    return IndexerInputs(indexer, hidden_states.detach(), q_resid.detach(), position_embeddings)


def _no_inputs(*args, **kwargs) -> None:  # one function for all layers, so that torch.compile need not tell them apart
    return None


@torch.no_grad()
def balance_experts(gate: nn.Module, inputs: tuple, outputs: tuple) -> None:
    """Moves the router's selection bias towards equal loads, as DeepSeek-V3 does (arXiv 2412.19437, section 2.1.2)."""
    if gate.training:
        load = F.one_hot(outputs[2].flatten(), gate.num_experts).float().sum(0)
        gate.e_score_correction_bias += 1e-3 * torch.sign(load.mean() - load)


def rate(step: int, total: int | None) -> float:
    """Fraction of the peak learning rate: a linear rise, then a cosine down to 2 %; with no total yet, the rise."""
    rise = LR_WARM_UP_STEPS if total is None else min(LR_WARM_UP_STEPS, max(total // 10, 1))
    if step < rise or total is None:
        return min(1.0, (step + 1) / rise)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))


def seconds_now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def run_stage(
    dsa: TrainableDsa,
    batches: Iterator[tuple[Tensor, Tensor]],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    steps: int | None,
    seconds: float,
) -> dict:
    """Trains the stage of `dsa` for `steps` steps, or for as many as fit into `seconds` at the pace of the first ones.

    batches: tokens and the targets of each, int64 [B, S]. optimizers: their groups hold the rate at its highest in
    `peak`. Returns what happened, for a log.
    """
    model, stage = dsa.model, dsa.stage
    device = next(model.parameters()).device
    params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    model.train()
    start, step, tokens_seen, history = seconds_now(device), 0, 0, []
    with dsa:
        while steps is None or step < steps:
            if steps is None and step == PACE_STEPS[0]:
                pace_start = seconds_now(device)
            if steps is None and step == PACE_STEPS[1]:
                now = seconds_now(device)
                pace = (now - pace_start) / (PACE_STEPS[1] - PACE_STEPS[0])
                steps = step + max(0, int((seconds - (now - start)) / pace))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * rate(step, steps)
            tokens, targets = next(batches)
            with torch.set_grad_enabled(stage != "warm-up"):
                logits = model(input_ids=tokens, use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            if stage != "warm-up":
                loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            tokens_seen += tokens.numel()
            if step % 100 == 0 or step in (1, steps):
                entry = {"step": step, "loss": round(loss.item(), 4)}
                if dsa.kl:
                    entry["kl"] = round(torch.stack(dsa.kl).mean().item(), 4)
                history.append(entry)
                elapsed = time.perf_counter() - start
                print(f"{stage:9} {entry} of {steps} steps, {elapsed:.0f} s", file=sys.stderr, flush=True)
    model.requires_grad_(True).eval()
    return {
        "stage": stage,
        "steps": step,
        "batch": len(tokens),
        "tokens": tokens_seen,
        "seconds": round(seconds_now(device) - start, 1),
        "history": history,
    }
