"""Exact top-k against torch.topk: every shape on normal data and on what slows selection down."""

import os

import pytest
import torch
from case_data import TOPK_HARD
from case_types import TopkCase
from harness import Baseline, best_columns, cpu, gpu, same_bits, size_of, visible

from indexcache_ext import ops

MARK = TopkCase(rows=512, columns=65_536, k=2048, windows="full")
CPU = (
    MARK,
    TopkCase(rows=512, columns=65_536, k=2048, windows="full", values="constant"),
    TopkCase(rows=1, columns=131_072, k=2048, windows="full"),
)
# Rows and columns: microseconds on an H200 that f32 scores, normal ones, should take at most.
MARKS_US = {
    (1024, 131_072): 180, (256, 131_072): 60, (4096, 65_536): 350, (64, 65_536): 14, (128, 32_768): 13,
    (16, 131_072): 14, (1, 131_072): 9, (1, 8192): 6, (1, 1_048_576): 14,
}  # fmt: skip
MOST_OF_NORMAL = 2.5  # no distribution should take longer, as a multiple of the same shape on normal data


def gpu_case(rows: int, columns: int, values: str = "randn", dtype: torch.dtype = torch.float32) -> TopkCase:
    return TopkCase(rows=rows, columns=columns, k=2048, windows="full", values=values, dtype=dtype, large=True)


GPU = tuple(gpu_case(*shape, values) for shape in MARKS_US for values in TOPK_HARD) + tuple(
    gpu_case(*shape, dtype=torch.bfloat16) for shape in MARKS_US
)


@pytest.fixture(scope="module")
def normal_seconds():
    """Device, shape and dtype: the time on normal data, which comes first of a shape."""
    return {}


@pytest.mark.parametrize(("device", "case"), cpu(*CPU) + gpu(*GPU))
def bench_topk(measure, sized, benchmark, normal_seconds, device, case):
    call = sized(case).make(device)
    logits, k = call["logits"], call["k"]

    def check(got):
        assert same_bits(got, best_columns(logits, k)), "not the k best columns in ascending order"

    read = logits.element_size() * visible(call["starts"], call["ends"], logits.size(1))
    f32_normal = case.values == "randn" and case.dtype == torch.float32
    info = measure(
        lambda: ops.topk(**call),
        device=device,
        check=check,
        nbytes=read + size_of(ops.topk(**call)),
        memory="READ" if device == "cuda" else "BW",
        baseline=Baseline("torch.topk", lambda: torch.topk(logits, k, dim=-1)),
        mark=8 if case is MARK else None,
        mark_us=MARKS_US[case.rows, case.columns] if device == "cuda" and f32_normal else None,
    )
    if info:
        rows, columns = logits.shape
        shape = (device, rows, columns, case.dtype)
        if case.values == "randn":
            normal_seconds[shape] = info["seconds"]
        of_normal = info["seconds"] / normal_seconds[shape] if shape in normal_seconds else None
        dtype = str(case.dtype).removeprefix("torch.")
        benchmark.extra_info |= {"rows": rows, "columns": columns, "values": case.values, "dtype": dtype}
        benchmark.extra_info |= {"of_normal": of_normal, "most_of_normal": MOST_OF_NORMAL}
        benchmark.extra_info |= {"read_again": read_again(call) if counts_reads(device) else None}


def counts_reads(device: str) -> bool:
    """Whether the kernel that is measured is the one that `topk_reads` tells of."""
    hopper = device == "cuda" and torch.cuda.get_device_capability()[0] == 9
    return hopper and os.environ.get("INDEXCACHE_BACKEND", "auto") in ("auto", "sm90")


def read_again(call: dict) -> float:
    """The share of rows that were read more than once."""
    return (torch.ops.indexcache.topk_reads(**call) > 1).float().mean().item()
