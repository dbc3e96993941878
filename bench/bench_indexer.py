"""Index scores and the fused selection, dense and paged.

By FLOP rate, `indexer_topk` is held against torch.mm f32 on the CPU and dense scores against torch._scaled_mm e4m3 on a
GPU, where selection is held against the scores alone; the others against the same scores in plain torch.
"""

import plain_torch
import pytest
import torch
from case_types import IndexerCase, PagedIndexerCase
from harness import Baseline, assert_selection, cpu, e4m3_product, f32_product, gpu, sampled_rows, size_of, visible
from torch import Tensor

from indexcache_ext import ops, reference

MARK = IndexerCase(tokens=512, keys=16_384, heads=32, topk=2048)
PREFILL = tuple(
    IndexerCase(tokens=tokens, keys=keys, heads=heads, topk=2048, large=True)
    for heads in (64, 32)
    for tokens, keys in ((4096, 65_536), (4096, 131_072), (64, 131_072))
)
CPU_DECODE = PagedIndexerCase(lengths=(16_384,) * 4, heads=32, max_context_len=16_384, table_pages=256, topk=2048)


def decode(batch: int, length: int, queries: int = 1) -> PagedIndexerCase:
    return PagedIndexerCase(
        lengths=(length,) * batch,
        queries=queries,
        heads=64,
        max_context_len=length,
        table_pages=length // 64,
        topk=2048,
        large=True,
    )


DECODE = decode(64, 65_536), decode(8, 32_768), decode(1, 131_072), decode(128, 8192)
TWO_QUERIES = decode(64, 65_536, queries=2), decode(128, 8192, queries=2)


def prefill_mark(case: IndexerCase) -> float:
    """Share of the rate of torch._scaled_mm."""
    return 0.8 if case.tokens == 64 else 0.95 if case.heads == 64 else 0.9


def decode_mark(case: PagedIndexerCase, nbytes: int, bandwidth: float) -> float | None:
    """Microseconds for `nbytes`; 0.95 of the bandwidth of a copy for the largest call."""
    marks = {decode(1, 131_072): 8, decode(8, 32_768): 12, decode(128, 8192): 38}
    return nbytes / (0.95 * bandwidth) * 1e6 if case == DECODE[0] else marks.get(case)


def rounding(scores: Tensor) -> float:
    """What sums may be off by, relative to their terms: f32, and on tensor cores less than that."""
    return 2.5e-4 if scores.is_cuda else 1e-5


def expected_scores(call: dict, rows: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 scores of a few queries, and the rounding that sums of their terms may show."""
    rows = rows.to(call["q"].device)
    part = call | {name: call[name][rows] for name in ("q", "weights", "starts", "ends")}
    size = reference.indexer_logits(**part | {"weights": part["weights"].abs()})
    return reference.indexer_logits(**part), rounding(size) * size.amax(-1, keepdim=True)


def paged_scores(call: dict, columns: int) -> tuple[Tensor, Tensor]:
    """The same for every query of the first and the last request."""
    last = len(call["q"]) - 1
    part = call | {name: call[name][[0, last]] for name in ("q", "weights", "context_lens", "block_table")}
    size = reference.indexer_logits_paged(**part | {"weights": part["weights"].abs()}, max_context_len=columns)
    scores = reference.indexer_logits_paged(**part, max_context_len=columns).flatten(0, 1)
    return scores, rounding(size) * size.flatten(0, 1).amax(-1, keepdim=True)


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
    if device == "cpu":
        baseline, mark = (Baseline("torch mm, relu, sum", lambda: plain_torch.indexer_logits(**call)), None)
    else:
        product, product_flops = e4m3_product()
        baseline, mark = (Baseline("torch._scaled_mm e4m3 (FLOP rate)", product, product_flops), prefill_mark(case))
    measure(
        lambda: ops.indexer_logits(**call),
        device=device,
        check=lambda got: assert_scores(got[rows.to(device)], *expected_scores(call, rows)),
        roof="F32" if device == "cpu" else "R8",
        flops=work(call),
        nbytes=size_of(*call.values()) + 4 * len(call["q"]) * len(call["k"]),
        baseline=baseline,
        mark=mark,
    )


@pytest.mark.parametrize(("device", "case"), cpu(MARK) + gpu(PREFILL[1], PREFILL[4]))
def bench_indexer_topk(measure, sized, device, case):
    case = sized(case)
    call = case.make(device)
    rows = sampled_rows(len(call["q"]))
    if device == "cpu":
        product, product_flops = f32_product()
        baseline, mark = (Baseline("torch.mm f32 (FLOP rate)", product, product_flops), 0.7)
    else:
        baseline = Baseline("indexer_logits", lambda: ops.indexer_logits(**call))
        mark = 1 / (1.1 if case.heads == 64 else 1.2)  # of its own scores' time at most
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


@pytest.fixture(scope="module")
def one_query():
    """Seconds of the calls with one query per request, by number of requests: those with two come later."""
    return {}


@pytest.mark.parametrize(("device", "case"), cpu(CPU_DECODE) + gpu(*DECODE, *TWO_QUERIES))
def bench_indexer_logits_paged(measure, sized, one_query, device, case):
    call, columns, flops, nbytes = paged_call(sized(case), device)
    nbytes += 4 * call["context_lens"].numel() * columns
    batch, queries = call["context_lens"].shape
    mark_us = None
    if device == "cuda":
        mark_us = decode_mark(case, nbytes, measure.roofs(device)["BW"])
        mark_us = 1.1e6 * one_query[batch] if queries == 2 and batch in one_query else mark_us
    small = batch <= 8  # of the others the baseline would take most of a run
    info = measure(
        lambda: ops.indexer_logits_paged(**call, max_context_len=columns),
        device=device,
        check=lambda got: assert_scores(got[[0, len(got) - 1]].flatten(0, 1), *paged_scores(call, columns)),
        roof="F32" if device == "cpu" else "R8",
        flops=flops,
        nbytes=nbytes,
        baseline=Baseline("torch mm, relu, sum", lambda: plain_torch.indexer_logits_paged(call, columns))
        if small
        else None,
        mark_us=mark_us,
    )
    if info and queries == 1:
        one_query[batch] = info["seconds"]


@pytest.mark.parametrize(("device", "case"), cpu(CPU_DECODE) + gpu(*DECODE, decode(1, 8192)))
def bench_indexer_topk_paged(measure, sized, device, case):
    case = sized(case)
    call, columns, flops, nbytes = paged_call(case, device)
    if device == "cpu":
        plain = lambda: plain_torch.indexer_logits_paged(call, columns).topk(case.topk)  # noqa: E731
        baseline = Baseline("torch mm, relu, sum, topk", plain)
    else:
        scores = lambda: ops.indexer_logits_paged(**call, max_context_len=columns)  # noqa: E731
        baseline = Baseline("indexer_logits_paged", scores)
    measure(
        lambda: ops.indexer_topk_paged(**call, topk=case.topk),
        device=device,
        check=lambda got: assert_selection(got[[0, len(got) - 1]].flatten(0, 1), *paged_scores(call, columns)),
        roof="F32" if device == "cpu" else "R8",
        flops=flops,
        nbytes=nbytes + 4 * call["context_lens"].numel() * case.topk,
        baseline=baseline,
        mark=1 / 1.08 if case == DECODE[0] else None,
        mark_us={decode(1, 131_072): 14, decode(1, 8192): 9}.get(case),
    )
