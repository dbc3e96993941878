"""Profiles the kernels of benchmarks with Nsight Compute and says what binds them.

    python bench/nsight.py "topk and cuda and 131072" [--out topk.ncu-rep] [--hot 10] [--json]
    python bench/nsight.py --read topk.ncu-rep            # a report that is there already

The expression picks benchmarks, as `pytest bench -k` does. Per kernel: time, how busy the SM, its issue slots and the
memory are, occupancy, registers, what its warps wait for, and the instructions at which they wait most. ncu replays
each launch with cold caches and its own clocks: compare figures of one report, and take times from the benchmarks.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Of the details page: our name, and that of ncu. The first of a name in a kernel's part counts.
METRICS = {
    "us": "Duration",
    "SM %": "SM Busy",
    "issue %": "Issue Slots Busy",
    "DRAM %": "DRAM Throughput",
    "L2 hit %": "L2 Hit Rate",
    "occupancy %": "Achieved Occupancy",
    "registers": "Registers Per Thread",
}
MICROSECONDS = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}
# The states in which a sampled warp is, of the source page: what ncu calls them, and what they mean.
STATES = {
    "selected": "issuing",
    "not_selected": "ready but not chosen",
    "barrier": "barrier",
    "branch_resolving": "branch",
    "dispatch": "dispatch",
    "drain": "stores at exit",
    "imc": "constant cache",
    "lg": "global memory queue",
    "long_sb": "global memory",
    "math": "busy pipeline",
    "membar": "fence",
    "mio": "shared memory queue",
    "misc": "other",
    "no_inst": "instruction fetch",
    "short_sb": "shared memory",
    "sleep": "sleep",
    "tex": "texture queue",
    "wait": "fixed latency",
}
_KERNEL = re.compile(r"^  (\S.*?) \((\d+), (\d+), (\d+)\)x\((\d+), (\d+), (\d+)\), Context ")


def read_details(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Of ncu's details page in plain text: name, grid, block and the METRICS of each profiled launch."""
    kernels: list[dict[str, Any]] = []
    columns: list[slice] = []
    for line in lines:
        if found := _KERNEL.match(line):
            name, *sizes = found.groups()
            grid, block = (tuple(map(int, sizes[i : i + 3])) for i in (0, 3))
            kernels.append({"kernel": name, "grid": grid, "block": block})
        elif re.fullmatch(r"\s*-+ +-+ +-+\s*", line):
            columns = [slice(dashes.start(), dashes.end()) for dashes in re.finditer("-+", line)]
        elif not line.strip():
            columns = []
        elif columns and kernels:
            metric, unit, value = (line[column].strip() for column in columns)
            for name, wanted in METRICS.items():
                if metric == wanted and name not in kernels[-1]:
                    kernels[-1][name] = float(value.replace(",", "")) * (MICROSECONDS[unit] if name == "us" else 1)
    return kernels


def read_source(lines: Iterable[str], hot: int) -> list[dict[str, Any]]:
    """Of ncu's source page as CSV, for each launch: the share of samples in each state, and the `hot` instructions."""
    return [_sampled(header, rows, hot) for header, rows in _source_tables(lines)]


def _source_tables(lines: Iterable[str]) -> Iterator[tuple[list[str], list[list[str]]]]:
    header: list[str] = []
    rows: list[list[str]] = []
    for row in csv.reader(lines):
        if row[:1] == ["Kernel Name"]:
            if header:
                yield header, rows
            header, rows = [], []
        elif "Source" in row and not header:
            header = row
        elif header and len(row) >= len(header):
            rows.append(row)
    if header:
        yield header, rows


