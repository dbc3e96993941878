"""Reads a pytest-benchmark JSON and prints each figure with its ratio to the roof and to the baseline of the same run.

    python bench/roofline.py bench/results/FILE.json [--json | --markdown]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

COLUMNS = ("benchmark", "time", "TFLOP/s", "GB/s", "roof", "baseline", "its time", "ratio", "mark", "graph", "host")


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per benchmark, in the order they ran: SI units, None where there is no such figure."""
    result = []
    for entry in report["benchmarks"]:
        info = entry["extra_info"]
        if "seconds" not in info:
            continue
        seconds, mark, ratio = info["seconds"], info.get("mark"), info.get("baseline_ratio")
        mark_seconds = info.get("mark_seconds")
        reached = [] if mark is None else [ratio >= mark]
        reached += [] if mark_seconds is None else [seconds <= mark_seconds]
        result.append(
            {
                "benchmark": entry["name"].removeprefix("bench_"),
                "seconds": seconds,
                "flop_per_second": info["flops"] / seconds if info["flops"] else None,
                "bytes_per_second": info["bytes"] / seconds if info["bytes"] else None,
                "roof": info["roof"],
                "roof_ratio": info["roof_ratio"],
                "baseline": info.get("baseline"),
                "baseline_seconds": info.get("baseline_seconds"),
                "baseline_ratio": ratio,
                "mark": mark,
                "mark_seconds": mark_seconds,
                "mark_met": all(reached) if reached else None,
                "graph_seconds": info.get("graph_seconds"),
                "host_seconds": info.get("host_seconds"),
            }
        )
    return result


def cells(row: dict[str, Any]) -> list[str]:
    mark = " ".join(filter(None, (number(row["mark"], 1), duration(row["mark_seconds"]))))
    return [
        row["benchmark"],
        duration(row["seconds"]),
        number(row["flop_per_second"], 1e12),
        number(row["bytes_per_second"], 1e9),
        f"{row['roof_ratio']:.3f} {row['roof']}",
        row["baseline"] or "",
        duration(row["baseline_seconds"]),
        number(row["baseline_ratio"], 1),
        f"{mark} {'met' if row['mark_met'] else 'MISSED'}" if mark else "",
        duration(row["graph_seconds"]),
        duration(row["host_seconds"]),
    ]


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, name in ((1, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-6:.3g} us"


def number(value: float | None, unit: float) -> str:
    if value is None:
        return ""
    value /= unit
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Head and cells, without the columns that are empty throughout."""
    lines = [list(COLUMNS), *(cells(row) for row in rows)]
    used = [i for i in range(len(COLUMNS)) if any(line[i] for line in lines[1:])]
    return [[line[i] for i in used] for line in lines]


def text(rows: list[dict[str, Any]]) -> str:
    lines = table(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def markdown(lines: list[list[str]]) -> str:
    """A table of a head and cells."""
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body))


def machine(report: dict[str, Any]) -> str:
    info = report.get("machine_info", {})
    torch, gpu = info.get("torch", {}), info.get("gpu", {})
    parts = [
        info.get("cpu", {}).get("brand_raw"),
        f"{torch.get('threads')} threads",
        gpu.get("name"),
        f"torch {torch.get('version')}",
        f"commit {info.get('git')}",
        report.get("datetime"),
    ]
    return ", ".join(part for part in parts if part)


def read(
    parser: argparse.ArgumentParser, file: Path, figures: Callable[[dict[str, Any]], Any], what: str
) -> tuple[dict[str, Any], Any]:
    """The report in `file` and its `figures`; ends the program, with what it should be, if they cannot be read."""
    try:
        report = json.loads(file.read_text())
        return report, figures(report)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.exit(1, f"{file} is not {what}: {error!r}\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="what pytest --benchmark-json wrote")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="rows in SI units as JSON")
    form.add_argument("--markdown", action="store_true", help="a Markdown table")
    args = parser.parse_args(arguments)
    report, found = read(parser, args.file, rows, "a pytest-benchmark report of this directory")
    if not found:
        parser.exit(1, f"{args.file} holds no figure; was it run with --benchmark-disable?\n")
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print(machine(report), "", markdown(table(found)) if args.markdown else text(found), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
