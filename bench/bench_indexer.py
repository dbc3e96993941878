"""Index scores and the fused selection, dense and paged.

`indexer_topk` is held against torch.mm f32 by FLOP rate on the CPU; the others against the same scores in plain torch.
"""

import plain_torch
import pytest
import torch
from case_types import IndexerCase, PagedIndexerCase
from harness import Baseline, assert_selection, cpu, f32_product, gpu, sampled_rows, size_of, visible
from torch import Tensor

from indexcache_ext import ops, reference

MARK = IndexerCase(tokens=512, keys=16_384, heads=32, topk=2048)
PREFILL = tuple(
    IndexerCase(tokens=tokens, keys=keys, heads=heads, topk=2048, large=True)
    for heads in (64, 32)
    for tokens, keys in ((4096, 65_536), (4096, 131_072), (64, 131_072))
)
CPU_DECODE = PagedIndexerCase(lengths=(16_384,) * 4, heads=32, max_context_len=16_384, table_pages=256, topk=2048)
DECODE = tuple(
    PagedIndexerCase(
        lengths=(length,) * batch, heads=64, max_context_len=length, table_pages=length // 64, topk=2048, large=True
    )
    for batch, length in ((64, 65_536), (8, 32_768), (1, 131_072))
)


def expected_scores(call: dict, rows: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 scores of a few queries, and the rounding that f32 sums of their terms may show."""
    rows = rows.to(call["q"].device)
    part = call | {name: call[name][rows] for name in ("q", "weights", "starts", "ends")}
    size = reference.indexer_logits(**part | {"weights": part["weights"].abs()})
    return reference.indexer_logits(**part), 1e-5 * size.amax(-1, keepdim=True)


def paged_scores(call: dict, columns: int) -> tuple[Tensor, Tensor]:
    """The same for every query of the first and the last request."""
    last = len(call["q"]) - 1
    part = call | {name: call[name][[0, last]] for name in ("q", "weights", "context_lens", "block_table")}
    size = reference.indexer_logits_paged(**part | {"weights": part["weights"].abs()}, max_context_len=columns)
    scores = reference.indexer_logits_paged(**part, max_context_len=columns)
    return scores.flatten(0, 1), 1e-5 * size.flatten(0, 1).amax(-1, keepdim=True)


def assert_scores(got: Tensor, scores: Tensor, tolerance: Tensor) -> None:
    hidden = scores == -torch.inf
    assert (got == -torch.inf).equal(hidden)
    assert ((got - scores).abs() <= tolerance).logical_or(hidden).all()


def work(call: dict) -> float:
    tokens, heads, dim = call["q"].shape
    return 2 * heads * dim * visible(call["starts"], call["ends"], len(call["k"]))


@pytest.mark.parametrize(("device", "case"), cpu(IndexerCase(tokens=64, keys=16_384, heads=32)) + gpu(*PREFILL))
def bench_indexer_logits(measure, sized, device, case):
    call = sized(case).make(device)
    rows = sampled_rows(len(call["q"]))
    measure(
        lambda: ops.indexer_logits(**call),
        device=device,
        check=lambda got: assert_scores(got[rows.to(device)], *expected_scores(call, rows)),
        roof="F32" if device == "cpu" else "R8",
        flops=work(call),
        nbytes=size_of(*call.values()) + 4 * len(call["q"]) * len(call["k"]),
        baseline=Baseline("torch mm, relu, sum", lambda: plain_torch.indexer_logits(**call)),
    )


@pytest.mark.parametrize(("device", "case"), cpu(MARK) + gpu(PREFILL[1]))
def bench_indexer_topk(measure, sized, device, case):
    case = sized(case)
    call = case.make(device)
    rows = sampled_rows(len(call["q"]))
    if device == "cpu":
        product, product_flops = f32_product()
        baseline, mark = Baseline("torch.mm f32 (FLOP rate)", product, product_flops), 0.7
    else:
        plain, mark = lambda: plain_torch.indexer_logits(**call).topk(case.topk), None
        baseline = Baseline("torch mm, relu, sum, topk", plain)
    measure(
        lambda: ops.indexer_topk(**call, topk=case.topk),
        device=device,
        check=lambda got: assert_selection(got[rows.to(device)], *expected_scores(call, rows)),
        roof="F32" if device == "cpu" else "R8",
        flops=work(call),
        nbytes=size_of(*call.values()) + 4 * len(call["q"]) * case.topk,
        baseline=baseline,
        mark=mark,
    )


def paged_call(case: PagedIndexerCase, device: str) -> tuple[dict, int, float, int]:
    """Arguments, columns, FLOPs, and the bytes of queries and of the keys that they see."""
    call = case.make(device)
    columns = call.pop("max_context_len")
    lens = call["context_lens"].clamp(0, columns).long()
    _, _, heads, dim = call["q"].shape
    flops = 2 * heads * dim * int(lens.sum())
    nbytes = size_of(call["q"], call["weights"]) + (dim + 4) * int(lens.amax(1).sum())
    return call, columns, flops, nbytes


@pytest.mark.parametrize(("device", "case"), cpu(CPU_DECODE) + gpu(*DECODE))
def bench_indexer_logits_paged(measure, sized, device, case):
    call, columns, flops, nbytes = paged_call(sized(case), device)
    measure(
        lambda: ops.indexer_logits_paged(**call, max_context_len=columns),
        device=device,
        check=lambda got: assert_scores(got[[0, len(got) - 1]].flatten(0, 1), *paged_scores(call, columns)),
        roof="F32" if device == "cpu" else "R8",
        flops=flops,
        nbytes=nbytes + 4 * call["context_lens"].numel() * columns,
        baseline=Baseline("torch mm, relu, sum", lambda: plain_torch.indexer_logits_paged(call, columns)),
    )


@pytest.mark.parametrize(("device", "case"), cpu(CPU_DECODE) + gpu(*DECODE))
def bench_indexer_topk_paged(measure, sized, device, case):
    case = sized(case)
    call, columns, flops, nbytes = paged_call(case, device)
    measure(
        lambda: ops.indexer_topk_paged(**call, topk=case.topk),
        device=device,
        check=lambda got: assert_selection(got[[0, len(got) - 1]].flatten(0, 1), *paged_scores(call, columns)),
        roof="F32" if device == "cpu" else "R8",
        flops=flops,
        nbytes=nbytes + 4 * call["context_lens"].numel() * case.topk,
        baseline=Baseline(
            "torch mm, relu, sum, topk", lambda: plain_torch.indexer_logits_paged(call, columns).topk(case.topk)
        ),
    )
