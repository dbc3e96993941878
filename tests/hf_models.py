"""Tiny Hugging Face DSA models for the tests, and hooks into their stock indexers.

Contexts of a few hundred tokens are far longer than `index_topk` here: shorter ones select everything and test nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, GlmMoeDsaConfig, GlmMoeDsaForCausalLM

FAMILIES = {
    "glm": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM),
    "deepseek": (DeepseekV32Config, DeepseekV32ForCausalLM),
}
VOCAB = 61
TOPK = 32
LENGTH = 300  # far more than TOPK
# The embedding of the padding token is zero, so every key scores 0 for it: a tie that stock may break either way.
GREEDY = {"do_sample": False, "suppress_tokens": [0]}


def tiny_model(
    family: str,
    *,
    layers: int = 4,
    topk: int = TOPK,
    pattern: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides,
) -> nn.Module:
    """A random model of `family` ("glm" or "deepseek") in eval mode on stock eager attention.

    pattern: the checkpoint's own schedule (GLM only: its Shared layers get no indexer).
    """
    config_class, model_class = FAMILIES[family]
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        moe_intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=2,  # all of them serve every token: a router that drops one does so on the last bits too
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=24,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=12,
        v_head_dim=16,
        index_topk=topk,
        index_head_dim=32,
        index_n_heads=16,  # a key that no head likes scores exactly 0: few heads would mean many ties
        max_position_embeddings=1024,
        initializer_range=0.2,  # sharp attention: a wrong selection shows in the logits
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    if pattern is not None:
        settings["indexer_types"] = [{"F": "full", "S": "shared"}[letter] for letter in pattern]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**settings, **overrides}))
    for module in model.modules():  # LayerNorm starts as the identity, under which its bias would go untested
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.5)
            nn.init.normal_(module.bias, 0.0, 0.5)
    return model.to(dtype).eval()


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """Random token ids [batch, length] without the padding id 0."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(batch: int, length: int, side: str, amount: int = 90) -> Tensor:
    """An attention mask whose last sequence is `amount` tokens shorter, padded on one side or in the middle."""
    mask = torch.ones(batch, length, dtype=torch.long)
    first = {"left": 0, "right": length - amount, "middle": length // 2}[side]
    mask[-1, first : first + amount] = 0
    return mask


@contextmanager
def record_stock(model: nn.Module) -> Iterator[dict[int, list[Tensor]]]:
    """Record what the stock indexers select: layer to one [batch, length, k] a forward, ascending, -1 where masked."""
    recorded: dict[int, list[Tensor]] = {}

    def hook(indexer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        mask = args[3]
        shown = mask if mask.dtype == torch.bool else mask == 0
        chosen = output.long()
        hidden = ~shown.expand(*output.shape[:2], -1).gather(-1, chosen)
        past_end = shown.shape[-1]
        chosen = chosen.masked_fill(hidden, past_end).sort(-1).values
        recorded.setdefault(indexer.layer_idx, []).append(chosen.masked_fill(chosen == past_end, -1))

    indexers = [layer.self_attn.indexer for layer in model.model.layers if layer.self_attn.indexer is not None]
    handles = [indexer.register_forward_hook(hook, with_kwargs=True) for indexer in indexers]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def layer_inputs(model: nn.Module, given: list[Tensor] | None = None) -> Iterator[list[Tensor]]:
    """Record the hidden states that each decoder layer gets in one forward, or replace them by `given` ones.

    Two runs with the same inputs for every layer differ in a layer by what that layer computes, not by what rounding in
    earlier layers grew to: a selection turns over on the last bit of a score.
    """
    seen: list[Tensor] = []

    def hook(layer: nn.Module, args: tuple) -> tuple | None:
        seen.append(args[0])
        return None if given is None else (given[len(seen) - 1], *args[1:])

    handles = [layer.register_forward_pre_hook(hook) for layer in model.model.layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _Imposed(nn.Module):
    """Stands in for a stock indexer and returns a given selection, in the form the stock attention expects."""

    def __init__(self, selections: list[Tensor]) -> None:
        super().__init__()
        self.selections = selections
        self.calls = 0

    def forward(self, *args, **kwargs) -> Tensor:
        selection = self.selections[self.calls % len(self.selections)]
        self.calls += 1
        # The stock attention scatters the indices into a mask, so a repeated one is harmless and -1 is not. A query
        # with nothing to attend to, which is padding, gets key 0, which the causal mask hides.
        return torch.where(selection >= 0, selection, selection[..., :1].clamp(min=0)).to(torch.int32)


@contextmanager
def impose(model: nn.Module, pattern, recorded: list[dict[int, Tensor]]) -> Iterator[None]:
    """Make the stock model attend to the selections that `record_selections` recorded, forward by forward.

    Every layer, also a Shared one, gets the selection of its source layer.
    """
    attentions = [layer.self_attn for layer in model.model.layers]
    stock = [attention.indexer for attention in attentions]
    for layer, attention in enumerate(attentions):
        attention.indexer = _Imposed([forward[pattern.source(layer)] for forward in recorded])
    try:
        yield
    finally:
        for attention, indexer in zip(attentions, stock, strict=True):
            attention.indexer = indexer
