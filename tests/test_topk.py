"""Exact selection: every distribution that breaks some top-k kernel, index for index; its slots, and its reads."""

from __future__ import annotations

import math

import pytest
import torch
from case_data import INT_MAX, INT_MIN
from case_types import TopkCase, TopkSlotsCase
from compare import (
    assert_out_variant,
    assert_repeats,
    assert_rows_stand_alone,
    assert_same_bits,
    run,
    some_rows,
    take_rows,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from indexcache_ext import reference

ops = torch.ops.indexcache
ROWS = "logits starts ends"
TABLE = ("block_table", "requests", "page_size")


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


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@dtypes
@pytest.mark.parametrize("stride", [0, 1, 5])
def test_rows_may_overlap(device: str, stride: int, dtype: torch.dtype) -> None:
    """Any row stride is legal, also one that lets rows share memory."""
    memory = torch.randn(64, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    logits = memory.as_strided((4, 40), (stride, 1))
    starts, ends = (torch.full((4,), bound, dtype=torch.int32, device=device) for bound in (3, 40))
    assert_same_bits(ops.topk(logits, starts, ends, 9), reference.topk(logits, starts, ends, 9))


@dtypes
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_rows_may_start_anywhere(device: str, offset: int, dtype: torch.dtype) -> None:
    """A row that is aligned to one score only, as a slice of a wider tensor is."""
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(offset)).to(device, dtype)[:, offset:-7]
    starts, ends = (torch.full((5,), bound, dtype=torch.int32, device=device) for bound in (0, logits.size(1)))
    assert_same_bits(ops.topk(logits, starts, ends, 50), reference.topk(logits, starts, ends, 50))


HOSTILE = torch.tensor(  # and back: the numbers that float32 has, for Python compares them too
    [0.0, -0.0, 1.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3.4e38, 65504.0, 65520.0]
).tolist()
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
    values, *bounds = as_tensors(logits, starts, ends, device=device)
    for scores in (values, values.bfloat16()):
        expected = [best_columns(*row, k) for row in zip(scores.tolist(), starts, ends)]
        assert ops.topk(scores, *bounds, k).tolist() == expected
        assert reference.topk(scores, *bounds, k).tolist() == expected


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


# --- Selection as slots of a cache ------------------------------------------------------------------------------------


@pytest.mark.cases("topk_to_slots", large=True)
def test_slots_are_those_of_the_two_ops(device: str, case: TopkSlotsCase) -> None:
    """Of this library bit for bit, and of the reference."""
    arguments = case.make(device)
    slots = ops.topk_to_slots(**arguments) if case.large else run("topk_to_slots", arguments)
    rows = some_rows(case.rows, 2000) if case.large else slice(None)
    expected = reference.topk_to_slots(**take_rows(arguments, f"{ROWS} requests", rows))
    assert_same_bits(slots[rows], expected)
    table = {name: arguments.pop(name) for name in TABLE}
    assert_same_bits(slots, ops.to_slots(ops.topk(**arguments), **table))


@pytest.mark.cases("topk_to_slots")
def test_slots_depend_on_their_row_only(device: str, case: TopkSlotsCase) -> None:
    arguments = case.make(device)
    expected = run("topk_to_slots", arguments)
    assert_repeats("topk_to_slots", arguments, expected)
    assert_out_variant("topk_to_slots", arguments, expected)
    if case.rows:
        assert_rows_stand_alone("topk_to_slots", arguments, f"{ROWS} requests", expected)


@pytest.mark.cases("topk_to_slots", large=True)
def test_slots_are_those_of_the_plain_backend(device: str, case: TopkSlotsCase, backend) -> None:
    arguments = case.make(device)
    slots = ops.topk_to_slots(**arguments)
    backend("generic" if device == "cuda" else "cpu")
    assert_same_bits(slots, ops.topk_to_slots(**arguments))


def test_slots_by_hand(device: str) -> None:
    """Pages of 2: the slots of a row keep the order of their columns, and -1 stays where a column has no page."""
    row = [1.0, 9.0, 8.0, math.nan, 7.0, 6.0, 5.0]
    logits = torch.tensor([row] * 4, device=device)
    starts, ends = (torch.tensor(bound, dtype=torch.int32, device=device) for bound in ([0, 0, 2, 0], [7, 7, 7, 2]))
    table = torch.tensor([[30, 7, -1], [0, 2**30, 2**30 - 1]], dtype=torch.int32, device=device)
    requests = torch.tensor([0, 1, 2, 0], dtype=torch.int32, device=device)
    slots = ops.topk_to_slots(logits, starts, ends, 5, table, requests, 2)
    assert slots.tolist() == [
        [61, 14, -1, -1, -1],  # columns 1, 2, 4, 5, 6: page -1, and past the table
        [1, -1, 2**31 - 2, 2**31 - 1, -1],  # 2 * 2^30 is no int32
        [-1] * 5,  # no such request
        [60, 61, -1, -1, -1],  # a window of two columns
    ]


# --- How often a row is read ------------------------------------------------------------------------------------------


@pytest.mark.cases("topk_reads")
def test_reads_are_counted_on_every_backend(device: str, case: TopkCase, backend) -> None:
    """At least once where there is something to choose; which number it is, is the backend's own."""
    arguments = case.make(device)
    _, starts, ends = (arguments[name] for name in ROWS.split())
    length = ends.long().clamp(max=case.columns) - starts.long().clamp(min=0)
    for name in ("auto", "generic" if device == "cuda" else "cpu"):
        backend(name)
        reads = run("topk_reads", arguments)
        assert reads.shape == (case.rows,) and reads.dtype == torch.int32
        assert (reads[length > case.k] >= 1).all() and (reads >= 0).all()
        assert_repeats("topk_reads", arguments, reads)


def reads_on_the_cpu(values: str, dtype: torch.dtype, k: int = 2048) -> set[int]:
    case = TopkCase(rows=20, columns=40_000, k=k, windows="full", values=values, dtype=dtype)
    return set(ops.topk_reads(**case.make("cpu")).tolist())


@dtypes
def test_a_long_row_is_read_once_unless_its_values_are_hard(dtype: torch.dtype) -> None:
    assert reads_on_the_cpu("randn", dtype) == reads_on_the_cpu("relu_70", dtype) == {1}
    assert min(reads_on_the_cpu("constant", dtype)) > 1
    assert min(reads_on_the_cpu("randn", dtype, k=40_000)) > 1  # nothing to sample where all are taken


@pytest.mark.parametrize("columns", [0, 5])
def test_reads_need_no_memory_for_k_past_the_columns(device: str, columns: int) -> None:
    logits = torch.zeros(2, columns, device=device)
    starts, ends = (torch.full((2,), bound, dtype=torch.int32, device=device) for bound in (0, columns))
    assert ops.topk_reads(logits, starts, ends, 2**62).shape == (2,)
