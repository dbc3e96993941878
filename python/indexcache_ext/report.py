"""A page about a search for people: patterns, loss curve, overlap, what to expect. HTML in one file, or Markdown."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import pictures
from .overlap import Overlap
from .schedule import LayerPattern
from .search import SearchTrace

# The indexers' share of the time of a 30B model, IndexCache (arXiv 2603.12201), section 1.
INDEXER_SHARE = {
    ("prefill", "10K"): 0.27, ("prefill", "200K"): 0.81, ("decode", "10K"): 0.27, ("decode", "200K"): 0.41,
}  # fmt: skip


@dataclass
class Kept:
    """What is known of one pattern. uniform: the one of as many Full layers that needs no search, if there is one."""

    pattern: LayerPattern
    loss: float
    uniform: LayerPattern | None = None
    uniform_loss: float | None = None


def speed_up(share: float, retention: float) -> float:
    """How much faster it gets if `retention` of the indexers remain and they took `share` of the time."""
    return 1 / (1 - share + share * retention)


def write(path: str | os.PathLike, trace: SearchTrace, kept: Sequence[Kept], overlap: Overlap | None = None) -> None:
    """Write the page: `.html` holds its pictures, `.md` has them beside it.

    Raises ValueError for another ending, ImportError without matplotlib.
    """
    path = Path(path)
    if path.suffix not in (".html", ".md"):
        raise ValueError(f"report: expected a name that ends in .html or .md, got {path.name!r}")
    others = [(str(k.uniform).count("F"), k.uniform_loss) for k in kept if k.uniform_loss is not None]
    figures = {"loss": ("Loss", pictures.loss_curve(trace, {"uniform": others} if others else None))}
    if overlap is not None:
        drawn = kept[-1].pattern if kept else None
        figures["overlap"] = (
            "Overlap of selections: the frames hold what each Full layer serves",
            pictures.layer_map(overlap.overlap, "|T_i ∩ T_j| / k", drawn),
        )
        figures["recall"] = (
            "Attention of a layer on what another one selects",
            pictures.layer_map(overlap.recall, "share of attention", drawn),
        )
    if path.suffix == ".html":
        path.write_text(_html(trace, kept, figures))
        return
    links = {}
    for name, (title, figure) in figures.items():
        picture = path.with_name(f"{path.stem}-{name}.png")
        pictures.save(figure, picture)
        links[name] = (title, picture.name)
    path.write_text(_markdown(trace, kept, links))


def tables(trace: SearchTrace, kept: Sequence[Kept]) -> list[tuple[str, list[list[str]]]]:
    """Titles and rows, heads first."""
    patterns = [["Full layers", "pattern", "loss", "change", "uniform", "its loss"]]
    for k in kept:
        change = "" if trace.full_loss is None else f"{k.loss - trace.full_loss:+.4f}"
        uniform = ["", ""] if k.uniform is None else [str(k.uniform), f"{k.uniform_loss:.4f}"]
        count = f"{str(k.pattern).count('F')} of {len(k.pattern)}"
        patterns.append([count, str(k.pattern), f"{k.loss:.4f}", change, *uniform])
    speeds = [["Full layers", *(f"{phase}, {length} tokens" for phase, length in INDEXER_SHARE)]]
    for k in kept:
        factors = [f"{speed_up(share, k.pattern.retention):.2f}x" for share in INDEXER_SHARE.values()]
        speeds.append([f"{str(k.pattern).count('F')} of {len(k.pattern)}", *factors])
    steps = [["step", "layer", "loss", "next best", "its loss"]]
    for i, flip in enumerate(trace.flips, 1):
        rest = sorted((loss, layer) for layer, loss in flip.candidates.items() if layer != flip.layer)
        second = [str(rest[0][1]), f"{rest[0][0]:.4f}"] if rest else ["", ""]
        steps.append([str(i), str(flip.layer), f"{flip.loss:.4f}", *second])
    title = "Speed to expect, from the indexers' share of the time in IndexCache (arXiv 2603.12201), a 30B model"
    return [("Patterns", patterns), (title, speeds), ("Steps", steps)]


def _facts(trace: SearchTrace) -> str:
    facts = [f"{trace.num_layers} layers", *(f"{key} {value}" for key, value in trace.identity.items())]
    if trace.stages > 1:
        facts.insert(1, f"{trace.stages} pipeline stages")
    if trace.full_loss is not None:
        facts.append(f"loss with all indexers {trace.full_loss:.4f}")
    return ", ".join(facts)


def _markdown(trace: SearchTrace, kept: Sequence[Kept], links: dict[str, tuple[str, str]]) -> str:
    parts = ["# IndexCache: searched patterns", _facts(trace)]
    for title, rows in tables(trace, kept):
        head, *body = rows
        lines = [f"## {title}", ""] + ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]
        parts.append("\n".join(lines))
    parts += [f"## {title}\n\n![{title}]({name})" for title, name in links.values()]
    return "\n\n".join(parts) + "\n"


def _html(trace: SearchTrace, kept: Sequence[Kept], figures: dict) -> str:
    parts = ["<h1>IndexCache: searched patterns</h1>", f"<p>{html.escape(_facts(trace))}</p>"]
    for title, (head, *body) in tables(trace, kept):
        rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in body]
        top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        inner = "".join(f"<tr>{row}</tr>" for row in (top, *rows))
        parts.append(f"<h2>{html.escape(title)}</h2><table>{inner}</table>")
    for title, figure in figures.values():
        data = base64.b64encode(pictures.png(figure)).decode()
        parts.append(
            f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
        )
    style = "body{font-family:sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:left}td{font-family:monospace}"
    body = "\n".join(parts)
    return f"<!doctype html><meta charset=utf-8><title>IndexCache search</title><style>{style}</style>\n{body}\n"
