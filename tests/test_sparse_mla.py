"""Sparse attention, dense and paged, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from case_types import AttentionCase
from compare import (
    assert_attention,
    assert_out_variant,
    assert_repeats,
    assert_rows_do_not_mix,
    assert_rows_stand_alone,
    assert_same_bits,
    run,
    some_rows,
)

from indexcache_ext import reference

ops = torch.ops.indexcache
ROWS = "q indices slots lengths"


def check_values(op: str, case: AttentionCase, device: str) -> None:
    arguments = case.make(device)
    out, lse = run(op, arguments)
    assert out.shape == (case.tokens, case.heads, case.d_v) and lse.shape == (case.tokens, case.heads)
    if case.page_size:
        cache, entries = arguments["kv_cache"], arguments["slots"]
        rows, keys = reference.cached_rows(cache), cache.size(0) * cache.size(1)
    else:
        rows, keys, entries = reference.dense_rows(arguments["kv"]), case.keys, arguments["indices"]
    some = some_rows(case.tokens) if case.large else slice(None)
    lengths = arguments["lengths"][some] if case.lengths else None
    assert_attention(
        (out[some], lse[some]),
        arguments["q"][some],
        rows,
        keys,
        entries[some],
        case.sm_scale,
        case.d_v,
        arguments.get("sink"),
        lengths,
    )


def check_rows(op: str, case: AttentionCase, device: str) -> None:
    arguments = case.make(device)
    expected = run(op, arguments)
    assert_repeats(op, arguments, expected)
    assert_out_variant(op, arguments, expected)
    if not case.tokens:
        return
    assert_rows_do_not_mix(op, arguments, ROWS, expected)
    if device == "cpu" or case.dtype == torch.float32 or case.k <= 64:  # sm90 may split more, by the shape of the call
        assert_rows_stand_alone(op, arguments, ROWS, expected)


@pytest.mark.cases("sparse_mla", large=True)
def test_attention_is_that_of_float64(device: str, case: AttentionCase) -> None:
    check_values("sparse_mla", case, device)


@pytest.mark.cases("sparse_mla")
def test_attention_depends_on_its_row_only(device: str, case: AttentionCase) -> None:
    check_rows("sparse_mla", case, device)


@pytest.mark.cases("sparse_mla_paged", large=True)
def test_paged_attention_is_that_of_float64(device: str, case: AttentionCase) -> None:
    check_values("sparse_mla_paged", case, device)


@pytest.mark.cases("sparse_mla_paged")
def test_paged_attention_depends_on_its_row_only(device: str, case: AttentionCase) -> None:
    check_rows("sparse_mla_paged", case, device)


def small(device: str, **options: object) -> dict:
    return AttentionCase(tokens=6, keys=128, k=40, dtype=torch.float32, **options).make(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [3, 200])
def test_paged_attention_is_the_dense_one_on_the_gathered_rows(device: str, tokens: int, dtype: torch.dtype) -> None:
    """A cache row is the bf16 row that gather_latent_kv returns, so the bits are the same."""
    case = AttentionCase(tokens=tokens, heads=20, keys=640, k=259, page_size=64, indices="invalid", dtype=dtype)
    arguments = case.make(device)
    cache, slots = arguments["kv_cache"], arguments["slots"]
    rows = ops.gather_latent_kv(cache, torch.arange(640, dtype=torch.int32, device=device)).to(dtype)
    paged = ops.sparse_mla_paged(**arguments)
    dense = ops.sparse_mla(arguments["q"], rows, slots, arguments["sm_scale"])
    for actual, expected in zip(paged, dense, strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("tokens", [3, 520])
def test_queries_may_lie_head_by_head(device: str, tokens: int) -> None:
    """Any strides but the innermost: the same bits as dense queries give."""
    arguments = AttentionCase(tokens=tokens, heads=16, keys=400, indices="neighbours").make(device)
    by_head = arguments["q"].transpose(0, 1).contiguous().transpose(0, 1)
    expected = ops.sparse_mla(**arguments)
    for actual, dense in zip(ops.sparse_mla(**arguments | {"q": by_head}), expected, strict=True):
        assert_same_bits(actual, dense)


def test_entries_that_name_no_token_change_nothing(device: str) -> None:
    """Padding a row with -1, or shortening it by `lengths`, gives the bits of the shorter row."""
    arguments = small(device, indices="random")
    expected = ops.sparse_mla(**arguments)
    indices = arguments["indices"]
    longer = torch.cat([indices, torch.full_like(indices, -1)], 1)
    more = torch.cat([indices, indices.flip(1)], 1)
    lengths = torch.full((6,), indices.size(1), dtype=torch.int32, device=device)
    for changed in ({"indices": longer}, {"indices": more, "lengths": lengths}, {"lengths": lengths + 1000}):
        torch.testing.assert_close(ops.sparse_mla(**arguments | changed), expected, rtol=1e-6, atol=1e-6)


def test_a_repeated_index_counts_twice(device: str) -> None:
    arguments = small(device, indices="random")
    twice = arguments | {"indices": arguments["indices"].repeat(1, 2)}
    out, lse = ops.sparse_mla(**arguments)
    out2, lse2 = ops.sparse_mla(**twice)
    torch.testing.assert_close(out2, out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse2, lse + math.log(2), rtol=1e-6, atol=1e-6)


def test_sink_scales_out_and_leaves_lse(device: str) -> None:
    arguments = small(device)
    out, lse = ops.sparse_mla(**arguments)
    sink = torch.linspace(-5, 5, lse.size(1), device=device)
    out_sink, lse_sink = ops.sparse_mla(**arguments, sink=sink)
    assert_same_bits(lse_sink, lse)
    share = torch.where(lse == -torch.inf, 0, torch.sigmoid(lse - sink))
    torch.testing.assert_close(out_sink, out * share[..., None], rtol=1e-5, atol=1e-6)


def test_one_key_is_returned_as_it_is(device: str) -> None:
    """The softmax over one key is 1, whatever its score."""
    arguments = small(device, indices="one_row")
    arguments["indices"] = arguments["indices"][:, :1].contiguous()
    out, lse = ops.sparse_mla(**arguments)
    row = arguments["kv"][127, :512]
    torch.testing.assert_close(out, row.expand_as(out), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [100, 2**31 - 1], ids=["neighbours", "apart"])
@pytest.mark.parametrize("tokens", [3, 520])
def test_the_last_rows_that_an_index_can_name(device: str, tokens: int, spread: int, dtype: torch.dtype) -> None:
    """2^31 - 1 rows, by a stride of 0: entries up to 2^31 - 2 name one, 2^31 - 1 does not."""
    rows, k = 2**31 - 1, 70
    data = torch.Generator().manual_seed(11)
    q = torch.randn(tokens, 8, 576, generator=data).to(device, dtype)
    row = torch.randn(576, generator=data).to(device, dtype)
    below = torch.randperm(100, generator=data)[:k] * (spread // 100)
    entries = torch.cat([torch.tensor([rows, rows - 1]), rows - 2 - below])
    out, lse = ops.sparse_mla(q, row.expand(rows, 576), entries.int().repeat(tokens, 1).to(device), 0.05)
    tolerance = {"rtol": 2**-7 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-6}
    torch.testing.assert_close(out, row[:512].expand_as(out), **tolerance)
    expected = 0.05 * (q.double() @ row.double()) + math.log(k + 1)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offset", [-3e4, 3e4])
def test_huge_scores_do_not_overflow(device: str, offset: float) -> None:
    """Scores of thousands, all of one sign: the softmax is that of their differences."""
    data = torch.Generator().manual_seed(7)
    q, kv = torch.randn(3, 2, 16, generator=data).to(device), torch.randn(9, 16, generator=data).to(device)
    q[..., 0], kv[:, 0] = 1.0, offset
    indices = torch.arange(9, dtype=torch.int32, device=device).repeat(3, 1)
    out, lse = ops.sparse_mla(q, kv, indices, 1.0, 16)
    expected = reference.sparse_mla(q, kv, indices, 1.0, 16)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-6, atol=0)
    # A float32 score of 3e4 is known to 2^-9, and so is the softmax.
    torch.testing.assert_close(out.double(), expected[0], rtol=2e-2, atol=2e-2)
