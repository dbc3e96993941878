"""Puts a Hugging Face DSA model (GLM-5.x, DeepSeek-V3.2) on torch.ops.indexcache, with any pattern of Full layers.

    info = apply(model, LayerPattern("FSSF…"))   # or a string; None keeps the checkpoint's own schedule
    model.generate(…)                            # caches, padding, beams and training work as before
    print(info.indexer_calls_per_token, info.index_key_bytes_per_token)
    restore(model)

Only the attention layers change: they run in absorbed MLA form, so caches hold one latent row per token and layer
instead of expanded keys and values, and index keys only for Full layers. Weights and config stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "indexcache_ext.integrations.transformers needs transformers 5.17: pip install 'transformers==5.17.*'"
    ) from error

SUPPORTED_VERSION = "5.17"
if transformers.__version__.split(".")[:2] != SUPPORTED_VERSION.split("."):
    raise ImportError(
        f"indexcache_ext.integrations.transformers supports transformers {SUPPORTED_VERSION}, whose attention layers it"
        f" replaces; found {transformers.__version__}. pip install 'transformers=={SUPPORTED_VERSION}.*'"
    )

from .. import ops as _ops  # noqa: E402, F401  (registers torch.ops.indexcache)
from ..schedule import LayerPattern  # noqa: E402
from ._transformers_attention import SPARSE_CLASSES, index_key_bytes  # noqa: E402
from ._transformers_forward import Forward, IntegrationInfo, begin_forward, observer  # noqa: E402

__all__ = [
    "CacheBytes",
    "IntegrationInfo",
    "apply",
    "cache_bytes",
    "record_selections",
    "restore",
    "selection_agreement",
    "stats",
]


@dataclass
class _Applied:
    info: IntegrationInfo
    hook: torch.utils.hooks.RemovableHandle
    generation: transformers.GenerationConfig | None
    disable_compile: bool | None  # of `generation`, before


def apply(
    model: transformers.PreTrainedModel,
    pattern: LayerPattern | str | None = None,
    *,
    quantised: bool = True,
    hadamard: bool = False,
    ue8m0: bool = False,
) -> IntegrationInfo:
    """Run `model` on torch.ops.indexcache with the layers of `pattern` Full or Shared; returns its counters.

    model: GlmMoeDsaForCausalLM, DeepseekV32ForCausalLM or their decoder stacks, f32 or bf16, on one device.
    pattern: one letter per layer; None takes the checkpoint's own (`LayerPattern.from_config`). Any Full layer of the
    checkpoint may become Shared; a Shared one cannot become Full, as it comes without indexer weights. Applying again
    replaces the pattern; a cache filled before is then refused.
    quantised: FP8 (e4m3) index queries and keys, as serving engines use. False scores in the model's precision like
    the stock indexer, slowly: for comparisons.
    hadamard, ue8m0: options of the quantisation, see `ops.quantize_index_q`.

    Selection is over f32 scores with the lowest position winning a tie, where torch.topk, in the stock model, may
    take either. Where gradients are needed, the attention over the selection runs in plain torch; the indexer gets
    none, as in the stock model. `output_attentions`, biases in the attention mask, masks whose rows are not one window
    of keys, and caches built without the config are refused at the call.

    Raises TypeError for another model, ValueError for a pattern or weights that do not fit, naming the layer; the
    model is then unchanged.
    """
    stack = model.base_model if isinstance(model, transformers.PreTrainedModel) else None
    layers = getattr(stack, "layers", None)
    attentions = [getattr(layer, "self_attn", None) for layer in layers] if layers is not None else []
    stock_types = [getattr(type(attention), "stock", type(attention)) for attention in attentions]
    if not attentions or any(stock not in SPARSE_CLASSES for stock in stock_types):
        raise TypeError(
            "indexcache: expected a model with GLM-MoE-DSA or DeepSeek-V3.2 attention (GlmMoeDsaForCausalLM,"
            f" DeepseekV32ForCausalLM), got {type(model).__name__}"
        )
    if isinstance(pattern, str):
        pattern = LayerPattern(pattern)
    elif pattern is None:
        pattern = LayerPattern.from_config(model.config)
    elif not isinstance(pattern, LayerPattern):
        raise TypeError(f"indexcache: expected pattern to be a LayerPattern or a string, got {type(pattern).__name__}")
    _check(attentions, pattern)

    restore(model)
    info = IntegrationInfo(
        pattern,
        quantised,
        model.config.index_topk,
        index_key_bytes_per_token=sum(
            index_key_bytes(attention.indexer, quantised)
            for attention in attentions
            if pattern.is_full(attention.layer_idx)
        ),
        latent_bytes_per_token=sum(
            (attention.kv_lora_rank + attention.qk_rope_head_dim) * attention.kv_b_proj.weight.element_size()
            for attention in attentions
        ),
        hadamard=hadamard,
        ue8m0=ue8m0,
    )
    for attention, stock in zip(attentions, stock_types, strict=True):
        # The class, not a bound method: copies and pickles of the model stay whole, and hooks on the layer stay valid.
        attention.__class__ = SPARSE_CLASSES[stock]
    hook = stack.register_forward_pre_hook(begin_forward, with_kwargs=True)
    generation = getattr(model, "generation_config", None)
    stack._indexcache = _Applied(info, hook, generation, getattr(generation, "disable_compile", None))
    if generation is not None:
        generation.disable_compile = True  # generate() would compile around a static cache, and windows need the host
    return info


def restore(model: transformers.PreTrainedModel) -> None:
    """Undo `apply`: the stock model again, bit for bit. Does nothing to a model that `apply` was not called on."""
    stack = getattr(model, "base_model", model)
    applied = stack.__dict__.pop("_indexcache", None)
    if applied is None:
        return
    applied.hook.remove()
    for layer in stack.layers:
        layer.self_attn.__class__ = layer.self_attn.stock
    if applied.generation is not None:
        applied.generation.disable_compile = applied.disable_compile


def stats(model: transformers.PreTrainedModel) -> IntegrationInfo:
    """The counters that `apply` returned. Raises ValueError for a model that `apply` was not called on."""
    applied = getattr(getattr(model, "base_model", model), "_indexcache", None)
    if applied is None:
        raise ValueError("indexcache: the model runs its stock attention; call apply(model) first")
    return applied.info


class CacheBytes(NamedTuple):
    """Bytes that a cache holds; `tokens` rows of every sequence (the capacity of a static cache)."""

    latent: int
    index_keys: int
    tokens: int


def cache_bytes(cache: transformers.Cache) -> CacheBytes:
    """What `past_key_values` of a model under `apply` holds, over all layers and sequences."""
    filled = [layer for layer in cache.layers if layer.is_initialized]
    index_keys = [layer.indexer_keys for layer in filled if getattr(layer, "is_indexer_initialized", False)]
    return CacheBytes(
        sum(layer.keys.nbytes + layer.values.nbytes for layer in filled),
        sum(keys.nbytes for keys in index_keys),
        filled[0].keys.shape[-2] if filled else 0,
    )


@contextmanager
def record_selections(model: transformers.PreTrainedModel) -> Iterator[list[dict[int, Tensor]]]:
    """Record what each Full layer selects in the forwards of this thread inside the `with` block.

    Yields a list that gets one dict for each forward: layer to int32 [batch, length, index_topk], positions in the
    (padded) sequence in ascending order, then -1. A Shared layer attends to what `pattern.source(layer)` selected.
    """
    info = stats(model)
    recorded: list[dict[int, Tensor]] = []
    current: Forward | None = None

    def record(forward: Forward, layer: int, selection: Tensor, unquantised: object) -> None:
        nonlocal current
        if forward.info is not info:
            return
        if forward is not current:
            current = forward
            recorded.append({})
        recorded[-1][layer] = forward.windows.to_positions(selection)

    token = observer.set(record)
    try:
        yield recorded
    finally:
        observer.reset(token)


@torch.no_grad()
def selection_agreement(
    model: transformers.PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None
) -> dict[int, float]:
    """How much of the unquantised selection the model's own one keeps: share in [0, 1] for each Full layer.

    Both selections of a layer start from the same hidden states, so differences do not build up over the layers. Only
    queries that see more than index_topk keys count (others select everything); a layer without one is left out.
    input_ids [batch, length], attention_mask as the model takes it.
    """
    info = stats(model)
    shares: dict[int, float] = {}

    def compare(forward: Forward, layer: int, selection: Tensor, unquantised) -> None:
        windows = forward.windows
        choosing = windows.ends - windows.starts.clamp(min=0) > info.index_topk
        if forward.info is not info or not bool(choosing.any()):
            return
        ours, exact = selection[choosing].long(), unquantised()[choosing].long()
        picked = torch.zeros(ours.shape[0], windows.batch * windows.keys + 1, dtype=torch.bool, device=ours.device)
        picked.scatter_(1, ours + 1, True)  # column 0 takes the -1 of a query with NaN scores
        shared = picked.gather(1, exact + 1) & (exact >= 0)
        shares[layer] = (shared.sum() / (exact >= 0).sum()).item()

    token = observer.set(compare)
    try:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        observer.reset(token)
    return shares


def _check(attentions: list[nn.Module], pattern: LayerPattern) -> None:
    if len(pattern) != len(attentions):
        raise ValueError(
            f"indexcache: the pattern {str(pattern)!r} has {len(pattern)} layers, the model has {len(attentions)}"
        )
    for layer, attention in enumerate(attentions):
        if pattern.is_full(layer) and attention.indexer is None:
            raise ValueError(
                f"indexcache: layer {layer} cannot be Full: the model has no indexer weights for it, as its"
                " indexer_types says 'shared'; if the checkpoint's files hold them, load it with indexer_types all 'full'"
            )
        if attention.q_lora_rank is None:
            raise ValueError(f"indexcache: layer {layer} has q_lora_rank None; the indexer reads the query latent")
        if "forward" in vars(attention):
            raise ValueError(
                f"indexcache: the forward of layer {layer} is already replaced (offloading or several devices do so);"
                " load the model on one device, without hooks"
            )
        weight = attention.kv_b_proj.weight
        if type(attention.kv_b_proj) is not nn.Linear or weight.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"indexcache: layer {layer}: expected kv_b_proj to be a plain nn.Linear in float32 or bfloat16, got"
                f" {type(attention.kv_b_proj).__name__} in {str(weight.dtype).removeprefix('torch.')}"
            )
    devices = {parameter.device for attention in attentions for parameter in attention.parameters()}
    if len(devices) != 1 or devices == {torch.device("meta")}:
        raise ValueError(f"indexcache: expected all attention layers on one device, got {sorted(map(str, devices))}")