def _sampled(header: list[str], rows: list[list[str]], hot: int) -> dict[str, Any]:
    states = {name: header.index(f"stall_{name}") for name in STATES if f"stall_{name}" in header}
    total = {name: sum(_count(row[i]) for row in rows) for name, i in states.items()}
    samples = sum(total.values()) or 1
    by_row = [(sum(_count(row[i]) for i in states.values()), row) for row in rows]
    hottest = [(n, row) for n, row in sorted(by_row, key=lambda pair: -pair[0])[:hot] if n > 0]
    source, executed = header.index("Source"), header.index("Instructions Executed")
    return {
        "samples": sum(total.values()),
        "states": {STATES[name]: n / samples for name, n in sorted(total.items(), key=lambda item: -item[1]) if n},
        "hot": [
            {
                "instruction": " ".join(row[source].split()),
                "share": n / samples,
                "executed": _count(row[executed]),
                "state": STATES[max(states, key=lambda name: _count(row[states[name]]))],
            }
            for n, row in hottest
        ],
    }


def _count(cell: str) -> int:
    return int(cell.replace(",", "")) if cell.strip() not in ("", "-") else 0


def table(kernels: Sequence[dict[str, Any]]) -> str:
    """Some lines per launch: its sizes, the METRICS, what its warps wait for, and where."""
    lines = []
    for kernel in kernels:
        lines.append(f"{kernel['kernel']}  {_sizes(kernel['grid'])} blocks of {_sizes(kernel['block'])}")
        figures = [(name, _number(kernel[name])) for name in METRICS if name in kernel]
        shown = [f"{name.removesuffix('%').strip()} {value}{' %' * name.endswith('%')}" for name, value in figures]
        lines.append("  " + ", ".join(shown))
        states = [f"{share:.0%} {state}" for state, share in kernel["states"].items() if share >= 0.03]
        lines.append(f"  warps: {', '.join(states) or 'not sampled'} ({kernel['samples']} samples)")
        for hot in kernel["hot"]:
            lines.append(f"  {hot['share']:6.1%}  {hot['instruction'][:72]:72}  {hot['state']}")
    return "\n".join(lines)


def _sizes(sizes: Sequence[int]) -> str:
    return " x ".join(str(n) for i, n in enumerate(sizes) if i == 0 or max(sizes[i:]) > 1)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def profile(expression: str, kernel: str, launches: int, report: Path) -> None:
    """Runs the benchmarks that `expression` picks, each twice and untimed, under ncu."""
    command = ["ncu", "--kernel-name-base", "demangled", "-k", f"regex:{kernel}", "-c", str(launches), "--set", "full"]
    command += ["--import-source", "no", "-f", "-o", str(report.with_suffix("")), sys.executable, "-m", "pytest"]
    command += [str(Path(__file__).parent), "-q", "-p", "no:cacheprovider", "-k", expression, "--benchmark-disable"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not report.exists():
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise SystemExit(f"{said}\nnsight: no report; does '{expression}' pick one that runs {kernel} on a GPU?")


def pages(report: Path, hot: int) -> list[dict[str, Any]]:
    def page(*options: str) -> list[str]:
        command = ["ncu", "-i", str(report), "--page", *options]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    kernels, sources = read_details(page("details")), read_source(page("source", "--csv"), hot)
    if len(kernels) != len(sources) or not kernels:
        raise SystemExit(f"nsight: {report} tells of {len(kernels)} launches and the samples of {len(sources)}")
    return [kernel | source for kernel, source in zip(kernels, sources, strict=True)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("expression", nargs="?", help="benchmarks, as pytest -k takes them")
    what.add_argument("--read", type=Path, metavar="REPORT", help="an .ncu-rep file instead")
    parser.add_argument("--out", type=Path, metavar="REPORT", help="keep the report, for ncu-ui")
    parser.add_argument("--kernel", default="indexcache", metavar="REGEX", help="kernels, by full name (indexcache)")
    parser.add_argument("--launches", type=int, default=4, metavar="N", help="at most (4)")
    parser.add_argument("--hot", type=int, default=8, metavar="N", help="instructions to show (8)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    if shutil.which("ncu") is None:
        print("nsight: ncu is not on the PATH; it is part of Nsight Compute and of the CUDA toolkit", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        report = args.read or (args.out or Path(folder) / "report").with_suffix(".ncu-rep")
        if args.read is None:
            profile(args.expression, args.kernel, args.launches, report)
        kernels = pages(report, args.hot)
    print(json.dumps(kernels, indent=1) if args.json else table(kernels))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
