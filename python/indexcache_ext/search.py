"""Training-free IndexCache: which layers can do without an indexer, by greedy search on a loss.

IndexCache (arXiv 2603.12201, section 3.1.2, algorithm 1): start with every layer Full; again and again make the layer
Shared that costs the least, by the loss on a fixed calibration set. Patterns of one search nest, so one trace holds the
pattern for every share of indexers kept.

    trace = greedy_search(loss, num_layers=47, trace="trace.json")   # loss: any callable from LayerPattern to float
    trace.pattern(keep=1 / 4)

Interrupt it and call it again with the same file: it goes on where it was. For models see
`indexcache_ext.integrations.calibration`, on the command line `indexcache search`.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch.distributed as dist

from .schedule import LayerPattern

FORMAT = 1  # of saved traces
ALL_FULL = -1  # stands for the pattern as it is where a candidate layer is named


class RankError(RuntimeError):
    """Another process of the search failed; the message is its error."""


@runtime_checkable
class Trials(Protocol):
    """A loss that measures candidates batch by batch, which may be much cheaper than whole evaluations.

    The loss of a pattern is the mean over the batches, weighted by `weights`. `identity` says what is measured: a trace
    is only continued with an equal one.
    """

    weights: Sequence[float]
    identity: dict[str, str]

    def trials(self, pattern: LayerPattern, layers: Sequence[int], batch: int) -> Iterator[tuple[int, float]]:
        """For each of `layers`, in any order: the layer and the loss of `batch` under `pattern.share(layer)`.

        ALL_FULL among the layers means `pattern` itself. Calls for the same pattern and batch come one after another.
        """


@dataclass(frozen=True)
class Flip:
    """A layer that became Shared, the loss with it, and the loss that each candidate of that step would have had."""

    layer: int
    loss: float
    candidates: dict[int, float]


@dataclass
class SearchTrace:
    """What a search has found so far: the order in which layers became Shared, with every candidate's loss.

    full_loss: that of all layers Full; None until it is measured. identity: what was measured (see Trials). partial:
    losses of the step under way, by candidate and batch.
    """

    num_layers: int
    stages: int = 1
    identity: dict[str, str] = field(default_factory=dict)
    full_loss: float | None = None
    flips: list[Flip] = field(default_factory=list)
    partial: dict[int, dict[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least_one("num_layers", self.num_layers)
        _at_least_one("stages", self.stages)
        if self.stages > self.num_layers:
            raise ValueError(f"search: {self.stages} stages need as many layers, the model has {self.num_layers}")

    @property
    def current(self) -> LayerPattern:
        """The pattern after all flips."""
        return self._after(len(self.flips))

    def pattern(self, keep: float) -> LayerPattern:
        """The pattern with `ceil(keep * num_layers)` Full layers, at least one.

        Raises ValueError if keep is not in (0, 1], if the search has not come that far, or if fewer layers would be
        Full than there are stages.
        """
        if not 0 < keep <= 1:
            raise ValueError(f"SearchTrace.pattern: expected keep in (0, 1], got {keep}")
        full = max(1, math.ceil(keep * self.num_layers - 1e-9))
        if full < self.stages:
            raise ValueError(
                f"SearchTrace.pattern: keep={keep:g} leaves {full} Full layers, but the first layer of each of"
                f" {self.stages} stages stays Full"
            )
        needed = self.num_layers - full
        if needed > len(self.flips):
            raise ValueError(
                f"SearchTrace.pattern: keep={keep:g} needs {needed} Shared layers, the search has found"
                f" {len(self.flips)}; let it go on"
            )
        return self._after(needed)

    def curve(self) -> list[tuple[int, float]]:
        """Number of Full layers and loss: all Full first, then after each flip."""
        start = [] if self.full_loss is None else [(self.num_layers, self.full_loss)]
        return start + [(self.num_layers - i, flip.loss) for i, flip in enumerate(self.flips, 1)]

    def candidates(self) -> list[int]:
        """The layers, one of which flips next: of the whole model, or of the stage whose turn it is."""
        edges = [self.num_layers * stage // self.stages for stage in range(self.stages + 1)]
        blocks = [range(first + 1, end) for first, end in zip(edges, edges[1:], strict=False)]
        turns = [block for step in range(self.num_layers) for block in blocks if step < len(block)]
        if len(self.flips) == len(turns):
            return []
        taken = {flip.layer for flip in self.flips}
        return [layer for layer in turns[len(self.flips)] if layer not in taken]

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON: the file is the old or the new trace at any moment, whatever happens.

        Raises OSError if it cannot be written, as on a full disk; the last saved trace is then still there.
        """
        path = Path(path)
        temporary = path.with_name(path.name + ".new")
        try:
            with temporary.open("w") as file:
                json.dump(self._to_json(), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            reason = f"the trace cannot be saved to {path} ({error.strerror}); what was saved before is still there"
            raise OSError(error.errno, reason) from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> SearchTrace:
        """Read what save() wrote. Raises FileNotFoundError, or ValueError for anything that is not a trace."""
        text = Path(path).read_text()
        try:
            saved = json.loads(text)
            if saved["format"] != FORMAT:
                raise ValueError(f"format {saved['format']}, expected {FORMAT}")
            trace = cls(saved["num_layers"], saved["stages"], dict(saved["identity"]), saved["full_loss"])
            for flip in saved["flips"]:
                losses = {int(layer): float(loss) for layer, loss in flip["candidates"].items()}
                if losses.keys() != set(trace.candidates()) or flip["layer"] not in losses:
                    raise ValueError(f"the flip of layer {flip['layer']} is not one of this search")
                trace.flips.append(Flip(flip["layer"], losses[flip["layer"]], losses))
            trace.partial = {
                int(layer): {int(batch): float(loss) for batch, loss in losses.items()}
                for layer, losses in saved["partial"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a trace of a search, or it is damaged: {error}") from error
        return trace

    def plot(self, path: str | os.PathLike) -> None:
        """Draw the loss over the number of Full layers, with the layer that each step gave up. Needs matplotlib."""
        from . import pictures

        pictures.save(pictures.loss_curve(self), path)

    def _after(self, flips: int) -> LayerPattern:
        shared = {flip.layer for flip in self.flips[:flips]}
        return LayerPattern("".join("S" if layer in shared else "F" for layer in range(self.num_layers)))

    def _to_json(self) -> dict[str, Any]:
        flips = [{"layer": f.layer, "loss": f.loss, "candidates": f.candidates} for f in self.flips]
        return {
            "format": FORMAT,
            "num_layers": self.num_layers,
            "stages": self.stages,
            "identity": self.identity,
            "full_loss": self.full_loss,
            "flips": flips,
            "partial": self.partial,
        }


def greedy_search(
    loss: Callable[[LayerPattern], float] | Trials,
    num_layers: int,
    *,
    stages: int = 1,
    stop: int | None = None,
    trace: SearchTrace | str | os.PathLike | None = None,
    progress: bool = True,
) -> SearchTrace:
    """Make layers Shared one by one, the cheapest first, until `stop` of them are or none is left.

    loss: a callable from LayerPattern to a finite float, the same every time; or Trials. Of equal losses the lowest
    layer wins.
    stages: pipeline stages; stage s of S holds the layers n s // S … n (s + 1) // S - 1. The first of each stays Full,
    and the stages take turns: one flip each. That is S times fewer trials, and no stage needs the indices of another.
    trace: what to go on from; a path is read if it exists, and written after every trial.
    progress: a bar with the time left on stderr, if that is a terminal and tqdm is there.

    Where `torch.distributed` runs, call it in every rank: the candidates are spread over the ranks, all get the trace
    of a single process, rank 0 writes it, and a rank's error ends the search in all of them.

    Raises ValueError for a trace of another search and for a loss that is not finite, TypeError for wrong arguments,
    RankError for what another rank raised.
    """
    measured = loss if isinstance(loss, Trials) else _Plain(loss)
    path = None if trace is None or isinstance(trace, SearchTrace) else Path(trace)
    group = _Ranks()
    if path is not None:
        trace = group.from_first(lambda: SearchTrace.load(path) if path.exists() else None)
    trace = _continued(trace, SearchTrace(num_layers, stages, dict(measured.identity)))
    write = path is not None and group.rank == 0

    def record(layer: int, batch: int, value: float) -> None:
        trace.partial.setdefault(layer, {})[batch] = value

    left = _trials_left(trace, stop) * len(measured.weights) - sum(map(len, trace.partial.values()))
    with progress_bar(left, shown=progress and group.rank == 0) as advance:
        while layers := _next(trace, stop):
            for batch in range(len(measured.weights)):
                missing = [layer for layer in layers if batch not in trace.partial.get(layer, {})]
                run = partial(_run, measured, trace.current, batch)
                for found in group.share_out(missing, run):
                    for layer, value in found:
                        record(layer, batch, value)
                    if write:
                        trace.save(path)
                    advance(len(found))
            _commit(trace, layers, measured.weights)
            if write:
                trace.save(path)
    return trace


class _Plain:
    """A plain callable as Trials of one batch."""

    weights = (1.0,)

    def __init__(self, loss: Callable[[LayerPattern], float]) -> None:
        if not callable(loss):
            raise TypeError(f"search: expected loss to be callable, got {type(loss).__name__}")
        self.loss, self.identity = loss, dict(getattr(loss, "identity", {}))

    def trials(self, pattern: LayerPattern, layers: Sequence[int], batch: int) -> Iterator[tuple[int, float]]:
        for layer in layers:
            yield layer, float(self.loss(pattern if layer == ALL_FULL else pattern.share(layer)))


def _continued(trace: SearchTrace | None, fresh: SearchTrace) -> SearchTrace:
    """`trace` if it is one of the search that `fresh` begins, or `fresh` if there is none."""
    if trace is None:
        return fresh
    for name in ("num_layers", "stages"):
        old, new = getattr(trace, name), getattr(fresh, name)
        if old != new:
            raise ValueError(f"search: the trace is of a search with {name} {old}, not {new}; start a new one")
    for key in {**trace.identity, **fresh.identity}:
        old, new = trace.identity.get(key), fresh.identity.get(key)
        if old != new:
            raise ValueError(f"search: the trace was made with {key} {old}, this is {new}; start a new one")
    return trace


def _next(trace: SearchTrace, stop: int | None) -> list[int]:
    """The candidates of the next step; none when the search is over."""
    if trace.full_loss is None:
        return [ALL_FULL]
    return [] if stop is not None and len(trace.flips) >= stop else trace.candidates()


def _commit(trace: SearchTrace, layers: list[int], weights: Sequence[float]) -> None:
    total = math.fsum(weights)
    losses = {
        layer: math.fsum(w * trace.partial[layer][batch] for batch, w in enumerate(weights)) / total for layer in layers
    }
    trace.partial = {}
    if layers == [ALL_FULL]:
        trace.full_loss = losses[ALL_FULL]
    else:
        best = min(layers, key=lambda layer: (losses[layer], layer))
        trace.flips.append(Flip(best, losses[best], losses))


def _trials_left(trace: SearchTrace, stop: int | None) -> int:
    ahead = SearchTrace(trace.num_layers, trace.stages, flips=list(trace.flips), full_loss=trace.full_loss)
    count = 0
    while layers := _next(ahead, stop):
        count += len(layers)
        if layers == [ALL_FULL]:
            ahead.full_loss = 0.0
        else:
            ahead.flips.append(Flip(layers[0], 0.0, {}))
    return count


def _run(measured: Trials, pattern: LayerPattern, batch: int, layers: list[int]) -> Iterator[tuple[int, float]]:
    for layer, value in measured.trials(pattern, layers, batch):
        if not math.isfinite(value):
            tried = pattern if layer == ALL_FULL else pattern.share(layer)
            raise ValueError(f"search: the loss of {tried} is {value}; a search needs finite losses")
        yield layer, value


class _Ranks:
    """The processes that search together; one if `torch.distributed` does not run."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns, or raises, on rank 0."""
        return self._gathered(make if self.rank == 0 else lambda: None)[0]

    def share_out(
        self, layers: list[int], run: Callable[[list[int]], Iterable[tuple[int, float]]]
    ) -> Iterator[list[tuple[int, float]]]:
        """The results of all ranks, in parts of one of each rank."""
        if self.count == 1:
            for result in run(layers) if layers else ():
                yield [result]
        for first in range(0, len(layers) if self.count > 1 else 0, self.count):
            own = layers[first : first + self.count][self.rank : self.rank + 1]
            parts = self._gathered(lambda own=own: list(run(own)) if own else [])
            yield [result for part in parts for result in part]

    def _gathered(self, make: Callable[[], Any]) -> list[Any]:
        """What `make` returns in each rank, in all of them; so is an error of any."""
        if self.count == 1:
            return [make()]
        result, error = None, None
        try:
            result = make()
        except Exception as raised:
            error = raised
        told: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(told, (result, None if error is None else f"{type(error).__name__}: {error}"))
        except RuntimeError as lost:
            reason = str(lost).partition("\n")[0]
            raise error or RankError(
                f"search: another rank is gone, it may have been killed; the trace holds what it found: {reason}"
            ) from lost
        if error is not None:
            raise error
        for rank, (_, message) in enumerate(told):
            if message is not None:
                raise RankError(f"search: rank {rank} failed: {message}")
        return [result for result, _ in told]


@contextmanager
def progress_bar(total: int, *, unit: str = "trial", shown: bool = True) -> Iterator[Callable[[int], object]]:
    """`with progress_bar(n) as advance`: advance(1) moves a bar on stderr, if that is a terminal and tqdm is there."""
    bar = None
    if shown and sys.stderr.isatty():
        try:
            from tqdm import tqdm

            bar = tqdm(total=total, unit=unit, file=sys.stderr, smoothing=0)
        except ImportError:
            pass
    try:
        yield (lambda n: None) if bar is None else bar.update
    finally:
        if bar is not None:
            bar.close()


def _at_least_one(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"search: expected {name} to be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"search: expected {name} to be at least 1, got {value}")
