"""Exact selection: every distribution that breaks some top-k kernel, index for index."""

from __future__ import annotations

import math

import pytest
import torch
from case_data import INT_MAX, INT_MIN
from case_types import TopkCase
from compare import assert_out_variant, assert_repeats, assert_rows_stand_alone, assert_same_bits, run, some_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from indexcache_ext import reference

ops = torch.ops.indexcache
ROWS = "logits starts ends"


@pytest.mark.cases("topk", large=True)
def test_selection_is_exact(device: str, case: TopkCase) -> None:
    arguments = case.make(device)
    selected = ops.topk(**arguments) if case.large else run("topk", arguments)
    assert selected.shape == (case.rows, case.k)
    rows = some_rows(case.rows, 2000) if case.large else slice(None)
    logits, starts, ends = (arguments[name][rows] for name in ROWS.split())
    assert_same_bits(selected[rows], reference.topk(logits, starts, ends, case.k))


@pytest.mark.cases("topk")
def test_selection_depends_on_its_row_only(device: str, case: TopkCase) -> None:
    arguments = case.make(device)
    expected = run("topk", arguments)
    assert_repeats("topk", arguments, expected)
    assert_out_variant("topk", arguments, expected)
    if case.rows:
        assert_rows_stand_alone("topk", arguments, ROWS, expected)


@pytest.mark.cases("topk", large=True)
def test_selection_is_that_of_the_plain_backend(device: str, case: TopkCase, backend) -> None:
    """Index for index, whichever backend and spread over the GPU the dispatcher took."""
    arguments = case.make(device)
    selected = ops.topk(**arguments)
    backend("generic" if device == "cuda" else "cpu")
    assert_same_bits(selected, ops.topk(**arguments))


@pytest.mark.parametrize("stride", [0, 1, 5])
def test_rows_may_overlap(device: str, stride: int) -> None:
    """Any row stride is legal, also one that lets rows share memory."""
    memory = torch.randn(64, generator=torch.Generator().manual_seed(3)).to(device)
    logits = memory.as_strided((4, 40), (stride, 1))
    starts, ends = (torch.full((4,), bound, dtype=torch.int32, device=device) for bound in (3, 40))
    assert_same_bits(ops.topk(logits, starts, ends, 9), reference.topk(logits, starts, ends, 9))


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_rows_may_start_anywhere(device: str, offset: int) -> None:
    """A row that is aligned to 4 bytes only, as a slice of a wider tensor is."""
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(offset)).to(device)[:, offset:-7]
    starts, ends = (torch.full((5,), bound, dtype=torch.int32, device=device) for bound in (0, logits.size(1)))
    assert_same_bits(ops.topk(logits, starts, ends, 50), reference.topk(logits, starts, ends, 50))


HOSTILE = [0.0, -0.0, 1.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3.4e38, 65504.0, 65520.0]
FLOATS = st.one_of(st.sampled_from(HOSTILE), st.floats(width=32))
BOUNDS = st.one_of(st.integers(-3, 70), st.sampled_from([INT_MIN, INT_MIN + 1, INT_MAX - 1, INT_MAX]))


@st.composite
def selections(draw: st.DrawFn) -> tuple[list[list[float]], list[int], list[int], int]:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(0, 66))
    logits = [draw(st.lists(FLOATS, min_size=columns, max_size=columns)) for _ in range(rows)]
    starts, ends = ([draw(BOUNDS) for _ in range(rows)] for _ in range(2))
    return logits, starts, ends, draw(st.integers(1, 70))


def best_columns(row: list[float], start: int, end: int, k: int) -> list[int]:
    """The contract in words of Python, independent of torch's sort."""
    seen = [n for n in range(max(0, start), min(len(row), end)) if not math.isnan(row[n]) and row[n] != -math.inf]
    best = sorted(sorted(seen, key=lambda n: (-row[n], n))[:k])
    return best + [-1] * (k - len(best))


def as_tensors(logits: list[list[float]], *bounds: list[int], device: str) -> list[torch.Tensor]:
    columns = len(logits[0])
    values = torch.tensor(logits, dtype=torch.float32).view(len(logits), columns)
    return [values.to(device), *(torch.tensor(bound, dtype=torch.int32, device=device) for bound in bounds)]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(selections())
def test_any_row_is_selected_as_the_contract_says(device: str, drawn: tuple) -> None:
    logits, starts, ends, k = drawn
    tensors = as_tensors(logits, starts, ends, device=device)
    expected = [best_columns(*row, k) for row in zip(logits, starts, ends)]
    assert ops.topk(*tensors, k).tolist() == expected
    assert reference.topk(*tensors, k).tolist() == expected


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32 - 1), st.sampled_from(["rounded", "relu", "bits"])
)
def test_selection_is_a_sorted_set_of_the_best(device: str, columns: int, k: int, seed: int, kind: str) -> None:
    """Properties that need no oracle: how many, in order, and none left out beats one chosen."""
    case = TopkCase(rows=2, columns=columns, k=k, values=kind, windows="full")
    logits = case.make(device)["logits"].roll(seed % columns, 1)
    starts, ends = (torch.full((2,), bound, dtype=torch.int32, device=device) for bound in (0, columns))
    for row, selected in zip(logits.tolist(), ops.topk(logits, starts, ends, k).tolist()):
        eligible = {n for n, x in enumerate(row) if not math.isnan(x) and x != -math.inf}
        chosen = [n for n in selected if n >= 0]
        assert len(chosen) == min(k, len(eligible)) and selected[len(chosen) :] == [-1] * (k - len(chosen))
        assert chosen == sorted(set(chosen)) and eligible.issuperset(chosen)
        left = eligible.difference(chosen)
        if chosen and left:
            worst = min((row[n], -n) for n in chosen)
            assert worst > max((row[n], -n) for n in left)


def test_k_larger_than_memory_of_a_row(device: str) -> None:
    """k far beyond the columns pads with -1."""
    logits = torch.tensor([[3.0, 1.0, 2.0]], device=device)
    starts, ends = torch.tensor([0], device=device).int(), torch.tensor([3], device=device).int()
    selected = ops.topk(logits, starts, ends, 100_000)
    assert selected[0, :3].tolist() == [0, 1, 2] and (selected[0, 3:] == -1).all()
