"""Greedy search on losses that a table gives: what it chooses, saves, continues and refuses. No model is needed."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import signal
from pathlib import Path

import pytest
import torch.multiprocessing as multiprocessing
from indexcache_ext.schedule import LayerPattern
from indexcache_ext.search import Flip, RankError, SearchTrace, greedy_search

LAYERS = 6


def table(seed: int, layers: int = LAYERS, levels: int | None = None) -> dict[str, float]:
    """A loss for every pattern; `levels`: of so few values that many are equal."""
    draw = random.Random(seed)
    value = draw.random if levels is None else lambda: draw.randrange(levels) / 4
    return {"F" + "".join(rest): value() for rest in itertools.product("FS", repeat=layers - 1)}


class Counted:
    """A loss from a table that remembers what it was asked, and fails at the n-th call."""

    def __init__(
        self, losses: dict[str, float], fail_at: int | None = None, error: BaseException | None = None
    ) -> None:
        self.losses, self.fail_at, self.error, self.asked = losses, fail_at, error, []

    def __call__(self, pattern: LayerPattern) -> float:
        self.asked.append(str(pattern))
        if len(self.asked) == self.fail_at:
            raise self.error
        return self.losses[str(pattern)]


@pytest.mark.parametrize("levels", [None, 3], ids=["distinct", "ties"])
@pytest.mark.parametrize("seed", range(20))
def test_each_step_is_the_best_of_all_patterns_one_flip_away(seed: int, levels: int | None) -> None:
    losses = table(seed, levels=levels)
    loss = Counted(losses)
    trace = greedy_search(loss, LAYERS)
    pattern = "F" * LAYERS
    assert trace.full_loss == losses[pattern]
    for flip in trace.flips:
        near = {p: [i for i in range(LAYERS) if p[i] != pattern[i]] for p in losses}
        near = {p: i[0] for p, i in near.items() if len(i) == 1 and p[i[0]] == "S"}
        assert flip.candidates == {layer: losses[p] for p, layer in near.items()}
        best = min(near, key=lambda p: (losses[p], near[p]))
        assert (flip.layer, flip.loss) == (near[best], losses[best])
        pattern = best
    assert pattern == "F" + "S" * (LAYERS - 1) == str(trace.current)
    assert len(loss.asked) == len(set(loss.asked)) == 1 + LAYERS * (LAYERS - 1) // 2


def test_patterns_nest_and_hold_as_many_full_layers_as_asked() -> None:
    trace = greedy_search(Counted(table(3, 9)), 9)
    patterns = [trace.pattern(keep=count / 9) for count in range(1, 10)]
    assert [str(p).count("F") for p in patterns] == list(range(1, 10))
    for fewer, more in itertools.pairwise(patterns):
        assert all(more.is_full(layer) for layer in range(9) if fewer.is_full(layer))
    assert str(trace.pattern(keep=1 / 4)).count("F") == math.ceil(9 / 4)
    assert trace.curve() == [(9, trace.full_loss)] + [(8 - i, f.loss) for i, f in enumerate(trace.flips)]


@pytest.mark.parametrize(("layers", "stages"), [(8, 2), (9, 4), (7, 3), (5, 5)])
def test_stages_begin_full_and_take_turns(layers: int, stages: int) -> None:
    trace = greedy_search(Counted(table(1, layers)), layers, stages=stages)
    edges = [layers * s // stages for s in range(stages + 1)]
    sizes = [end - first for first, end in itertools.pairwise(edges)]
    for count in range(len(trace.flips) + 1):
        trace._after(count).check_stages(sizes)
    stage_of = {layer: s for s in range(stages) for layer in range(edges[s], edges[s + 1])}
    turns = [stage_of[flip.layer] for flip in trace.flips]
    wanted = [s for step in range(layers) for s in range(stages) if step < sizes[s] - 1]
    assert turns == wanted
    for flip in trace.flips:
        assert {stage_of[layer] for layer in flip.candidates} == {stage_of[flip.layer]}


def test_stop_and_go_on() -> None:
    losses = table(5)
    part = greedy_search(Counted(losses), LAYERS, stop=2)
    assert len(part.flips) == 2
    with pytest.raises(ValueError, match=r"keep=0\.25 needs 4 Shared layers, the search has found 2"):
        part.pattern(keep=1 / 4)
    rest = Counted(losses)
    assert greedy_search(rest, LAYERS, trace=part) == greedy_search(Counted(losses), LAYERS)
    assert len(rest.asked) == 3 + 2 + 1


@pytest.mark.parametrize("fail_at", range(1, 1 + LAYERS * (LAYERS - 1) // 2 + 1))
def test_interrupted_anywhere_it_goes_on_where_it_was(tmp_path: Path, fail_at: int) -> None:
    losses, file = table(7), tmp_path / "trace.json"
    first = Counted(losses, fail_at, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        greedy_search(first, LAYERS, trace=file)
    second = Counted(losses)
    trace = greedy_search(second, LAYERS, trace=file)
    assert trace == greedy_search(Counted(losses), LAYERS) == SearchTrace.load(file)
    assert first.asked[:-1] + second.asked == list(dict.fromkeys(first.asked[:-1] + second.asked))  # nothing twice
    assert greedy_search(never, LAYERS, trace=file) == trace


def never(pattern: LayerPattern) -> float:
    raise AssertionError("everything is known")


def test_a_full_disk_leaves_the_last_trace(tmp_path: Path, monkeypatch) -> None:
    losses, file = table(8), tmp_path / "trace.json"
    greedy_search(Counted(losses), LAYERS, stop=1, trace=file)
    saved = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(OSError, match=r"cannot be saved to .*trace\.json \(No space left\).*still there") as caught:
            greedy_search(Counted(losses), LAYERS, trace=file)
    assert caught.value.errno == errno.ENOSPC
    assert file.read_bytes() == saved and list(tmp_path.iterdir()) == [file]


def test_another_search_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    loss = Counted(table(2))
    loss.identity = {"model": "a"}
    greedy_search(loss, LAYERS, stop=1, trace=file)
    loss.identity = {"model": "b"}
    with pytest.raises(ValueError, match="the trace was made with model a, this is b"):
        greedy_search(loss, LAYERS, trace=file)
    loss.identity = {"model": "a", "calibration": "c"}
    with pytest.raises(ValueError, match="with calibration None, this is c"):
        greedy_search(loss, LAYERS, trace=file)
    loss.identity = {"model": "a"}
    with pytest.raises(ValueError, match="a search with num_layers 6, not 7"):
        greedy_search(loss, 7, trace=file)
    with pytest.raises(ValueError, match="a search with stages 1, not 2"):
        greedy_search(loss, LAYERS, stages=2, trace=file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved.update(format=99),
        lambda saved: saved.pop("flips"),
        lambda saved: saved["flips"][0].update(layer=0),
        lambda saved: saved["flips"][0]["candidates"].pop("1"),
        lambda saved: saved["flips"].append(saved["flips"][0]),
        lambda saved: saved.update(num_layers="six"),
    ],
)
def test_a_damaged_trace_is_refused(tmp_path: Path, damage) -> None:
    file = tmp_path / "trace.json"
    greedy_search(Counted(table(4)), LAYERS, stop=1, trace=file)
    saved = json.loads(file.read_text())
    damage(saved)
    file.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="is not a trace of a search, or it is damaged"):
        SearchTrace.load(file)
    file.write_text(file.read_text()[:50])
    with pytest.raises(ValueError, match="is not a trace of a search, or it is damaged"):
        greedy_search(Counted(table(4)), LAYERS, trace=file)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_must_be_finite(value: float) -> None:
    losses = table(6) | {"FFSFFF": value}
    with pytest.raises(ValueError, match=r"the loss of FFSFFF is (nan|inf)"):
        greedy_search(Counted(losses), LAYERS)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="expected loss to be callable, got float"):
        greedy_search(1.0, LAYERS)
    with pytest.raises(TypeError, match=r"expected num_layers to be an int, got 6\.0"):
        greedy_search(never, 6.0)
    with pytest.raises(ValueError, match="7 stages need as many layers, the model has 6"):
        greedy_search(never, LAYERS, stages=7)
    with pytest.raises(ValueError, match=r"expected keep in \(0, 1\], got 0"):
        SearchTrace(LAYERS).pattern(keep=0)
    with pytest.raises(ValueError, match="leaves 1 Full layers, but the first layer of each of 2 stages"):
        SearchTrace(LAYERS, stages=2).pattern(keep=1 / 6)


class Batched:
    """Trials of three batches of different weight; the mean decides, not any batch."""

    weights, identity = (1, 2, 5), {}

    def __init__(self) -> None:
        self.tables = [table(seed) for seed in (11, 12, 13)]

    def trials(self, pattern: LayerPattern, layers, batch: int):
        for layer in reversed(layers):
            yield layer, self.tables[batch][str(pattern if layer < 0 else pattern.share(layer))]

    def mean(self, pattern: LayerPattern) -> float:
        parts = [w * t[str(pattern)] for w, t in zip(self.weights, self.tables, strict=True)]
        return math.fsum(parts) / sum(self.weights)


def test_batches_are_weighed() -> None:
    loss = Batched()
    assert greedy_search(loss, LAYERS) == greedy_search(loss.mean, LAYERS)


def _rank(rank: int, count: int, folder: Path, fail: bool) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=count)
    loss = Counted(table(9), 3 if fail and rank == 1 else None, ArithmeticError("out of luck"))
    try:
        trace = greedy_search(loss, LAYERS, trace=folder / "trace.json")
        (folder / f"rank{rank}.json").write_text(json.dumps([trace._to_json(), loss.asked]))
    except (RankError, ArithmeticError) as error:
        (folder / f"rank{rank}.json").write_text(f"{type(error).__name__}: {error}")
    dist.destroy_process_group()


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_find_the_trace_of_one_process(tmp_path: Path, count: int) -> None:
    multiprocessing.spawn(_rank, (count, tmp_path, False), count)
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(count)]
    alone = greedy_search(Counted(table(9)), LAYERS)
    assert SearchTrace.load(tmp_path / "trace.json") == alone
    assert all(trace == json.loads(json.dumps(alone._to_json())) for trace, _ in results)
    asked = [pattern for _, patterns in results for pattern in patterns]
    assert len(asked) == len(set(asked)) == 1 + LAYERS * (LAYERS - 1) // 2  # shared out, nothing twice
    assert all(len(patterns) >= 3 for _, patterns in results)


def test_the_error_of_a_rank_ends_all(tmp_path: Path) -> None:
    multiprocessing.spawn(_rank, (2, tmp_path, True), 2)
    assert (tmp_path / "rank1.json").read_text() == "ArithmeticError: out of luck"
    assert (tmp_path / "rank0.json").read_text() == "RankError: search: rank 1 failed: ArithmeticError: out of luck"
    trace = SearchTrace.load(tmp_path / "trace.json")  # what was found before is there
    assert trace.full_loss is not None
    assert greedy_search(Counted(table(9)), LAYERS, trace=tmp_path / "trace.json").flips[0] == Flip(
        *_first_flip(table(9))
    )


def _rank_that_is_killed(rank: int, folder: Path) -> None:
    import torch.distributed as dist

    def loss(pattern: LayerPattern) -> float:
        if rank == 1 and "S" in str(pattern):
            os.kill(os.getpid(), signal.SIGKILL)
        return table(9)[str(pattern)]

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        greedy_search(loss, LAYERS, trace=folder / "trace.json")
    except RankError as error:
        (folder / "told").write_text(str(error))
        raise


def test_a_killed_rank_ends_the_others(tmp_path: Path) -> None:
    ranks = multiprocessing.spawn(_rank_that_is_killed, (tmp_path,), 2, join=False).processes
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [1, -signal.SIGKILL]
    assert (tmp_path / "told").read_text().startswith("search: another rank is gone, it may have been killed")
    assert SearchTrace.load(tmp_path / "trace.json").full_loss == table(9)["F" * LAYERS]
    assert greedy_search(Counted(table(9)), LAYERS, trace=tmp_path / "trace.json") == greedy_search(
        Counted(table(9)), LAYERS
    )


def _first_flip(losses: dict[str, float]) -> tuple[int, float, dict[int, float]]:
    full = LayerPattern("F" * LAYERS)
    candidates = {layer: losses[str(full.share(layer))] for layer in range(1, LAYERS)}
    best = min(candidates, key=lambda layer: (candidates[layer], layer))
    return best, candidates[best], candidates


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    greedy_search(Counted(table(1)), LAYERS).plot(tmp_path / "curve.png")
    assert ink(tmp_path / "curve.png") > 0.01


def ink(picture: Path) -> float:
    """The share of pixels that are not the background."""
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    return float((abs(pixels - pixels[0, 0]) > 0.1).any(-1).mean())
