"""How much of the true selection survives the FP8 indexer: `indexer_topk` against fp64 scores of unquantised inputs.

    python bench/recall.py [--keys 8192 65536] [--heads 64 32] [--device cuda] [--json]

`recall` is the share of the k best keys that is selected, of all queries and of the worst one; `missed` how far below
the cut the worst selected key is, in standard deviations of a query's scores. bf16 inputs of 128 dims, RoPE on 64.

    independent  keys and queries have nothing to do with each other: scores about the cut are as dense as can be
    topics       keys belong to 64 topics and a query asks for one, as trained indexers do
    outliers     independent; four channels of the queries and four others of the keys are 30 times the rest
"""

from __future__ import annotations

import argparse
import json
import sys

import roofline
import torch
from indexcache_ext import ops, reference
from torch import Tensor
from tqdm import tqdm

DIM, ROT, TOPK = 128, 64, 2048
FORMATS = {"f32 scales": {}, "powers of two": {"ue8m0": True}, "Hadamard": {"hadamard": True}}


def draw(kind: str, queries: int, keys: int, heads: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, D], head gates [T, H] and k [N, D]."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, gates, k = randn(queries, heads, DIM), randn(queries, heads), randn(keys, DIM)
    if kind == "topics":
        topics = randn(64, DIM)
        k += topics[torch.randint(64, (keys,), generator=generator)]
        q += topics[torch.randint(64, (queries,), generator=generator)][:, None]
        gates = gates.abs()
    elif kind == "outliers":
        q[..., :4] *= 30
        k[..., -4:] *= 30
    return q.bfloat16(), gates, k.bfloat16()


def true_scores(q: Tensor, gates: Tensor, k: Tensor, table: Tensor, where: tuple[Tensor, Tensor]) -> Tensor:
    vectors = [reference.index_vector(x, table, positions) for x, positions in zip((q, k), where, strict=True)]
    ends = where[0].int() + 1
    ones = torch.ones(len(k), dtype=torch.float64, device=k.device)
    return reference.indexer_logits(*vectors, ones, gates, torch.zeros_like(ends), ends)


def measure(kind: str, queries: int, keys: int, heads: int, device: str, seed: int = 0) -> list[dict]:
    """The last queries of a causal sequence, in every format."""
    q, gates, k = (x.to(device) for x in draw(kind, queries, keys, heads, seed))
    angle = torch.arange(keys, device=device)[:, None] * 1e-4 ** torch.linspace(0, 1, ROT // 2, device=device)
    table = torch.cat([angle.cos(), angle.sin()], 1)
    where = torch.arange(keys - queries, keys, device=device), torch.arange(keys, device=device)
    scores = true_scores(q, gates, k, table, where)
    best, cut = reference.topk(scores, torch.zeros_like(where[0]), where[0] + 1, TOPK), scores.topk(TOPK).values[:, -1:]
    spread = scores.masked_fill(scores == -torch.inf, torch.nan)
    deviation = (spread - spread.nanmean(1, keepdim=True)).square().nanmean(1, keepdim=True).sqrt()
    rows = []
    for name, options in FORMATS.items():
        q8, weights = ops.quantize_index_q(q, gates, table, where[0], scale=1.0, **options)
        k8, k_scale = ops.quantize_index_k(k, None, None, table, where[1], **options)
        starts, ends = torch.zeros(queries, dtype=torch.int32, device=device), where[0].int() + 1
        found = ops.indexer_topk(q8, k8, k_scale, weights, starts, ends, TOPK).long()
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, found, True)
        kept = chosen.gather(1, best.long()).float().mean(1)
        missed = ((cut - scores.gather(1, found)) / deviation).amax()
        rows.append(
            {
                "data": kind,
                "heads": heads,
                "keys": keys,
                "format": name,
                "recall": kept.mean().item(),
                "worst": kept.min().item(),
                "missed": max(0.0, missed.item()),
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, nargs="+", default=[8192, 65_536], metavar="N")
    parser.add_argument("--heads", type=int, nargs="+", default=[64, 32], metavar="H")
    parser.add_argument("--queries", type=int, default=16, metavar="T", help="the last of N positions (16)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    if min(args.keys) < TOPK + args.queries:
        parser.error(f"--keys {min(args.keys)}: with less than {TOPK + args.queries} keys everything is selected")
    cases = [(kind, n, h) for kind in ("independent", "topics", "outliers") for n in args.keys for h in args.heads]
    rows = []
    for kind, keys, heads in tqdm(cases, unit="case", file=sys.stderr):
        rows += measure(kind, args.queries, keys, heads, args.device)
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    lines = [["data", "heads", "keys", *(f"{name}: recall, worst, missed" for name in FORMATS)]]
    for first in range(0, len(rows), len(FORMATS)):
        group = rows[first : first + len(FORMATS)]
        cells = [f"{row['recall']:.2%}, {row['worst']:.2%}, {row['missed']:.3f}" for row in group]
        lines.append([group[0]["data"], str(group[0]["heads"]), f"{group[0]['keys']:,}", *cells])
    print(roofline.markdown(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
