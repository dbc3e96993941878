"""Exact top-k against torch.topk."""

import pytest
import torch
from case_types import TopkCase
from harness import Baseline, assert_selection, cpu, gpu, size_of, visible

from indexcache_ext import ops

MARK = TopkCase(rows=512, columns=65_536, k=2048, windows="full")
CPU = (
    MARK,
    TopkCase(rows=512, columns=65_536, k=2048, windows="full", values="constant"),
    TopkCase(rows=1, columns=131_072, k=2048, windows="full"),
)
GPU = (
    TopkCase(rows=1024, columns=131_072, k=2048, windows="full", large=True),
    TopkCase(rows=1024, columns=131_072, k=2048, windows="full", values="constant", large=True),
    TopkCase(rows=64, columns=65_536, k=2048, windows="full", large=True),
    TopkCase(rows=1, columns=131_072, k=2048, windows="full", large=True),
    TopkCase(rows=1, columns=1_048_576, k=2048, windows="full", large=True),
)


@pytest.mark.parametrize(("device", "case"), cpu(*CPU) + gpu(*GPU))
def bench_topk(measure, sized, device, case):
    call = sized(case).make(device)
    logits, k = call["logits"], call["k"]

    def check(got):
        assert_selection(got, logits, tolerance=torch.zeros(len(logits), 1, device=device))

    measure(
        lambda: ops.topk(**call),
        device=device,
        check=check,
        nbytes=4 * visible(call["starts"], call["ends"], logits.size(1)) + size_of(ops.topk(**call)),
        baseline=Baseline("torch.topk", lambda: torch.topk(logits, k, dim=-1)),
        mark=8 if case is MARK else None,
    )
