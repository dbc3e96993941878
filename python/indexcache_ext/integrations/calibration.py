"""The loss of a Hugging Face DSA model on a calibration set under any pattern, as a search needs it.

    loss = CalibrationLoss(model, tokens)            # tokens int64 [windows, context]
    trace = greedy_search(loss, loss.num_layers, trace="trace.json")

A candidate differs from the pattern so far in one layer, so it runs from that layer on: the layers before it, and the
selection that it reuses, are kept from one run of the pattern itself. About half of the work, and the same bits. The run of
a pattern starts in the same way from that of the pattern before, where the calibration set is one batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from ..cache import IndexCache
from ..overlap import Overlap, OverlapMeter
from ..schedule import LayerPattern
from ..search import ALL_FULL
from ._transformers_forward import FORWARD, Forward, observer, watcher
from .checkpoints import CalibrationError, fingerprint
from .transformers import apply, stats

_LOGIT_ROWS = 4096  # tokens whose logits are held at a time


@dataclass
class _Run:
    """One run of a pattern on a batch, from any layer of which another run can start."""

    pattern: LayerPattern
    batch: int
    loss: float
    forward: Forward
    inputs: list[tuple[tuple, dict[str, Any]]]  # of each layer
    selections: dict[int, Tensor]  # of each Full layer


class CalibrationLoss:
    """Mean next-token cross entropy in nats over `tokens`, a callable of a LayerPattern and Trials of a search.

    model: as `integrations.transformers.apply` takes it, with an indexer in every layer; it stays applied, all Full.
    tokens: int64 [windows, context]. batch_size: windows that run together; the inputs of every layer are kept for one
    batch. quantised: see `apply`.

    Raises CalibrationError if the context is not longer than index_topk: then every layer selects everything, and every
    pattern has the same loss.
    """

    def __init__(
        self, model: transformers.PreTrainedModel, tokens: Tensor, *, batch_size: int = 1, quantised: bool = True
    ) -> None:
        self.model, self.stack = model, model.base_model
        self.num_layers = len(self.stack.layers)
        topk, (windows, context) = model.config.index_topk, tokens.shape
        if context <= topk:
            raise CalibrationError(
                f"the context of {context:,} tokens is not longer than index_topk, {topk:,}: every layer would select"
                f" everything and every pattern cost nothing; use a --context well above {topk:,}"
            )
        self.batches = tokens.split(batch_size)
        self.weights = [len(batch) for batch in self.batches]
        self.info = apply(model, LayerPattern("F" * self.num_layers), quantised=quantised)
        self.identity = {
            "model": fingerprint(model),
            "calibration": hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()[:12],
            "windows": f"{windows} of {context} tokens",
            "selection": "fp8" if quantised else str(model.dtype).removeprefix("torch."),
        }
        self._run: _Run | None = None  # the last one of trials()

    @torch.no_grad()
    def __call__(self, pattern: LayerPattern) -> float:
        """The loss of a pattern, from the first layer on."""
        self.set_pattern(pattern)
        losses = [self._whole(pattern, batch).loss for batch in range(len(self.weights))]
        return math.fsum(w * loss for w, loss in zip(self.weights, losses, strict=True)) / sum(self.weights)

    @torch.no_grad()
    def trials(self, pattern: LayerPattern, layers: Sequence[int], batch: int) -> Iterator[tuple[int, float]]:
        """See `search.Trials`."""
        self.set_pattern(pattern)
        run = self._run = self._run_of(pattern, batch)
        for layer in layers:
            yield layer, run.loss if layer == ALL_FULL else self._from(run, pattern.share(layer), layer).loss

    def set_pattern(self, pattern: LayerPattern) -> None:
        """Under which the model runs next. Raises ValueError if another loss or `apply` took it over."""
        if stats(self.model) is not self.info:
            raise ValueError("CalibrationLoss: the model was applied again since; make a new CalibrationLoss")
        self.info.pattern = pattern

    def _run_of(self, pattern: LayerPattern, batch: int) -> _Run:
        run, self._run = self._run, None
        if run is None or run.batch != batch:
            run = None  # its memory goes first
            return self._whole(pattern, batch)
        changed = [layer for layer in range(self.num_layers) if run.pattern.is_full(layer) != pattern.is_full(layer)]
        return self._from(run, pattern, changed[0], keep=True) if changed else run

    def _whole(self, pattern: LayerPattern, batch: int) -> _Run:
        tokens = self.batches[batch].to(self.model.device)
        inputs: list[tuple[tuple, dict[str, Any]]] = []
        selections: dict[int, Tensor] = {}

        def keep(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            inputs.append((args, kwargs))

        with _hooked(self.stack.layers, keep), _set(observer, _recorder(selections)):
            hidden = self.stack(input_ids=tokens, use_cache=False).last_hidden_state
        return _Run(pattern, batch, self._loss(hidden, tokens), inputs[0][1][FORWARD], inputs, selections)

    def _from(self, run: _Run, pattern: LayerPattern, first: int, *, keep: bool = False) -> _Run:
        """The run of `pattern`, which is `run`'s up to layer `first`; without `keep` no other can start from it."""
        tokens = self.batches[run.batch].to(self.model.device)
        holder = IndexCache(pattern, tokens.numel(), self.info.index_topk, self.model.device, first_layer=first)
        holder.begin(tokens.numel())
        if not pattern.is_full(first):
            holder.load(run.selections[pattern.source(first)])
        inputs = run.inputs[:first]
        selections = {layer: selection for layer, selection in run.selections.items() if layer < first}
        forward = replace(run.forward, holder=holder, observe=_recorder(selections) if keep else None)
        hidden = run.inputs[first][0][0]
        for layer, (args, kwargs) in zip(self.stack.layers[first:], run.inputs[first:], strict=True):
            if keep:
                inputs.append(((hidden, *args[1:]), kwargs))
            result = layer(hidden, *args[1:], **{**kwargs, FORWARD: forward})
            hidden = result[0] if isinstance(result, tuple) else result
        return _Run(pattern, run.batch, self._loss(self.stack.norm(hidden), tokens), run.forward, inputs, selections)

    def _loss(self, hidden: Tensor, tokens: Tensor) -> float:
        head, targets = self.model.get_output_embeddings(), tokens[:, 1:].flatten()
        total = 0.0
        for rows, wanted in zip(
            hidden[:, :-1].flatten(0, 1).split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=True
        ):
            total += F.cross_entropy(head(rows).float(), wanted, reduction="none").double().sum().item()
        return total / len(targets)


