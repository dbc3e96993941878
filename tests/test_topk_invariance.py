"""What a row selects depends on that row alone: not on the run, the batch, the kernel its size calls for, or a graph.

The rows are drawn on the device, and compared with themselves; `test_topk_fuzz.py` compares them with a sort.
"""

from __future__ import annotations

import pytest
import torch
from case_data import TOPK_HARD, Data, windows
from case_types import TopkCase
from compare import assert_repeats, assert_same_bits, take_rows
from torch import Tensor

ops = torch.ops.indexcache

ROWS = "logits starts ends"
K = 2048
DTYPES = (torch.float32, torch.bfloat16)
# Rows and columns: few long rows, many shorter ones.
SHAPES = {"cpu": ((3, 40_003), (3, 9001), (40, 2500)), "cuda": ((1, 1_048_576), (3, 140_003), (300, 20_011))}
BATCHES = {"cpu": ((300, 4099), (70, 20_011)), "cuda": ((4096, 8192), (4096, 65_536))}
PARTS = (1, 2, 3, 16, 66, 132, 133, 264, 1000)  # rows at a time: what spreads a row over fewer and fewer blocks

hard = pytest.mark.parametrize("values", (*TOPK_HARD, "bits"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])


def arguments(device: str, shape: tuple[int, int], values: str, dtype: torch.dtype, kind: str = "random") -> dict:
    rows, columns = shape
    case = TopkCase(rows=rows, columns=columns, k=K, values=values, dtype=dtype, windows=kind, row_extra=1, large=True)
    return case.make(device)


@hard
@dtypes
def test_repeats_and_permuted_rows_give_the_same_bits(device: str, values: str, dtype: torch.dtype) -> None:
    for shape in SHAPES[device]:
        call = arguments(device, shape, values, dtype, "full" if shape[0] < 4 else "random")
        expected = ops.topk(**call)
        assert_repeats("topk", call, expected, times=20)
        order = Data(str(shape), device).permutation(shape[0])
        assert_same_bits(ops.topk(**take_rows(call, ROWS, order)), expected[order])


@hard
@dtypes
def test_a_row_alone_is_that_row_among_thousands(device: str, values: str, dtype: torch.dtype) -> None:
    for shape in BATCHES[device]:
        call = arguments(device, shape, values, dtype, "full")
        whole = ops.topk(**call)
        assert (whole >= 0).all() or values == "bits"  # NaN and -inf leave room
        for size in PARTS:
            for first in range(0, shape[0] - size + 1, max(1, (shape[0] - size) // 5)):
                part = slice(first, first + size)
                assert_same_bits(ops.topk(**take_rows(call, ROWS, part)), whole[part])


@hard
@dtypes
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_graph_replays_are_the_eager_call_whatever_the_lengths(values: str, dtype: torch.dtype) -> None:
    """One graph, captured with full rows; before each replay the windows change, and every second time the scores."""
    for shape in SHAPES["cuda"]:
        call = arguments("cuda", shape, values, dtype, "full")
        out = ops.topk(**call)  # a first call loads the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ops.topk.out(**call, out=out)
        seen = set()
        for step, kind in enumerate(("full", "random", "empty", "causal", "short", "extreme", "full")):
            starts, ends = new_windows(kind, shape)
            call["starts"].copy_(starts)
            call["ends"].copy_(ends)
            if step % 2:
                call["logits"].copy_(call["logits"].roll(17 + step, 1))
            out.fill_(step)  # a column that is not written is seen
            graph.replay()
            expected = ops.topk(**{name: x.clone() if isinstance(x, Tensor) else x for name, x in call.items()})
            assert_same_bits(out, expected)
            seen.add(int((out >= 0).sum()))
        assert len(seen) > 1, "the lengths must change the result"


def new_windows(kind: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    data = Data(kind, "cuda")
    if kind != "short":
        return windows(kind, *shape, data)
    starts = data.integers(0, shape[1] // 2, shape[0])
    return starts, starts + data.integers(K - 2, K + 3, shape[0])
