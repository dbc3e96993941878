"""Indexer scores, dense and paged, and the selection fused with them."""

from __future__ import annotations

import pytest
import torch
from case_types import IndexerCase, PagedIndexerCase, SlotsCase
from compare import (
    LOGIT_ROUNDING,
    assert_logits,
    assert_out_variant,
    assert_repeats,
    assert_rows_stand_alone,
    assert_same_bits,
    run,
    some_rows,
    take_rows,
)

from indexcache_ext import reference

ops = torch.ops.indexcache
ROWS = "q weights starts ends"
PAGED_ROWS = "q weights context_lens block_table"


def paged_topk_arguments(case: PagedIndexerCase, device: str) -> dict:
    arguments = case.make(device)
    del arguments["max_context_len"]
    return arguments | {"topk": case.topk}


@pytest.mark.cases("indexer_logits", large=True)
def test_logits_are_those_of_float64(device: str, case: IndexerCase) -> None:
    arguments = case.make(device)
    logits = run("indexer_logits", arguments)
    rows = some_rows(case.tokens) if case.large else slice(None)
    assert logits.shape == (case.tokens, case.keys)
    assert_logits(logits[rows], take_rows(arguments, ROWS, rows))


@pytest.mark.cases("indexer_logits")
def test_logits_depend_on_their_row_only(device: str, case: IndexerCase) -> None:
    arguments = case.make(device)
    expected = run("indexer_logits", arguments)
    assert_repeats("indexer_logits", arguments, expected)
    assert_out_variant("indexer_logits", arguments, expected)
    if case.tokens:
        assert_rows_stand_alone("indexer_logits", arguments, ROWS, expected)


@pytest.mark.cases("indexer_logits")
def test_logits_depend_on_their_key_only(device: str, case: IndexerCase) -> None:
    """A score does not change with what other keys there are, nor with the window that shows it."""
    arguments = case.make(device)
    everything = torch.zeros_like(arguments["starts"]), torch.full_like(arguments["ends"], case.keys)
    whole = ops.indexer_logits(**arguments | dict(zip(("starts", "ends"), everything)))
    windowed = ops.indexer_logits(**arguments)
    seen = reference.window_mask(arguments["starts"], arguments["ends"], case.keys)
    assert_same_bits(windowed, torch.where(seen, whole, -torch.inf))
    first = case.keys // 3
    tail = arguments | {name: arguments[name][first:].contiguous() for name in ("k", "k_scale")}
    tail |= dict(zip(("starts", "ends"), everything))
    assert_same_bits(ops.indexer_logits(**tail), whole[:, first:].contiguous())


@pytest.mark.parametrize("first", [1, 2, 3, 64, 67])
@pytest.mark.parametrize("heads", [8, 64])
def test_keys_may_start_anywhere(device: str, heads: int, first: int) -> None:
    """Scales that are aligned to one number only, as those of a slice are, give the bits of the whole."""
    arguments = IndexerCase(tokens=9, keys=300, heads=heads, windows="full").make(device)
    tail = arguments | {name: arguments[name][first:] for name in ("k", "k_scale")}
    whole = ops.indexer_logits(**arguments)[:, first:].contiguous()
    tail["starts"], tail["ends"] = torch.zeros_like(tail["starts"]), torch.full_like(tail["ends"], 300 - first)
    assert_same_bits(ops.indexer_logits(**tail), whole)
    assert_logits(whole, tail)


@pytest.mark.cases("indexer_topk", large=True)
def test_fused_selection_is_topk_of_the_logits(device: str, case: IndexerCase) -> None:
    arguments = case.make(device)
    selected = run("indexer_topk", arguments | {"topk": case.topk})
    logits = ops.indexer_logits(**arguments)
    starts, ends = arguments["starts"], arguments["ends"]
    assert_same_bits(selected, ops.topk(logits, starts, ends, case.topk))
    rows = some_rows(case.tokens) if case.large else slice(None)
    assert_same_bits(selected[rows], reference.topk(logits[rows], starts[rows], ends[rows], case.topk))


@pytest.mark.cases("indexer_topk")
def test_fused_selection_depends_on_its_row_only(device: str, case: IndexerCase) -> None:
    arguments = case.make(device) | {"topk": case.topk}
    expected = run("indexer_topk", arguments)
    assert_repeats("indexer_topk", arguments, expected)
    assert_out_variant("indexer_topk", arguments, expected)
    if case.tokens:
        assert_rows_stand_alone("indexer_topk", arguments, ROWS, expected)


def test_fused_selection_in_several_chunks(device: str) -> None:
    """More rows than the scratch memory of one chunk holds, on the CPU at least."""
    case = IndexerCase(tokens=700, keys=1801, heads=2, dim=16, windows="random")
    arguments = case.make(device)
    selected = ops.indexer_topk(**arguments, topk=100)
    logits = ops.indexer_logits(**arguments)
    assert_same_bits(selected, reference.topk(logits, arguments["starts"], arguments["ends"], 100))


def test_selection_agrees_with_float64_beyond_rounding(device: str) -> None:
    """On a context far longer than k, only keys whose float64 scores nearly tie with the k-th may be exchanged."""
    case = IndexerCase(tokens=40, keys=2000, heads=32, windows="causal")
    arguments, k = case.make(device), 128
    scores = reference.indexer_logits(**arguments)
    selected = ops.indexer_topk(**arguments, topk=k).long()
    assert (selected >= 0).all()
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, selected, True)
    least_chosen = scores.masked_fill(~chosen, torch.inf).amin(1)
    best_left = scores.masked_fill(chosen, -torch.inf).amax(1)
    spread = scores.masked_fill(scores == -torch.inf, 0).std(1)
    assert (best_left - least_chosen <= (1e-5 if device == "cpu" else 1e-2) * spread).all()


