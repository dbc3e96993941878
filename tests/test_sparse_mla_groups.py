"""Few heads on the sm90 backend: neighbouring tokens share a tile, over the union of their lists."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from case_types import AttentionCase
from compare import assert_out_variant, assert_repeats, assert_same_bits, run, squared_difference, take_rows
from test_sparse_mla import check_values

from indexcache_ext import reference

TOKENS = 533  # enough for groups, the last of which is not full; and without one of them
KINDS = ("neighbours", "distinct", "same", "apart", "duplicates", "sprinkled", "invalid", "none")

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs the sm90 backend"
)


@pytest.fixture(autouse=True)
def _sm90(backend: Callable[[str], None]) -> None:
    backend("sm90")


def case(**options: object) -> AttentionCase:
    return AttentionCase(**{"tokens": TOKENS, "keys": 4096, "k": 200, "large": True} | options)


def group_of(case: AttentionCase) -> int:
    return next(n for n in (8, 4, 3, 2) if n <= 64 // case.heads)


def check(case: AttentionCase) -> None:
    check_values("sparse_mla", case, "cuda")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [1, 8, 16, 20, 32])
def test_values(heads: int, kind: str) -> None:
    check(case(heads=heads, indices=kind))


@pytest.mark.parametrize("k", [0, 1, 63, 64, 2048, 2051, 5000])
def test_list_lengths(k: int) -> None:
    check(case(heads=16, k=k, keys=30_000, indices="neighbours"))


@pytest.mark.parametrize(("heads", "keys"), [(8, 1), (8, 31), (8, 400_000), (8, 2_500_000), (32, 600_000)])
def test_windows_of_rows(heads: int, keys: int) -> None:
    """The bitmaps of 8 tokens cover 131,072 rows; groups spread over more than 16 windows go token by token."""
    check(case(heads=heads, keys=keys, k=min(keys, 300), indices="neighbours"))


@pytest.mark.parametrize(
    "options", [{"sink": "extreme"}, {"sink": "randn", "lengths": True}, {"d_qk": 512}, {"q_extra": 8}]
)
@pytest.mark.parametrize("heads", [8, 20])
def test_options(heads: int, options: dict) -> None:
    check(case(heads=heads, indices="neighbours", **options))


def test_longer_calls_go_in_chunks() -> None:
    """The unions of 30,000 tokens take more than a chunk of scratch memory."""
    check(case(heads=16, tokens=30_003, k=512, keys=8192, indices="neighbours"))


@pytest.mark.parametrize("kind", ["neighbours", "distinct", "duplicates"])
@pytest.mark.parametrize("heads", [8, 20])
def test_rows_have_the_same_bits_whatever_the_other_groups_are(heads: int, kind: str) -> None:
    few = case(heads=heads, indices=kind, sink="randn")
    arguments = few.make("cuda")
    expected = run("sparse_mla", arguments)
    assert_repeats("sparse_mla", arguments, expected, times=20)
    assert_out_variant("sparse_mla", arguments, expected)
    n = group_of(few)
    own, per_token = slice(5 * n, 6 * n), ("q", "indices")
    changed = arguments | {name: arguments[name].roll(3 * n + 1, 0).contiguous() for name in per_token}
    for name in per_token:
        changed[name][own] = arguments[name][own]
    for actual, before in zip(run("sparse_mla", changed), expected, strict=True):
        assert_same_bits(actual[own], before[own])
    for actual, before in zip(run("sparse_mla", take_rows(arguments, "q indices", slice(n, None))), expected, strict=True):
        assert_same_bits(actual, before[n:])


@pytest.mark.parametrize("kind", ["neighbours", "same", "sprinkled"])
@pytest.mark.parametrize("heads", [1, 8, 20, 32])
def test_groups_and_single_tokens_differ_by_rounding(heads: int, kind: str) -> None:
    """Fewer tokens than groups are made for go one by one."""
    few = case(heads=heads, indices=kind)
    arguments = few.make("cuda")
    out, lse = run("sparse_mla", arguments)
    some = slice(0, 300)
    alone, lse_alone = run("sparse_mla", take_rows(arguments, "q indices", some))
    assert squared_difference(out[some], alone) < 7e-6
    torch.testing.assert_close(lse[some], lse_alone, rtol=2 / 65536, atol=1e-5)


def test_a_repeated_entry_counts_twice_among_neighbours() -> None:
    """One list of a group names a row twice, which a union cannot say: the group goes token by token."""
    arguments = case(heads=8, indices="same").make("cuda")
    arguments["indices"][11, 7] = arguments["indices"][11, 3]
    out, lse = run("sparse_mla", arguments)
    some = slice(8, 16)
    expected = reference.sparse_mla(**take_rows(arguments, "q indices", some))
    assert squared_difference(out[some], expected[0]) < 7e-6
    torch.testing.assert_close(lse[some].double(), expected[1], rtol=2 / 65536, atol=1e-5)