def _recorder(selections: dict[int, Tensor]) -> Callable[..., None]:
    """An observer of Full layers that keeps what each selects."""

    def record(forward: Forward, layer: int, selection: Tensor, unquantised: object) -> None:
        selections[layer] = selection.clone()

    return record


@torch.no_grad()
def measure_overlap(loss: CalibrationLoss, *, queries: int = 128, progress=lambda windows: None) -> Overlap:
    """Overlap of the selections and recall of the attention, with all layers Full, over the calibration set of `loss`.

    queries: how many of a window count, evenly spaced over those that see more than index_topk keys. Their attention is
    computed over all keys, [heads, queries, context] at a time. progress: called with the number of windows done.
    """
    stack, topk = loss.stack, loss.info.index_topk
    meter = OverlapMeter(loss.num_layers, topk)
    for window in torch.cat(loss.batches):
        context = len(window)
        rows = torch.linspace(topk, context - 1, min(queries, context - topk)).round().long().to(loss.model.device)
        selections: dict[int, Tensor] = {}
        attention: dict[int, Tensor] = {}

        def attend(
            forward: Forward, layer: int, q: Tensor, kv: Tensor, scale: float, rows=rows, kept=attention
        ) -> None:
            scores = torch.einsum("rhd,nd->hrn", q[rows].float(), kv.float()) * scale
            hidden = torch.arange(len(kv), device=kv.device) > rows[:, None]
            kept[layer] = scores.masked_fill(hidden, -torch.inf).softmax(-1).mean(0)

        loss.set_pattern(LayerPattern("F" * loss.num_layers))
        with _set(observer, _recorder(selections)), _set(watcher, attend):
            stack(input_ids=window[None].to(loss.model.device), use_cache=False)
        layers = range(loss.num_layers)
        meter.add(torch.stack([selections[i][rows] for i in layers]), torch.stack([attention[i] for i in layers]))
        progress(1)
    return meter.result(loss.identity)


@contextmanager
def _hooked(layers: nn.ModuleList, hook) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _set(variable: ContextVar, value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
