"""The pictures and tables of docs/search-proof.md, from what ngram.py, train.py and measure.py found.

    python bench/proof/page.py --ngram FILE --training FILE --measured FILE --pictures DIR

Writes search-proof-loss.png and search-proof-overlap.png to DIR and prints the tables as Markdown.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from indexcache_ext import pictures
from indexcache_ext.overlap import Overlap
from indexcache_ext.search import SearchTrace


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows]) + "\n"


def trace_of(search: dict) -> SearchTrace:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(search["trace"], file)
        file.flush()
        return SearchTrace.load(file.name)


def patterns(rows: list[dict]) -> str:
    return table(
        ["pattern", "chosen", "added loss", "windows of 24 that lose"],
        [
            [
                f"`{row['pattern']}`",
                "; ".join(row["chosen"]),
                f"{row['added']:+.4f} ± {row['standard_error']:.4f}",
                str(row["windows_above_full"]),
            ]
            for row in rows[1:]
        ],
    )


def by_distance(found: Overlap) -> str:
    layers, rows = len(found.overlap), []
    for apart in range(1, layers):
        same, mass = ([matrix[i][i - apart] for i in range(apart, layers)] for matrix in (found.overlap, found.recall))
        numbers = [sum(same) / len(same), min(same), max(same), sum(mass) / len(mass)]
        rows.append([str(apart), *(f"{number:.2f}" for number in numbers)])
    return table(["layers apart", "same selection", "least", "most", "attention on the other's selection"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("ngram", "training", "measured"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FILE")
    parser.add_argument("--pictures", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    ngram, training, measured = (json.loads(path.read_text()) for path in (args.ngram, args.training, args.measured))
    traces = [trace_of(search) for search in measured["searches"]]
    found = Overlap(**measured["overlap"])

    layers = traces[0].num_layers
    uniform = [(layers // int(every), loss) for every, loss in measured["searches"][0]["uniform"].items()]
    pictures.save(
        pictures.loss_curve(traces[0], {"uniform, beginning FS": uniform}), args.pictures / "search-proof-loss.png"
    )
    title = "overlap of selections, with the pattern of search 0 for 1/4"
    pictures.save(
        pictures.layer_map(found.overlap, title, traces[0].pattern(1 / 4)), args.pictures / "search-proof-overlap.png"
    )

    per_token = training["held_out"]["sparse_nats_per_token"]
    rows = [
        [f"{n}-gram", f"{x['nats_per_token']:.3f}", f"{x['nats_per_byte']:.3f}"] for n, x in ngram["orders"].items()
    ]
    rows.append(["the model, sparse", f"{per_token:.3f}", f"{per_token / ngram['bytes_per_token']:.3f}"])
    print(table(["held-out text", "nats per token", "nats per byte"], rows))
    steps = [
        [
            str(i),
            f"{search['full_loss']:.4f}",
            " ".join(map(str, search["order"])),
            *(f"{dict(trace.curve())[full] - trace.full_loss:+.4f}" for full in (8, 4, 2, 1)),
        ]
        for i, (search, trace) in enumerate(zip(measured["searches"], traces, strict=True))
    ]
    print(table(["search", "all Full", "order of flips", *(f"{full} Full" for full in (8, 4, 2, 1))], steps))
    print(patterns(measured["held_out"]["patterns"]))
    print(patterns(measured["offset_2"]["patterns"]))
    print(by_distance(found))


if __name__ == "__main__":
    main()
