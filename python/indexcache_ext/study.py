"""The commands `indexcache search` and `indexcache overlap`: a model and a text in, files and a table out."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import torch
import torch.distributed as dist

from . import report
from .integrations.calibration import CalibrationLoss, measure_overlap
from .integrations.checkpoints import (
    CalibrationError,
    CheckpointError,
    choose_device,
    load_model,
    read_calibration,
)
from .overlap import Overlap
from .schedule import LayerPattern
from .search import SearchTrace, greedy_search, progress_bar


def search(args: argparse.Namespace) -> None:
    """See `indexcache search --help`. Run by torchrun, every rank takes its share, and rank 0 writes and prints."""
    with _ranks(args) as (first, device):
        loss = _loss(args, device)
        layers = loss.num_layers
        most_shared = layers - min(max(args.stages, _full(keep, layers)) for keep in args.keep)
        trace_file = args.out / "trace.json"
        if first:
            args.out.mkdir(parents=True, exist_ok=True)
        trace = greedy_search(loss, layers, stages=args.stages, stop=most_shared, trace=trace_file)
        if not first:
            return
        kept = [_kept(trace, keep, loss) for keep in args.keep if _full(keep, layers) >= args.stages]
        trace.plot(args.out / "curve.png")
        written = [trace_file, args.out / "curve.png"]
        if args.report is not None:
            report.write(args.report, trace, kept, _overlap(loss))
            written.append(args.report)
        if args.json:
            print(json.dumps(_result(trace, kept, written), indent=1))
        else:
            print(_page(trace, kept, written))


def overlap(args: argparse.Namespace) -> None:
    """See `indexcache overlap --help`."""
    loss = _loss(args, choose_device(args.device))
    pattern = None if args.pattern is None else LayerPattern(args.pattern)
    if pattern is not None and len(pattern) != loss.num_layers:
        raise CalibrationError(f"--pattern: {pattern} has {len(pattern)} layers, the model has {loss.num_layers}")
    args.out.mkdir(parents=True, exist_ok=True)
    found = _overlap(loss)
    written = [args.out / name for name in ("overlap.json", "overlap.png", "recall.png")]
    written[0].write_text(json.dumps(found.to_json(), indent=1))
    found.plot(written[1], pattern)
    found.plot(written[2], pattern, recall=True)
    if args.json:
        print(json.dumps(found.to_json() | {"written": [str(path) for path in written]}))
        return
    print(f"{found.queries:,} queries that see more than {found.topk:,} keys; averages over layers so far apart:\n")
    print("layers apart   same selection   attention on the other's selection")
    for apart in range(1, loss.num_layers):
        pairs = [(i, i - apart) for i in range(apart, loss.num_layers)]
        same, mass = (sum(m[i][j] for i, j in pairs) / len(pairs) for m in (found.overlap, found.recall))
        print(f"{apart:12} {same:16.3f} {mass:36.3f}")
    print("\nwritten: " + ", ".join(map(str, written)))


def _loss(args: argparse.Namespace, device: torch.device) -> CalibrationLoss:
    tokens = read_calibration(args.model, args.calibration, args.context, args.windows)
    model = load_model(args.model, device, getattr(torch, args.dtype))
    most = getattr(model.config, "max_position_embeddings", args.context)
    if args.context > most:
        raise CalibrationError(f"--context: the model reads at most {most:,} tokens, got {args.context:,}")
    try:
        return CalibrationLoss(model, tokens, batch_size=args.batch, quantised=not args.unquantised)
    except TypeError as error:  # a model of another kind
        raise CheckpointError(str(error)) from error


def _full(keep: Fraction, layers: int) -> int:
    return max(1, -int(-keep * layers // 1))


def _kept(trace: SearchTrace, keep: Fraction, loss: CalibrationLoss) -> report.Kept:
    pattern = trace.pattern(float(keep))
    count = str(pattern).count("F")
    found = dict(trace.curve())[count]
    if keep.numerator != 1 or trace.num_layers % keep.denominator:
        return report.Kept(pattern, found)  # no uniform pattern has exactly as many
    uniform = LayerPattern.uniform(trace.num_layers, keep.denominator, offset=1)
    return report.Kept(pattern, found, uniform, loss(uniform))


def _overlap(loss: CalibrationLoss) -> Overlap:
    with progress_bar(sum(loss.weights), unit="window") as advance:
        return measure_overlap(loss, progress=advance)


def _result(trace: SearchTrace, kept: list[report.Kept], written: list[Path]) -> dict:
    return {
        "layers": trace.num_layers,
        "stages": trace.stages,
        "identity": trace.identity,
        "full_loss": trace.full_loss,
        "order": [flip.layer for flip in trace.flips],
        "kept": [
            {"full": str(k.pattern).count("F"), "loss": k.loss, **k.pattern.to_config()}
            | ({} if k.uniform is None else {"uniform": str(k.uniform), "uniform_loss": k.uniform_loss})
            for k in kept
        ],
        "written": [str(path) for path in written],
    }


def _page(trace: SearchTrace, kept: list[report.Kept], written: list[Path]) -> str:
    (_, rows), *_ = report.tables(trace, kept)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [", ".join(f"{key} {value}" for key, value in trace.identity.items())]
    lines += [f"loss with all {trace.num_layers} indexers: {trace.full_loss:.4f} nats per token", ""]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if kept:
        lines += ["", "for config.json, the first line for SGLang and vLLM, the second for transformers:"]
    for row, config in zip(rows[1:], (k.pattern.to_config() for k in kept), strict=True):
        lines += [row[0]] + [
            f'  "{key}": {json.dumps(config[key])},' for key in ("index_topk_pattern", "indexer_types")
        ]
    return "\n".join([*lines, "", "written: " + ", ".join(map(str, written))])


@contextmanager
def _ranks(args: argparse.Namespace) -> Iterator[tuple[bool, torch.device]]:
    """Whether this is rank 0, and its device; joins the ranks that torchrun started."""
    device = choose_device(args.device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # The ranks tell each other losses by gloo, which notices at once that one is gone; nccl waits for its watchdog.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank() == 0, device
    finally:
        dist.destroy_process_group()