@pytest.mark.cases("indexer_logits_paged", large=True)
def test_paged_logits_are_those_of_float64(device: str, case: PagedIndexerCase) -> None:
    arguments = case.make(device)
    logits = run("indexer_logits_paged", arguments)
    assert logits.shape == (len(case.lengths), case.queries, case.max_context_len)
    assert_logits(logits, arguments, reference.indexer_logits_paged)


@pytest.mark.cases("indexer_logits_paged", large=True)
def test_paged_logits_are_the_dense_ones(device: str, case: PagedIndexerCase) -> None:
    """Bit for bit those of `indexer_logits` on the gathered keys, where the block table names a page."""
    arguments = case.make(device)
    logits = ops.indexer_logits_paged(**arguments)
    cache, table, columns = arguments["index_k_cache"], arguments["block_table"], case.max_context_len
    positions = torch.arange(columns, dtype=torch.int32, device=device).unsqueeze(0)
    for b in range(len(case.lengths)):
        request = torch.tensor([b], dtype=torch.int32, device=device)
        slots = reference.to_slots(positions, table, request, 64)[0]
        named = (slots >= 0) & (slots < cache.size(0) * 64)
        k8, k_scale = ops.gather_index_k(cache, slots)
        ends = arguments["context_lens"][b]
        dense = ops.indexer_logits(
            arguments["q"][b], k8, k_scale, arguments["weights"][b], torch.zeros_like(ends), ends
        )
        dense = dense.masked_fill(~named, -torch.inf)
        if logits.is_cuda and cache.stride(0) % case.dim:  # the copy engine wants pages whole keys apart
            largest = dense[dense.isfinite()].abs().amax().item()
            torch.testing.assert_close(logits[b], dense, rtol=0, atol=LOGIT_ROUNDING["cuda"] * 8 * largest)
        else:
            assert_same_bits(logits[b], dense)


@pytest.mark.cases("indexer_logits_paged")
def test_paged_logits_depend_on_their_request_only(device: str, case: PagedIndexerCase) -> None:
    arguments = case.make(device)
    expected = run("indexer_logits_paged", arguments)
    assert_repeats("indexer_logits_paged", arguments, expected)
    assert_out_variant("indexer_logits_paged", arguments, expected)
    if case.lengths:
        assert_rows_stand_alone("indexer_logits_paged", arguments, PAGED_ROWS, expected)


@pytest.mark.cases("indexer_topk_paged", large=True)
def test_paged_selection_is_topk_of_the_logits(device: str, case: PagedIndexerCase) -> None:
    arguments = paged_topk_arguments(case, device)
    selected = run("indexer_topk_paged", arguments)
    del arguments["topk"]
    logits = ops.indexer_logits_paged(**arguments, max_context_len=case.table_pages * 64).flatten(0, 1)
    ends = arguments["context_lens"].flatten()
    expected = reference.topk(logits, torch.zeros_like(ends), ends, case.topk)
    assert_same_bits(selected, expected.view(selected.shape))


@pytest.mark.cases("indexer_topk_paged")
def test_paged_selection_depends_on_its_request_only(device: str, case: PagedIndexerCase) -> None:
    arguments = paged_topk_arguments(case, device)
    expected = run("indexer_topk_paged", arguments)
    assert_repeats("indexer_topk_paged", arguments, expected)
    assert_out_variant("indexer_topk_paged", arguments, expected)
    if case.lengths:
        assert_rows_stand_alone("indexer_topk_paged", arguments, PAGED_ROWS, expected)


@pytest.mark.cases("to_slots", large=True)
def test_slots_are_those_of_the_block_table(device: str, case: SlotsCase) -> None:
    arguments = case.make(device)
    slots = torch.ops.indexcache.to_slots(**arguments) if case.large else run("to_slots", arguments)
    rows = some_rows(case.tokens) if case.large else slice(None)
    assert_same_bits(slots[rows], reference.to_slots(**take_rows(arguments, "indices requests", rows)))
    if not case.large:
        assert_out_variant("to_slots", arguments, slots)


@pytest.mark.parametrize("heads", [8, 32, 64])
def test_nan_of_a_quantised_vector_is_never_selected(device: str, heads: int) -> None:
    """A key that is not finite scores NaN for every query and drops out; a bad query selects nothing."""
    k = torch.randn(200, 128, generator=torch.Generator().manual_seed(1)).to(device)
    k[3, 7], k[150, 0] = torch.nan, torch.inf
    q = torch.randn(4, heads, 128, generator=torch.Generator().manual_seed(2)).to(device)
    q[2, 5, 100] = -torch.inf
    k8, k_scale = ops.quantize_index_k(k, None, None, None, None)
    q8, weights = ops.quantize_index_q(q, torch.ones(4, heads, device=device), None, None, scale=1.0)
    starts, ends = torch.zeros(4, dtype=torch.int32, device=device), torch.full((4,), 200, dtype=torch.int32).to(device)
    logits = ops.indexer_logits(q8, k8, k_scale, weights, starts, ends)
    assert logits[:, [3, 150]].isnan().all() and logits[2].isnan().all()
    selected = ops.indexer_topk(q8, k8, k_scale, weights, starts, ends, 200)
    good = torch.tensor([n for n in range(200) if n not in (3, 150)] + [-1, -1], dtype=torch.int32, device=device)
    for row in (0, 1, 3):
        assert torch.equal(selected[row], good)
    assert (selected[2] == -1).all()
