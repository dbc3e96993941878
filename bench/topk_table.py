"""Reads a pytest-benchmark JSON of bench_topk.py and prints its GPU cases as a Markdown table: shape by distribution.

    python bench/topk_table.py bench/results/FILE.json

A cell is the median in us, then the share of rows that were read more than once, where the kernel counts that.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import roofline

NAMES = {
    "randn": "normal", "relu_70": "ReLU, 70 % zeros", "constant": "all equal", "binade": "narrow range",
    "ramp_up": "ascending", "ramp_down": "descending", "packed": "best in one block", "periodic": "periodic",
}  # fmt: skip
Infos = dict[tuple[int, int, str, str], dict[str, Any]]  # rows, columns, values, dtype


def figures(report: dict[str, Any]) -> Infos:
    infos = [entry["extra_info"] for entry in report["benchmarks"]]
    found = [info for info in infos if info.get("device") == "cuda" and "values" in info]
    return {(info["rows"], info["columns"], info["values"], info["dtype"]): info for info in found}


def time(info: dict[str, Any] | None) -> str:
    if info is None:
        return ""
    us, again = info["seconds"] * 1e6, info["read_again"]
    share = "" if again is None else f" ({percent(again)})"
    return f"{us:.3g}" + share if us < 100 else f"{us:.0f}" + share


def percent(share: float) -> str:
    """Of few rows that are read again, or few that are not, something must remain to be seen."""
    digits = 0 if share in (0, 1) or 0.01 <= share <= 0.99 else 2
    return f"{share * 100:.{digits}f} %"


def table(infos: Infos) -> list[list[str]]:
    """Head, then a line for each shape."""
    kinds = [values for values in NAMES if any(key[2:] == (values, "float32") for key in infos)]
    lines = [["rows x columns", "mark", *(NAMES[values] for values in kinds), "worst / normal", "of READ", "bf16"]]
    for shape in dict.fromkeys(key[:2] for key in infos):
        f32 = [infos.get((*shape, values, "float32")) for values in kinds]
        normal, bf16 = (infos.get((*shape, "randn", dtype)) for dtype in ("float32", "bfloat16"))
        ratios = [info["of_normal"] for info in f32 if info and info["of_normal"]]
        limit = max((info["most_of_normal"] for info in f32 if info), default=0.0)
        worst = max(ratios, default=0.0)
        lines.append(
            [
                f"{shape[0]:,} x {shape[1]:,}",
                f"{normal['mark_seconds'] * 1e6:g}" if normal and "mark_seconds" in normal else "",
                *map(time, f32),
                f"{worst:.2f}" + " MISSED" * (worst > limit) if ratios else "",
                f"{normal['roof_ratio']:.2f}" if normal else "",
                time(bf16),
            ]
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="what pytest bench/bench_topk.py --benchmark-json wrote")
    args = parser.parse_args(arguments)
    report, infos = roofline.read(parser, args.file, figures, "a report of bench_topk.py")
    if not infos:
        parser.exit(1, f"{args.file} holds no GPU figure of bench_topk.py\n")
    print(roofline.machine(report), "", roofline.markdown(table(infos)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
