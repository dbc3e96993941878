"""What a row attends to depends on that row and the shape of the call: not on the run, its place, or the other rows.

On a GPU few tokens split the keys of a row, by tokens, heads and k alone (`docs/sparse_mla.md`); so a row is compared
with itself in calls that split alike. (The lists here repeat entries: few heads that share them are in
`test_sparse_mla_groups.py`.) `test_sparse_mla.py` compares rows with float64.
"""

from __future__ import annotations

import pytest
import torch
from case_data import Data
from case_types import AttentionCase
from compare import assert_repeats, assert_rows_do_not_mix, assert_same_bits, results, run, take_rows

ROWS = "q indices slots lengths"
# Tokens, heads, k: whole waves of blocks that go on from token to token, and few tokens whose keys are split.
SHAPES = {
    "cpu": ((9, 20, 130), (3, 64, 65)),
    "cuda": (
        *((400, 64, 2048), (300, 128, 2051), (700, 20, 320)),
        *((70, 64, 2048), (33, 16, 2176), (7, 64, 2048), (1, 128, 2048)),
    ),
}
BATCHES = {"cpu": (40, (1, 2, 7, 39)), "cuda": (700, (133, 264, 399, 699))}  # tokens, and parts: none is split

paged = pytest.mark.parametrize("page_size", (0, 64), ids=["dense", "paged"])
lengths = pytest.mark.parametrize("lengths", (False, True), ids=["whole", "lengths"])


def call(device: str, tokens: int, heads: int, k: int, page_size: int, with_lengths: bool) -> tuple[str, dict]:
    case = AttentionCase(
        tokens=tokens, heads=heads, k=k, keys=4096, page_size=page_size, indices="random", sink="randn", large=True
    )
    arguments = case.make(device)
    if with_lengths:  # none, short ones and whole ones: blocks of a grid drift apart
        arguments["lengths"] = Data(case.id, device).integers(-k // 4, 2 * k, tokens).int()
    return "sparse_mla_paged" if page_size else "sparse_mla", arguments


@paged
@lengths
def test_repeats_and_other_rows_change_no_bits(device: str, page_size: int, lengths: bool) -> None:
    for shape in SHAPES[device]:
        op, arguments = call(device, *shape, page_size, lengths)
        expected = run(op, arguments)
        assert_repeats(op, arguments, expected, times=20)
        assert_rows_do_not_mix(op, arguments, ROWS, expected)


@paged
@lengths
@pytest.mark.parametrize("heads", (64, 128, 20))
def test_a_row_is_the_same_in_every_batch_that_splits_alike(
    device: str, page_size: int, lengths: bool, heads: int
) -> None:
    tokens, parts = BATCHES[device]
    op, arguments = call(device, tokens, heads, 321, page_size, lengths)
    whole = results(run(op, arguments))
    order = Data("parts", device).permutation(tokens)
    for size in parts:
        some = order[:size]
        for actual, expected in zip(results(run(op, take_rows(arguments, ROWS, some))), whole, strict=True):
            assert_same_bits(actual, expected[some])


def test_a_call_of_no_tokens_or_heads_is_empty(device: str) -> None:
    for tokens, heads in ((0, 64), (200, 0), (0, 0)):
        op, arguments = call(device, tokens, heads, 64, 0, False)
        out, lse = run(op, arguments)
        assert out.shape == (tokens, heads, 512) and lse.shape == (tokens, heads)
        assert torch.isfinite(out).all()
