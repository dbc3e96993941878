"""What one forward pass of a Hugging Face model carries from layer to layer: windows, RoPE table, selections.

The object travels as a keyword argument of the decoder layers. Nothing of it lives on a module, so concurrent forwards
cannot mix, and activation checkpointing, which keeps the keyword arguments, replays a layer on the selection it had.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..cache import IndexCache
from ..schedule import LayerPattern

FORWARD = "indexcache_forward"  # the keyword under which a forward travels
_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")
_LAYOUT = "indexcache_layout"  # marks a cache layer with what its tensors mean
_counting = threading.Lock()

Observer = Callable[["Forward", int, Tensor, Callable[[], Tensor]], None]
# Called as (forward, layer, selection, unquantised) after each indexer run; how selections are recorded and compared.
observer: ContextVar[Observer | None] = ContextVar("indexcache_observer", default=None)

Watcher = Callable[["Forward", int, Tensor, Tensor, float], None]
# Called as (forward, layer, q [T,h,d], kv [N,d], scale) before the attention of each layer.
watcher: ContextVar[Watcher | None] = ContextVar("indexcache_watcher", default=None)


@dataclass
class IntegrationInfo:
    """What `apply` did to a model, and what the model has done since, counted on the host."""

    pattern: LayerPattern
    quantised: bool
    index_topk: int
    index_key_bytes_per_token: int  # over all Full layers
    latent_bytes_per_token: int  # over all layers
    hadamard: bool = False
    ue8m0: bool = False
    forwards: int = 0
    tokens: int = 0  # query tokens, padding included
    indexer_calls: int = 0  # one for each indexer run on each query token

    @property
    def indexer_calls_per_token(self) -> float:
        """How many layers ran their indexer for a token; 0.0 before the first forward."""
        return self.indexer_calls / self.tokens if self.tokens else 0.0

    def reset(self) -> None:
        """Set the counters to zero."""
        with _counting:
            self.forwards = self.tokens = self.indexer_calls = 0

    def count(self, *, forwards: int = 0, tokens: int = 0, indexer_calls: int = 0) -> None:
        """Add to the counters; forwards of several threads may share one model."""
        with _counting:
            self.forwards += forwards
            self.tokens += tokens
            self.indexer_calls += indexer_calls


@dataclass
class Windows:
    """Which keys each query token sees, among the keys of the whole batch laid end to end.

    Sequence b owns the key rows bounds[b] … bounds[b+1]-1. Query b * length + s sees the rows starts … ends-1.
    If the padding leaves a gap inside a sequence, `rows` lists the key rows that are no padding and all the rest counts
    in that list, where the visible keys are a window again; `rows` None means every row.
    """

    batch: int
    length: int  # query tokens of each sequence
    keys: int  # key rows of each sequence, cached ones and room of a static cache included
    starts: Tensor  # int32 [batch * length]
    ends: Tensor  # int32 [batch * length]
    bounds: list[int]
    rows: Tensor | None = None

    def visible(self, flat: Tensor) -> Tensor:
        """The key rows [batch * keys, …] that the windows count in."""
        return flat if self.rows is None else flat[self.rows]

    def to_key_rows_(self, indices: Tensor) -> None:
        """Rewrite indices that count in `rows` as key rows, in place."""
        if self.rows is not None and self.rows.numel() > 0:
            indices.copy_(torch.where(indices >= 0, self.rows[indices.clamp(min=0)], -1))

    def to_positions(self, indices: Tensor) -> Tensor:
        """Key rows [batch * length, K] as positions inside each sequence: int32 [batch, length, K], -1 kept."""
        indices = indices.view(self.batch, self.length, -1)
        first = torch.arange(self.batch, device=indices.device, dtype=indices.dtype)[:, None, None] * self.keys
        return torch.where(indices >= 0, indices - first, -1)


def make_windows(
    batch: int,
    length: int,
    past: int | Tensor,
    keys: int,
    mask: Tensor | None,
    segments: Tensor | None,
    device: torch.device | str,
) -> Windows:
    """The windows of `batch` sequences whose first query stands at key `past`.

    mask: None, [batch, seen tokens] (0 is padding), or [batch or 1, 1, length, keys] (bool, or additive with 0 where
    a key is visible). segments: position ids [batch or 1, length] that restart where packed sequences begin, or None.
    """
    if batch * keys > torch.iinfo(torch.int32).max:
        raise ValueError(
            f"indexcache: {batch} sequences of {keys} keys are more than int32 indices can name; use a smaller batch"
        )
    last = (torch.arange(length, device=device) + past).expand(batch, length)  # the key of each query itself
    starts, ends, seen = torch.zeros_like(last), last + 1, None
    if mask is not None and mask.dim() == 4:
        starts, ends, seen = _read_4d_mask(mask.to(device), batch, length, keys)
    elif mask is not None:
        if mask.dim() != 2 or mask.shape[0] != batch:
            raise ValueError(f"indexcache: expected attention_mask [{batch}, tokens] or 4D, got {list(mask.shape)}")
        seen = nn.functional.pad(mask.to(device, torch.bool), (0, max(0, keys - mask.shape[1])))[:, :keys]
    elif segments is not None:
        breaks = segments.to(device).expand(batch, -1).diff(dim=-1) != 1
        starts = torch.where(nn.functional.pad(breaks, (1, 0)), last, 0).cummax(-1).values

    rows = None
    base = torch.arange(batch, device=device)[:, None] * keys
    bounds = [b * keys for b in range(batch + 1)]
    if seen is not None:
        first, stop, count = _extent(seen)
        if bool((stop - first == count).all()):
            starts, ends = torch.maximum(starts, first[:, None]), torch.minimum(ends, stop[:, None])
        else:  # padding inside a sequence: count in the rows that are left
            before = nn.functional.pad(seen.cumsum(-1), (1, 0))
            starts, ends = before.gather(1, starts), before.gather(1, ends)
            rows = seen.flatten().nonzero().squeeze(-1).to(torch.int32)
            base = (count.cumsum(0) - count)[:, None]
            bounds = [*base.flatten().tolist(), rows.numel()]
    flat = [(base + edge).to(torch.int32).flatten() for edge in (starts, ends)]
    return Windows(batch, length, keys, *flat, bounds, rows)


def _extent(shown: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the True entries of each row start and stop, and how many there are; 0, 0, 0 for a row without any."""
    count = shown.sum(-1)
    stop = shown.shape[-1] - shown.flip(-1).int().argmax(-1)
    return shown.int().argmax(-1), torch.where(count > 0, stop, 0), count


