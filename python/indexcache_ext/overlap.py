"""How alike the selections of layers are, and what a layer loses with the selection of another.

IndexCache (arXiv 2603.12201, appendix A). A diagnostic, not a way to choose: neighbours that select nearly the same can
still be costly to share (appendix C). For models see `integrations.calibration.measure_overlap`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .schedule import LayerPattern


@dataclass
class Overlap:
    """Averages over `queries` queries that see more than `topk` keys; row i is the layer that attends.

    overlap[i][j]: share of what layer i selects that layer j selects, too: |T_i ∩ T_j| / topk.
    recall[i][j]: share of layer i's attention, over all keys that the query sees, that falls on what layer j selects.
    """

    overlap: list[list[float]]
    recall: list[list[float]]
    queries: int
    topk: int
    identity: dict[str, str] = field(default_factory=dict)  # what was measured

    def to_json(self) -> dict:
        """The fields, ready for json.dump."""
        return asdict(self)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Overlap:
        """Read JSON with the fields of `to_json`. Raises ValueError for anything else."""
        try:
            return cls(**json.loads(Path(path).read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not an overlap, or it is damaged: {error}") from error

    def plot(self, path: str | os.PathLike, pattern: LayerPattern | None = None, *, recall: bool = False) -> None:
        """Draw the heat map of the overlap, or of the recall, with a frame around what each Full layer serves."""
        from . import pictures

        title = "attention on another layer's selection" if recall else "overlap of selections"
        pictures.save(pictures.layer_map(self.recall if recall else self.overlap, title, pattern), path)


class OverlapMeter:
    """Adds up queries: `add` for some at a time, then `result`."""

    def __init__(self, layers: int, topk: int) -> None:
        self.topk = topk
        self.queries = 0
        self._overlap = torch.zeros(layers, layers, dtype=torch.float64)
        self._recall = torch.zeros(layers, layers, dtype=torch.float64)

    def add(self, selections: Tensor, attention: Tensor) -> None:
        """selections int [layers, queries, topk], distinct keys in 0 … keys-1 or -1; attention [layers, queries, keys].

        Attention is what each layer spreads over the keys, summing to 1 for each query. Queries that see no more than
        topk keys do not belong here: every layer selects all of theirs.
        """
        layers, queries, keys = attention.shape
        selected = torch.zeros(layers, queries, keys + 1, device=attention.device)
        selected.scatter_(2, selections.long() + 1, 1.0)  # column 0 takes the -1
        selected = selected[:, :, 1:].flatten(1)
        self._overlap += (selected @ selected.T).double().cpu()  # whole numbers, exact below 2^24
        self._recall += (attention.flatten(1).float() @ selected.T).double().cpu()
        self.queries += queries

    def result(self, identity: dict[str, str] | None = None) -> Overlap:
        """The averages. Raises ValueError before the first query."""
        if self.queries == 0:
            raise ValueError("overlap: no query sees more keys than topk; use a longer context")
        return Overlap(
            (self._overlap / (self.queries * self.topk)).tolist(),
            (self._recall / self.queries).tolist(),
            self.queries,
            self.topk,
            dict(identity or {}),
        )
