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
SHAPES = (
    (1024, 131_072), (256, 131_072), (4096, 65_536), (64, 65_536), (128, 32_768), (16, 131_072),
    (1, 131_072), (1, 8192), (1, 1_048_576),
)  # fmt: skip
HARD = ("constant", "relu", "binade", "ramp_up", "ramp_down", "late_block", "periodic", "rounded")
GPU = tuple(
    TopkCase(rows=rows, columns=columns, k=2048, windows="full", large=True) for rows, columns in SHAPES
) + tuple(
    TopkCase(rows=rows, columns=columns, k=2048, windows="full", values=values, large=True)
    for rows, columns in ((1024, 131_072), (1, 131_072))
    for values in HARD
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
