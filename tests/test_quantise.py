"""Quantisation of index queries and keys and of latent rows, and their caches, against float64."""

from __future__ import annotations

import pytest
import torch
from case_data import INT_MAX, INT_MIN, NAN_BYTE
from case_types import LatentCase, QuantizeCase
from compare import (
    assert_quantized,
    assert_repeats,
    assert_rows_stand_alone,
    assert_same_bits,
    assert_scales,
    run,
)

from indexcache_ext import reference

Q_ROWS = "q weights positions"
K_ROWS = "k positions"


def is_exact(case: QuantizeCase) -> bool:
    """Nothing is rounded before the e4m3 conversion, so ties must go to even."""
    return case.values == "powers"


def vector_of(case: QuantizeCase, arguments: dict) -> torch.Tensor:
    """What the op quantises, in float64."""
    x = arguments["q"] if case.heads else arguments["k"]
    if not case.heads:
        x = reference.layer_norm(x, arguments["norm_weight"], arguments["norm_bias"])
    return reference.index_vector(
        x,
        arguments["cos_sin"],
        arguments["positions"],
        interleaved=case.interleaved,
        transform=case.hadamard,
    )


@pytest.mark.cases("quantize_index_q", large=True)
def test_index_q_is_the_nearest_e4m3(device: str, case: QuantizeCase) -> None:
    arguments = case.make(device)
    q8, folded = run("quantize_index_q", arguments)
    vector = vector_of(case, arguments)
    q_scale = reference.quantize(vector, ue8m0=case.ue8m0)[1]
    assert_quantized(q8, q_scale.float(), vector, ue8m0=case.ue8m0, exact=is_exact(case))
    assert_scales(folded, arguments["weights"].double() * q_scale * arguments["scale"])


@pytest.mark.cases("quantize_index_k", large=True)
def test_index_k_is_the_nearest_e4m3(device: str, case: QuantizeCase) -> None:
    arguments = case.make(device)
    k8, k_scale = run("quantize_index_k", arguments)
    assert_quantized(k8, k_scale, vector_of(case, arguments), ue8m0=case.ue8m0, exact=is_exact(case))


@pytest.mark.cases("quantize_index_q")
def test_index_q_depends_on_its_row_only(device: str, case: QuantizeCase) -> None:
    arguments = case.make(device)
    expected = run("quantize_index_q", arguments)
    assert_repeats("quantize_index_q", arguments, expected)
    if case.tokens:
        assert_rows_stand_alone("quantize_index_q", arguments, Q_ROWS, expected)


@pytest.mark.cases("quantize_index_k")
def test_index_k_depends_on_its_row_only(device: str, case: QuantizeCase) -> None:
    arguments = case.make(device)
    expected = run("quantize_index_k", arguments)
    assert_repeats("quantize_index_k", arguments, expected)
    if case.tokens:
        assert_rows_stand_alone("quantize_index_k", arguments, K_ROWS, expected)


