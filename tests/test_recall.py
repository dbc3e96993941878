"""bench/recall.py: its figures against sets counted one by one."""

from __future__ import annotations

import pytest
import scripts
import torch
from indexcache_ext import ops, reference

recall = scripts.load("recall")

QUERIES, KEYS, HEADS = 3, 2400, 8


def test_figures_are_those_of_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    for module, name in ((ops, "indexer_topk"), (reference, "indexer_logits")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: seen.setdefault(name, real(*a)))
    row = recall.measure("topics", QUERIES, KEYS, HEADS, "cpu")[0]
    assert row | {"recall": 0, "worst": 0, "missed": 0} == {
        "data": "topics", "heads": HEADS, "keys": KEYS, "format": "f32 scales", "recall": 0, "worst": 0, "missed": 0,
    }  # fmt: skip
    shares, gaps = [], []
    for found, scores in zip(seen["indexer_topk"].tolist(), seen["indexer_logits"].tolist(), strict=True):
        order = sorted(range(KEYS), key=lambda n: (-scores[n], n))
        visible = torch.tensor([score for score in scores if score > -torch.inf], dtype=torch.float64)
        shares.append(len(set(order[: recall.TOPK]) & set(found)) / recall.TOPK)
        gaps.append((scores[order[recall.TOPK - 1]] - min(scores[n] for n in found)) / visible.std(correction=0).item())
    assert row["recall"] == pytest.approx(sum(shares) / QUERIES) and row["worst"] == pytest.approx(min(shares))
    assert row["missed"] == pytest.approx(max(gaps)) and 0.9 < row["worst"] < 1


@pytest.mark.parametrize("kind", ["independent", "topics", "outliers"])
def test_every_kind_keeps_most(kind: str) -> None:
    assert all(row["recall"] > 0.9 for row in recall.measure(kind, QUERIES, KEYS, HEADS, "cpu"))


def test_command(capsys) -> None:
    assert recall.main(["--keys", "2400", "--heads", "4", "--queries", "2"]) == 0
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]] == [
        "| independent", "| topics", "| outliers",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        recall.main(["--keys", "2048"])
    assert "with less than 2064 keys everything is selected" in capsys.readouterr().err
