"""Every pattern of the demonstration model on three parts of a text: how near greedy search comes to the best one.

    python bench/all_patterns.py --text FILE [--context 2048] [--windows 6]

Prints Markdown: for each part and number of Full layers the greedy and the best pattern, what swaps of a Full and a
Shared layer make of the greedy one, the uniform one, and the loss that each adds on the other two parts.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from indexcache_ext.demo.run import CHECKPOINT
from indexcache_ext.integrations.calibration import CalibrationLoss
from indexcache_ext.integrations.checkpoints import choose_device, load_model, read_calibration
from indexcache_ext.schedule import LayerPattern
from indexcache_ext.search import greedy_search

PARTS = 3


def losses_of_all(args: argparse.Namespace) -> list[dict[str, float]]:
    """For each part of the text, the loss of every pattern."""
    text, model = args.text.read_bytes(), load_model(CHECKPOINT, choose_device("auto"))
    layers = model.config.num_hidden_layers
    patterns = ["F" + "".join(rest) for rest in itertools.product("FS", repeat=layers - 1)]
    found = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=PARTS * len(patterns), file=sys.stderr) as bar:
        for part in range(PARTS):
            file = Path(folder, f"part{part}.txt")
            file.write_bytes(text[len(text) * part // PARTS : len(text) * (part + 1) // PARTS])
            loss = CalibrationLoss(
                model, read_calibration(CHECKPOINT, [file], args.context, args.windows), batch_size=2
            )
            found.append({})
            for pattern in patterns:
                found[-1][pattern] = loss(LayerPattern(pattern))
                bar.update()
    return found


def after_swaps(losses: dict[str, float], pattern: str) -> str:
    """The pattern after the best swaps of a Full and a Shared layer, until none helps."""
    while True:
        full, shared = ([i for i in range(1, len(pattern)) if pattern[i] == letter] for letter in "FS")
        near = [
            "".join("S" if i == f else "F" if i == s else letter for i, letter in enumerate(pattern))
            for f, s in itertools.product(full, shared)
        ]
        best = min([pattern, *near], key=lambda p: (losses[p], p != pattern))
        if best == pattern:
            return pattern
        pattern = best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--context", type=int, default=2048, metavar="N")
    parser.add_argument("--windows", type=int, default=6, metavar="N")
    found = losses_of_all(parser.parse_args())
    layers = len(next(iter(found[0])))
    print("| part | Full | greedy | best of all | after swaps | uniform | added elsewhere: greedy, best, uniform |")
    print("|---|---|---|---|---|---|---|")
    for part, losses in enumerate(found):
        trace = greedy_search(lambda pattern, losses=losses: losses[str(pattern)], layers)
        others = [other for other in found if other is not losses]

        def added(pattern: str, others=others) -> str:
            return f"{statistics.fmean(t[pattern] - t['F' * layers] for t in others):+.4f}"

        print(f"| {part} | {layers} | {'F' * layers} {trace.full_loss:.4f} | | | | |")
        for full in range(layers - 1, 0, -1):
            greedy = str(trace.pattern(full / layers))
            best = min((p for p in losses if p.count("F") == full), key=lambda p: losses[p])
            swapped = after_swaps(losses, greedy)
            uniform = str(LayerPattern.uniform(layers, layers // full, offset=1)) if layers % full == 0 else None
            cells = [f"{p} {losses[p]:.4f}" if p else "" for p in (greedy, best, swapped, uniform)]
            elsewhere = ", ".join(added(p) for p in (greedy, best, uniform) if p)
            print(f"| {part} | {full} | {' | '.join(cells)} | {elsewhere} |")


if __name__ == "__main__":
    main()
