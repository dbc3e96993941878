"""The selected tokens of one forward pass, handed from each Full layer to the Shared layers that reuse them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .schedule import LayerPattern


class IndexCache:
    """Holds the indices that the last Full layer selected (IndexCache, arXiv 2603.12201, section 3).

    One object serves one forward at a time: give each concurrent forward, such as a micro-batch, its own, and keep it
    out of modules and configs. Every Full layer overwrites one int32 buffer [max_tokens, topk], allocated once, so a
    captured CUDA graph keeps a valid address. The bookkeeping is on the host: nothing here waits for the device.

        cache = IndexCache(pattern, max_tokens=4096, topk=2048, device="cuda")
        cache.begin(num_tokens)                     # each forward: prefill chunk or decode step, any num_tokens
        for layer in range(len(pattern)):
            indices = cache.select(layer, lambda out: ops.indexer_topk(..., out=out))

    A pipeline stage that holds layers a … b-1 of the model says `first_layer=a, num_layers=b-a`; layers keep their
    numbers of the whole model. If `pattern.is_full(b)` is False, the next stage needs this one's indices: send what
    export() returns and give it to load() there, between begin() and the first select().

    Arguments: `max_tokens` query tokens at most in a forward (batch times length, flattened), `topk` entries per token,
    `num_layers` None for all from `first_layer` on. Raises TypeError or ValueError for arguments that do not fit, and
    RuntimeError for a call out of turn; after any error begin() opens a new forward.
    """

    def __init__(
        self,
        pattern: LayerPattern,
        max_tokens: int,
        topk: int,
        device: torch.device | str = "cpu",
        *,
        first_layer: int = 0,
        num_layers: int | None = None,
    ) -> None:
        if not isinstance(pattern, LayerPattern):
            raise TypeError(f"IndexCache: expected pattern to be a LayerPattern, got {type(pattern).__name__}")
        _check("max_tokens", max_tokens, 0)
        _check("topk", topk, 1)
        _check("first_layer", first_layer, 0, len(pattern) - 1)
        if num_layers is None:
            num_layers = len(pattern) - first_layer
        _check("num_layers", num_layers, 1, len(pattern) - first_layer)
        self.pattern = pattern
        self.max_tokens = max_tokens
        self.topk = topk
        self.first_layer = first_layer
        self.end_layer = first_layer + num_layers
        self._buffer = torch.full((max_tokens, topk), -1, dtype=torch.int32, device=device)
        self._view: torch.Tensor | None = None  # the rows of this forward; None before begin()
        self._next_layer = first_layer
        self._source: int | None = None  # the Full layer whose selection the rows hold; None if nobody's

    def begin(self, num_tokens: int) -> None:
        """Open a forward of `num_tokens` query tokens (0 … max_tokens); whatever an earlier one selected is void.

        Views that select() returned before are overwritten by this forward. May be called at any time, so an aborted
        forward needs no clean-up.
        """
        self._view = None
        _check("num_tokens", num_tokens, 0)
        if num_tokens > self.max_tokens:
            raise ValueError(
                f"IndexCache: expected num_tokens in 0…{self.max_tokens}, got {num_tokens}; the buffer never grows,"
                " construct the cache with a larger max_tokens"
            )
        self._view = self._buffer[:num_tokens]
        self._next_layer = self.first_layer
        self._source = None

    def select(self, layer: int, compute: Callable[..., torch.Tensor | None]) -> torch.Tensor:
        """The indices that `layer` attends to: int32 [num_tokens, topk], a view of the buffer, not to be written to.

        On a Full layer this calls `compute(out=view)`, which must write all of `out`; on a Shared layer it does not
        call `compute` and returns what the source layer wrote. The stage's layers are asked once each, in order.

        Raises RuntimeError before begin(), out of order, for a Shared layer whose source has not run in this forward,
        or if `compute` returns another tensor than `out` (its selection would be lost).
        """
        view = self._opened("select")
        if layer != self._next_layer or layer == self.end_layer:
            expected = f"layer {self._next_layer}" if self._next_layer < self.end_layer else "begin() of a new forward"
            raise RuntimeError(
                f"IndexCache.select: expected {expected}, got layer {layer}; layers are asked once each, in order"
            )
        source = self.pattern.source(layer)
        if source == layer:
            result = compute(out=view)
            if result is not None and result is not view:
                raise RuntimeError(
                    f"IndexCache.select: compute of layer {layer} returned another tensor than out; it must write its"
                    " selection into out"
                )
            self._source = layer
        elif self._source != source:
            raise RuntimeError(
                f"IndexCache.select: layer {layer} is Shared and reuses layer {source}, which has not run in this"
                f" forward; layer {source} is in an earlier pipeline stage, whose export() goes to load() after begin()"
            )
        self._next_layer += 1
        return view

    def export(self) -> torch.Tensor:
        """The indices for the next pipeline stage, int32 [num_tokens, topk]: a view, valid until the next begin().

        Raises RuntimeError until the stage's last layer has been asked.
        """
        view = self._opened("export")
        if self._next_layer != self.end_layer:
            raise RuntimeError(
                f"IndexCache.export: layer {self._next_layer} has not been asked yet; export after layer"
                f" {self.end_layer - 1}, the last of this stage"
            )
        return view

    def load(self, indices: torch.Tensor) -> None:
        """Copy in what the previous stage's export() returned: int32 [num_tokens, topk].

        Comes after begin() and before the first select(). A stage that starts with a Full layer may skip it. The copy
        is queued on the current stream; it makes the host wait only if `indices` is on the host and the cache is not.

        Raises RuntimeError out of turn or on the stage that holds layer 0, and ValueError for another shape or dtype.
        """
        view = self._opened("load")
        if self.first_layer == 0:
            raise RuntimeError("IndexCache.load: this stage holds layer 0, there is no earlier stage to load from")
        if self._next_layer != self.first_layer:
            raise RuntimeError(
                f"IndexCache.load: layer {self._next_layer - 1} has already been asked; load right after begin()"
            )
        if indices.dtype != torch.int32 or indices.shape != view.shape:
            raise ValueError(
                f"IndexCache.load: expected indices to be int32 {list(view.shape)}, got"
                f" {str(indices.dtype).removeprefix('torch.')} {list(indices.shape)}"
            )
        view.copy_(indices)
        self._source = self.pattern.source(self.first_layer - 1)

    def _opened(self, call: str) -> torch.Tensor:
        if self._view is None:
            raise RuntimeError(f"IndexCache.{call}: no forward is open; call begin(num_tokens) first")
        return self._view


def _check(name: str, value: int, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"IndexCache: expected {name} to be an int, got {value!r}")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"in {low}…{high}"
        raise ValueError(f"IndexCache: expected {name} {bounds}, got {value}")