@pytest.mark.cases("quantize_index_q")
def test_index_q_does_not_depend_on_alignment(device: str, case: QuantizeCase) -> None:
    """CUDA takes a vector in registers or, wherever it lies, in shared memory: the bits are the same."""
    arguments = case.make(device)
    moved = arguments | {"q": one_element_on(arguments["q"])}
    for actual, expected in zip(run("quantize_index_q", moved), run("quantize_index_q", arguments), strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.cases("quantize_index_k")
def test_index_k_does_not_depend_on_alignment(device: str, case: QuantizeCase) -> None:
    """As above, but for LayerNorm, whose sums may be in another order."""
    arguments = case.make(device)
    moved = arguments | {"k": one_element_on(arguments["k"])}
    k8, k_scale = run("quantize_index_k", moved)
    if case.norm == "none":
        for actual, expected in zip((k8, k_scale), run("quantize_index_k", arguments), strict=True):
            assert_same_bits(actual, expected)
    else:
        assert_quantized(k8, k_scale, vector_of(case, arguments), ue8m0=case.ue8m0)


@pytest.mark.cases("store_index_k", large=True)
def test_stored_index_k_is_the_quantised_one(device: str, case: QuantizeCase) -> None:
    arguments, place = case.make(device), case.cache(device)
    k8, k_scale = run("quantize_index_k", arguments)
    cache, expected = place["index_k_cache"], place["index_k_cache"].clone()
    run("store_index_k", arguments | place, changes="index_k_cache")
    kept, page, offset = reference.locate(place["slots"], cache)
    values, scales = reference.index_page_parts(expected)
    values[page, offset] = k8.view(torch.uint8)[kept]
    scales[page, offset] = k_scale[kept].view(torch.uint8).view(-1, 4)
    assert_same_bits(cache, expected)
    assert_nothing_between_pages(cache, case.page_extra)


@pytest.mark.cases("gather_index_k", large=True)
def test_gathered_index_k_is_the_stored_one(device: str, case: QuantizeCase) -> None:
    arguments, place = case.make(device), case.cache(device)
    reference.store_index_k(**arguments, **place)
    room = case.pages * 64
    strange = torch.tensor([-1, room, INT_MIN, INT_MAX, *range(min(3, room))], dtype=case.int_dtype, device=device)
    slots = torch.cat([place["slots"].flip(0), strange, place["slots"]])
    k8, k_scale = run("gather_index_k", {"index_k_cache": place["index_k_cache"], "slots": slots})
    k8_expected, k_scale_expected = reference.gather_index_k(place["index_k_cache"], slots)
    assert_same_bits(k8, k8_expected)
    assert_scales(k_scale, k_scale_expected, exact=True)


@pytest.mark.cases("store_latent_kv", large=True)
def test_stored_latent_row_is_the_nearest_e4m3(device: str, case: LatentCase) -> None:
    arguments = case.make(device)
    kv, cache = arguments["kv"], arguments["kv_cache"]
    run("store_latent_kv", arguments, changes="kv_cache")
    kept, page, offset = reference.locate(arguments["slots"], cache)
    rows = cache[page, offset]
    values = rows[:, :512].contiguous().view(torch.float8_e4m3fn).unflatten(1, (4, 128))
    scale = rows[:, 512:528].contiguous().view(torch.float32)
    assert_quantized(values, scale, kv[kept, :512].double().unflatten(1, (4, 128)))
    k_rope = rows[:, 528:].contiguous().view(torch.bfloat16)
    torch.testing.assert_close(k_rope, kv[kept, 512:].bfloat16(), rtol=0, atol=0, equal_nan=True)
    cache[page, offset] = NAN_BYTE
    assert (cache == NAN_BYTE).all()  # nothing else was written
    assert_nothing_between_pages(cache, case.page_extra)


@pytest.mark.cases("gather_latent_kv", large=True)
def test_gathered_latent_row_is_the_rounded_product(device: str, case: LatentCase) -> None:
    arguments = case.make(device)
    cache, slots = arguments["kv_cache"], arguments["slots"]
    reference.store_latent_kv(arguments["kv"], slots, cache)
    room = case.pages * case.page_size
    strange = torch.tensor([-1, room, INT_MIN, INT_MAX, *range(min(3, room))], dtype=slots.dtype, device=device)
    slots = torch.cat([slots.flip(0), strange, slots])
    actual = run("gather_latent_kv", {"kv_cache": cache, "slots": slots})
    expected = reference.gather_latent_kv(cache, slots).float().bfloat16()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.cases("store_latent_kv")
def test_stored_latent_row_depends_on_its_row_only(device: str, case: LatentCase) -> None:
    arguments = case.make(device)
    expected = arguments["kv_cache"].clone()
    torch.ops.indexcache.store_latent_kv(arguments["kv"], arguments["slots"], expected)
    for row in range(case.tokens):
        torch.ops.indexcache.store_latent_kv(
            arguments["kv"][row : row + 1], arguments["slots"][row : row + 1], arguments["kv_cache"]
        )
    assert_same_bits(arguments["kv_cache"], expected)


def test_scale_floor_and_powers_of_two(device: str) -> None:
    """The scale of zeros is 1e-4 / 448, and a ue8m0 scale is the power of two that is not below the exact one."""
    amax = torch.tensor([0.0, 1e-5, 1e-4, 448.0, 449.0, 3.4e38, 2.0**-7 * 448], device=device)
    k = torch.zeros(len(amax), 128, device=device)
    k[:, 5] = amax
    for ue8m0 in (False, True):
        _, scale = torch.ops.indexcache.quantize_index_k(k, None, None, None, None, ue8m0=ue8m0)
        exact = amax.double().clamp(min=1e-4) / 448
        expected = 2.0 ** exact.log2().ceil() if ue8m0 else exact
        torch.testing.assert_close(scale.double(), expected, rtol=0 if ue8m0 else 2e-7, atol=0)


def one_element_on(x: torch.Tensor) -> torch.Tensor:
    """The same values, one element past where an allocation starts."""
    buffer = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return buffer[1:].view(x.shape).copy_(x)


def assert_nothing_between_pages(cache: torch.Tensor, extra: int) -> None:
    """The bytes between the pages are still those that `empty_cache` wrote."""
    pages, page_size, row_bytes = cache.shape
    if extra and pages:
        gaps = cache.as_strided((pages, extra), (cache.stride(0), 1), cache.storage_offset() + page_size * row_bytes)
        assert (gaps == NAN_BYTE).all()
