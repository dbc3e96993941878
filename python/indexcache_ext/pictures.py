"""The pictures of a search: its loss curve, and which layers select the same tokens. Needs matplotlib."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .schedule import LayerPattern

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(f"pictures need matplotlib: pip install 'indexcache-ext[search]' ({error})") from error

if TYPE_CHECKING:
    from .search import SearchTrace

MARKED = {"1/2": 1 / 2, "1/4": 1 / 4, "1/8": 1 / 8}  # shares of indexers kept


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write the figure; the ending of the name says how (.png, .svg, .pdf)."""
    figure.savefig(path, dpi=150, bbox_inches="tight")


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    return buffer.getvalue()


def loss_curve(trace: SearchTrace, others: dict[str, Sequence[tuple[int, float]]] | None = None) -> Figure:
    """The loss over the number of Shared layers, each point with the layer that became Shared there.

    others: further points (number of Full layers, loss) by name, such as those of uniform patterns.
    """
    layers, curve = trace.num_layers, trace.curve()
    figure = Figure(figsize=(9, 4.5))
    axes = figure.add_subplot()
    shared, losses = [layers - full for full, _ in curve], [loss for _, loss in curve]
    axes.plot(shared, losses, marker="o", markersize=3, label="searched")
    for count, loss, flip in zip(shared[1:], losses[1:], trace.flips, strict=True):
        axes.annotate(str(flip.layer), (count, loss), (0, 5), textcoords="offset points", ha="center", fontsize=6)
    for name, points in (others or {}).items():
        axes.plot([layers - full for full, _ in points], [loss for _, loss in points], "x", label=name)
    for name, keep in MARKED.items():
        at = layers - max(1, -int(-keep * layers // 1))
        axes.axvline(at, color="0.8", linewidth=0.8, zorder=0)
        axes.annotate(
            name, (at, 1), (2, -10), xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=7
        )
    axes.set_xlabel("Shared layers (the numbers name the layer of each step)")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(f"{layers} layers: loss as indexers are given up")
    axes.legend()
    return figure


def layer_map(matrix: Sequence[Sequence[float]], title: str, pattern: LayerPattern | None = None) -> Figure:
    """A heat map of layers by layers, values in [0, 1]; a pattern is drawn as frames around what Full layers serve."""
    layers = len(matrix)
    figure = Figure(figsize=(6.5, 5.5))
    axes = figure.add_subplot()
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=axes)
    if pattern is not None:
        for source, group in pattern.groups().items():
            x, y, width = source - 0.5, group.start - 0.5, len(group)
            axes.add_patch(_frame((x, y), 1, width))  # the column of the layer whose selection the group uses
    axes.set_xlabel("layer that selects")
    axes.set_ylabel("layer that attends")
    axes.set_title(title if pattern is None else f"{title}\n{pattern}", fontsize=9)
    ticks = range(0, layers, max(1, layers // 12))
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    return figure


def _frame(corner: tuple[float, float], width: float, height: float):
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, fill=False, edgecolor="red", linewidth=1.2)
