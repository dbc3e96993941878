"""Measures the proof's model: searches on three texts, their patterns on a fourth, overlap, what restarts save.

    python bench/proof/measure.py --model MODEL --text TEXT --out OUT [--windows 6] [--heldout-windows 24] [--swaps]

Writes OUT/measured.json after every part, and a trace for each calibration text; the same command goes on from those.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import torch
from indexcache_ext.integrations.calibration import CalibrationLoss, measure_overlap
from indexcache_ext.integrations.checkpoints import choose_device, load_model, read_calibration
from indexcache_ext.schedule import LayerPattern
from indexcache_ext.search import ALL_FULL, SearchTrace, greedy_search
from text import CALIBRATION_SETS

KEEP_EVERY = (2, 4, 8)
RESTART_WINDOWS = 2


def kendall_tau(first: list[int], second: list[int]) -> float:
    """Agreement of two orders of the same items, from -1 to 1."""
    agree = [
        (first.index(a) - first.index(b)) * (second.index(a) - second.index(b)) > 0
        for a, b in itertools.combinations(first, 2)
    ]
    return 2 * sum(agree) / len(agree) - 1


def window_losses(loss: CalibrationLoss, pattern: LayerPattern) -> list[float]:
    """The loss of each batch of `loss`, which holds one window in each."""
    return [value for batch in range(len(loss.weights)) for _, value in loss.trials(pattern, [ALL_FULL], batch)]


def after_swaps(loss: CalibrationLoss, pattern: LayerPattern, found: float) -> tuple[LayerPattern, float, int]:
    """The pattern after the best swaps of a Full and a Shared layer, until none helps; its loss, and what was tried."""
    tried = 0
    while True:
        full, shared = ([i for i in range(1, len(pattern)) if pattern.is_full(i) == wanted] for wanted in (True, False))
        near = [
            LayerPattern("".join("S" if i == f else "F" if i == s else letter for i, letter in enumerate(str(pattern))))
            for f, s in itertools.product(full, shared)
        ]
        losses = [loss(candidate) for candidate in near]
        tried += len(near)
        if not near or min(losses) >= found:
            return pattern, found, tried
        found, pattern = min(zip(losses, near, strict=True), key=lambda pair: pair[0])


def seconds(run) -> tuple[object, float]:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    result = run()
    synchronize()
    return result, round(time.perf_counter() - start, 2)


class Measurement:
    """The parts, in order of importance; each writes what it found."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, choose_device("auto")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = load_model(args.model, self.device, dtype)
        self.layers = len(self.model.base_model.layers)
        self.context = json.loads((args.model / "training.json").read_text())["sizes"]["context"]
        self.file = args.out / "measured.json"
        args.out.mkdir(parents=True, exist_ok=True)
        self.found = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.note("device", torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu")

    def loss(self, name: str, windows: int, batch: int) -> CalibrationLoss:
        tokens = read_calibration(self.args.model, [self.args.text / name], self.context, windows)
        return CalibrationLoss(self.model, tokens, batch_size=batch)

    def calibration(self, i: int) -> CalibrationLoss:
        return self.loss(f"calibration-{i}.txt", self.args.windows, self.args.windows)

    def trace(self, i: int) -> SearchTrace:
        return SearchTrace.load(self.args.out / f"trace-{i}.json")

    def note(self, key: str, value) -> None:
        self.found[key] = value
        self.file.write_text(json.dumps(self.found, indent=1) + "\n")
        print(key, json.dumps(value)[:600], flush=True)

    def run(self) -> None:
        parts = [self.searches, self.held_out, self.overlap, self.restarts, self.offset_2, self.swaps]
        for part in parts:
            if part.__name__ not in self.found and (part != self.swaps or self.args.swaps):
                part()

    def searches(self) -> None:
        rows = []
        for i in range(CALIBRATION_SETS):
            loss = self.calibration(i)
            loss(LayerPattern("F" * self.layers))  # the first run sets things up
            path = self.args.out / f"trace-{i}.json"
            resumed = path.exists()
            trace, taken = seconds(lambda loss=loss, path=path: greedy_search(loss, self.layers, trace=path))
            uniform = {every: LayerPattern.uniform(self.layers, every, offset=1) for every in KEEP_EVERY}
            rows.append(
                {
                    "identity": trace.identity,
                    "seconds": None if resumed else taken,
                    "full_loss": trace.full_loss,
                    "order": [flip.layer for flip in trace.flips],
                    "uniform": {every: loss(pattern) for every, pattern in uniform.items()},
                    "trace": json.loads(path.read_text()),
                }
            )
        orders = [row["order"] for row in rows]
        pairs = itertools.combinations(range(CALIBRATION_SETS), 2)
        self.note("kendall_tau", {f"{i} {j}": kendall_tau(orders[i], orders[j]) for i, j in pairs})
        self.note("searches", rows)

    def held_out(self) -> None:
        """Uniform patterns that begin FS…, so that exactly 1/2, 1/4 and 1/8 of the layers are Full."""
        self.note("held_out", self.compared(offset=1))

    def offset_2(self) -> None:
        """The uniform patterns that engines make of `index_topk_freq`: they begin FFS…, with one Full layer more."""
        self.note("offset_2", self.compared(offset=2))

    def compared(self, offset: int) -> dict:
        """Uniform patterns on the held-out text, and of each search the pattern with as many Full layers."""
        loss = self.loss("heldout.txt", self.args.heldout_windows, 1)
        full = LayerPattern("F" * self.layers)
        patterns = {str(full): ["full"]}
        for every in KEEP_EVERY:
            uniform = str(LayerPattern.uniform(self.layers, every, offset=offset))
            count = uniform.count("F")
            patterns.setdefault(uniform, []).append(f"uniform, {count} Full")
            for i in range(CALIBRATION_SETS):
                searched = str(self.trace(i).pattern(count / self.layers))
                patterns.setdefault(searched, []).append(f"searched {i}, {count} Full")
        base, rows = torch.tensor(window_losses(loss, full), dtype=torch.float64), []
        for pattern, names in patterns.items():
            losses = torch.tensor(window_losses(loss, LayerPattern(pattern)), dtype=torch.float64)
            added = losses - base
            rows.append(
                {
                    "pattern": pattern,
                    "chosen": names,
                    "loss": losses.mean().item(),
                    "added": added.mean().item(),
                    "standard_error": (added.std() / len(added) ** 0.5).item(),
                    "windows_above_full": int((added > 0).sum()),
                }
            )
        return {"windows": len(base), "identity": loss.identity, "patterns": rows}

    def overlap(self) -> None:
        self.note("overlap", measure_overlap(self.loss("heldout.txt", self.args.heldout_windows, 1)).to_json())

    def restarts(self) -> None:
        """A search with restarts and one of whole runs, which a plain callable makes, on the same windows."""
        loss = self.loss("calibration-0.txt", RESTART_WINDOWS, RESTART_WINDOWS)
        loss(LayerPattern("F" * self.layers))
        trace, restarted = seconds(lambda: greedy_search(loss, self.layers))
        whole, taken = seconds(lambda: greedy_search(lambda pattern: loss(pattern), self.layers))
        gaps = [
            abs(a.candidates[layer] - b.candidates[layer])
            for a, b in zip(whole.flips, trace.flips, strict=True)
            for layer in a.candidates.keys() & b.candidates.keys()
        ]
        self.note(
            "restarts",
            {
                "windows": RESTART_WINDOWS,
                "same_order": [f.layer for f in whole.flips] == [f.layer for f in trace.flips],
                "losses": len(gaps),
                "losses_with_the_same_bits": sum(gap == 0 for gap in gaps),
                "largest_gap": max(gaps),
                "seconds_whole": taken,
                "seconds_restarted": restarted,
                "share": round(restarted / taken, 3),
            },
        )

    def swaps(self) -> None:
        rows = []
        for every in reversed(KEEP_EVERY):
            loss, trace = self.calibration(0), self.trace(0)
            greedy = trace.pattern(1 / every)
            before = dict(trace.curve())[str(greedy).count("F")]
            pattern, after, tried = after_swaps(loss, greedy, before)
            rows.append({"greedy": str(greedy), "loss": before, "swapped": str(pattern), "then": after, "tried": tried})
            held_out = self.loss("heldout.txt", self.args.heldout_windows, 1)
            losses = [sum(window_losses(held_out, p)) / len(held_out.weights) for p in (greedy, pattern)]
            rows[-1] |= {"held_out": losses[0], "held_out_then": losses[1]}
            self.note("swaps", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="what train.py wrote")
    parser.add_argument("--text", type=Path, required=True, metavar="DIR", help="what text.py wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--windows", type=int, default=6, metavar="N", help="of each calibration text (6)")
    parser.add_argument("--heldout-windows", type=int, default=24, metavar="N", help="of the held-out text (24)")
    parser.add_argument("--swaps", action="store_true", help="also try swaps of a Full and a Shared layer")
    Measurement(parser.parse_args()).run()


if __name__ == "__main__":
    main()