def _read_4d_mask(mask: Tensor, batch: int, length: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first and the end of the keys that each query sees [batch, length], and the keys that any sees [batch, keys]."""
    if mask.shape[0] not in (1, batch) or tuple(mask.shape[1:]) != (1, length, keys):
        raise ValueError(
            f"indexcache: expected a 4D attention_mask [{batch}, 1, {length}, {keys}], got {list(mask.shape)}"
        )
    mask = mask[:, 0].expand(batch, -1, -1)
    shown = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((shown | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        raise ValueError(
            "indexcache: attention_mask holds values that neither show nor hide a key; biases are not supported"
        )
    first, stop, count = _extent(shown)
    seen = shown.any(1)
    before = nn.functional.pad(seen.cumsum(-1), (1, 0))
    if not bool((before.gather(1, stop) - before.gather(1, first) == count).all()):
        raise ValueError(
            "indexcache: the 4D attention_mask hides a key from a query that sees keys on both sides of it, and shows"
            " it to another; a query sees one window of the sequence's keys here"
        )
    return first, stop, seen


class _KeptSelections:
    """The holder for a forward with a graph: every selection stays, for backward may replay any layer on it."""

    def __init__(self, pattern: LayerPattern, tokens: int, topk: int, device: torch.device) -> None:
        self._pattern = pattern
        self._new = partial(torch.empty, (tokens, topk), dtype=torch.int32, device=device)
        self._selected: dict[int, Tensor] = {}

    def select(self, layer: int, compute: Callable[..., Any]) -> Tensor:
        source = self._pattern.source(layer)
        if source not in self._selected:
            if source != layer:
                raise RuntimeError(f"indexcache: layer {layer} reuses layer {source}, which has not run in it")
            out = self._new()
            compute(out=out)
            self._selected[layer] = out
        return self._selected[source]


@dataclass
class Forward:
    """One forward pass: the windows of its queries, the selection holder and the cache tensors' layout."""

    info: IntegrationInfo
    windows: Windows
    holder: IndexCache | _KeptSelections
    observe: Observer | None = field(default_factory=observer.get)
    watch: Watcher | None = field(default_factory=watcher.get)
    _rope: tuple[Tensor, Tensor] | None = None

    def rope_table(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The `cos_sin` table f32 [tokens, rot] of these query tokens, one row each, and their row numbers."""
        if self._rope is None:
            half = cos.shape[-1] // 2
            table = torch.cat([cos[..., :half], sin[..., :half]], dim=-1).float()
            table = table.expand(self.windows.batch, -1, -1).reshape(-1, 2 * half).contiguous()
            self._rope = table, torch.arange(table.shape[0], dtype=torch.int32, device=table.device)
        return self._rope

    def append_latent(self, cache: Cache | None, layer: int, latent: Tensor) -> Tensor:
        """Cache the latents [batch, length, d_qk] of a layer; returns those of all keys, [batch, keys, d_qk]."""
        if cache is not None:
            self._claim(cache, layer)
            # One row holds key and value (the value is the key's first kv_lora_rank dims), so `values` has no width.
            new = latent.unsqueeze(1)
            latent = cache.update(new, new[..., :0], layer)[0].squeeze(1)
        if latent.shape[1] != self.windows.keys:
            raise ValueError(
                f"indexcache: layer {layer} sees {latent.shape[1]} keys where the model expects {self.windows.keys};"
                " pass no past_key_values when gradient checkpointing drops them"
            )
        return latent

    def append_index_keys(self, cache: Cache | None, layer: int, keys: Tensor) -> Tensor:
        """Cache the index keys [batch, length, width] of a Full layer; returns those of all keys."""
        return keys if cache is None else cache.update_indexer(keys, layer)

    def _claim(self, cache: Cache, layer: int) -> None:
        """Refuse a cache layer whose tensors mean something else than what this model writes."""
        entry = cache.layers[layer] if layer < len(cache.layers) else None
        if not hasattr(entry, "update_indexer"):
            raise ValueError(
                f"indexcache: layer {layer} of the {type(cache).__name__} has no room for index keys; build it with"
                " the config: DynamicCache(config=model.config) or StaticCache(model.config, max_cache_len)"
            )
        info = self.info
        layout = (str(info.pattern), info.quantised, info.hadamard, info.ue8m0)
        if entry.is_initialized and getattr(entry, _LAYOUT, None) != layout:
            raise ValueError(
                f"indexcache: layer {layer} of the cache was filled by the stock model or under another pattern or"
                " quantisation, so it lacks tensors that this model reads; start with a fresh cache"
            )
        setattr(entry, _LAYOUT, layout)


def begin_forward(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of the decoder stack: replaces the attention mask by windows, and hands the layers a `Forward`.

    The layers get no mask at all, so none of [tokens, keys] is ever built.
    """
    kwargs = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    config, info = model.config, model._indexcache.info
    if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
        raise ValueError(
            "indexcache: output_attentions is not supported, the sparse kernels never form that matrix; restore(model)"
            " gives the stock attention, which does"
        )
    if not getattr(config, "is_causal", True) or kwargs.get("is_causal") is False:
        raise ValueError("indexcache: is_causal=False is not supported, the indexer is trained on causal windows")
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        return args, kwargs  # the model itself says what is missing
    batch, length = tokens.shape[:2]
    cache = kwargs.get("past_key_values")
    past, keys = 0, length
    if cache is not None:
        past = cache.get_seq_length()
        keys, offset = cache.get_mask_sizes(length, 0)
        if offset != 0:
            raise ValueError(f"indexcache: expected a cache that starts at key 0, got one that starts at {offset}")
        past = past.to(tokens.device) if isinstance(past, Tensor) else past
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):  # made ahead by generate(); every layer of these models is of one type
        mask = next(iter(mask.values()))
    # The stock model looks for packed sequences only where nothing else describes them, and no cache is in use.
    packed = mask is None and cache is None and not _makes_cache(model, kwargs)
    windows = make_windows(
        batch, length, past, keys, mask, kwargs.get("position_ids") if packed else None, tokens.device
    )
    count = batch * length
    if torch.is_grad_enabled():
        holder = _KeptSelections(info.pattern, count, info.index_topk, tokens.device)
    else:
        holder = IndexCache(info.pattern, count, info.index_topk, tokens.device)
        holder.begin(count)
    info.count(forwards=1, tokens=count)
    kwargs["attention_mask"] = dict.fromkeys(config.layer_types)
    kwargs[FORWARD] = Forward(info, windows, holder)
    return (), kwargs


def _makes_cache(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    if getattr(model, "gradient_checkpointing", False) and model.training:
        return False
    return bool(model.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"])

