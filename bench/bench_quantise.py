"""Quantisation and the caches, against the same steps in plain torch, for prefill and for decode."""

import plain_torch
import pytest
import torch
from case_types import LatentCase, QuantizeCase
from harness import Baseline, cpu, cuda_clock, gpu, sampled_rows, size_of
from torch import Tensor

from indexcache_ext import ops, reference

DECODE = (64, 1)  # tokens


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.benchmark(timer=cuda_clock)
def bench_empty_kernel(measure):
    """What no op can be faster than."""

    def op():
        torch.cuda._sleep(0)
        return ()

    measure(op, device="cuda", check=lambda result: None)


def assert_quantized(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Scales agree to f32 rounding; a value may differ where x / scale lies within that of two e4m3 numbers."""
    torch.testing.assert_close(got[1].double(), expected[1].double(), rtol=1e-5, atol=1e-9)
    differ = got[0].view(torch.uint8) != expected[0].view(torch.uint8)
    assert differ.double().mean() < 1e-3
    torch.testing.assert_close(got[0].double(), expected[0].double(), rtol=0.13, atol=2**-8)


def transform_bytes(call: dict) -> int:
    """What RoPE and LayerNorm read: each token's position and row of the table, and the norm once."""
    row = call["cos_sin"].size(1) * 4 + call["positions"].element_size()
    norm = [call[name] for name in ("norm_weight", "norm_bias") if call.get(name) is not None]
    return len(call["positions"]) * row + size_of(*norm)


QUERIES = gpu(
    *(QuantizeCase(tokens=tokens, heads=64, large=True) for tokens in (8192, *DECODE)),
    QuantizeCase(tokens=8192, heads=64, interleaved=True, hadamard=True, large=True),
    QuantizeCase(tokens=8192, heads=32, ue8m0=True, large=True),
)


@pytest.mark.parametrize(("device", "case"), cpu(QuantizeCase(tokens=2048, heads=32)) + QUERIES)
def bench_quantize_index_q(measure, sized, device, case):
    call = sized(case).make(device)
    rows = sampled_rows(len(call["q"]), 64).to(device)
    plain = not (case.interleaved or case.hadamard or case.ue8m0)

    def check(got):
        part = call | {name: call[name][rows] for name in ("q", "weights", "positions")}
        assert_quantized((got[0][rows], got[1][rows]), reference.quantize_index_q(**part))

    measure(
        lambda: ops.quantize_index_q(**call),
        device=device,
        check=check,
        nbytes=size_of(call["q"]) + call["q"].numel() + 2 * size_of(call["weights"]) + transform_bytes(call),
        baseline=Baseline("torch", lambda: plain_torch.quantize_index_q(call)) if plain else None,
    )


KEYS = gpu(
    *(QuantizeCase(tokens=tokens, norm="bias", pages=2 * tokens, large=True) for tokens in (8192, *DECODE)),
    QuantizeCase(tokens=8192, norm="bias", interleaved=True, hadamard=True, ue8m0=True, pages=2 * 8192, large=True),
)
MANY_KEYS = gpu(QuantizeCase(tokens=1 << 20, norm="bias", pages=1 << 14, large=True))


@pytest.mark.parametrize(("device", "case"), cpu(QuantizeCase(tokens=65_536, norm="bias")) + KEYS + MANY_KEYS)
def bench_quantize_index_k(measure, sized, device, case):
    call = sized(case).make(device)
    rows = sampled_rows(len(call["k"]), 256).to(device)

    def check(got):
        part = call | {name: call[name][rows] for name in ("k", "positions")}
        assert_quantized((got[0][rows], got[1][rows]), reference.quantize_index_k(**part))

    measure(
        lambda: ops.quantize_index_k(**call),
        device=device,
        check=check,
        nbytes=size_of(call["k"]) + call["k"].numel() + 4 * len(call["k"]) + transform_bytes(call),
        baseline=None if case.hadamard else Baseline("torch", lambda: plain_torch.quantize_index_k(call)),
    )


def distinct_slots(rows: int, cache: Tensor) -> Tensor:
    """int32 [rows] in random order, all inside the cache."""
    return torch.randperm(cache.size(0) * cache.size(1), device=cache.device)[:rows].int()


@pytest.mark.parametrize(("device", "case"), KEYS + MANY_KEYS)
def bench_store_index_k(measure, sized, device, case):
    case = sized(case)
    call, cache = case.make(device), case.cache(device)["index_k_cache"]
    slots = distinct_slots(len(call["k"]), cache)

    def op():
        ops.store_index_k(**call, slots=slots, index_k_cache=cache)
        return cache

    def check(got):
        kept, quantized = ops.gather_index_k(got, slots), ops.quantize_index_k(**call)
        assert all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(kept, quantized, strict=True))

    measure(
        op,
        device=device,
        check=check,
        nbytes=size_of(call["k"], slots) + call["k"].numel() + 4 * len(call["k"]) + transform_bytes(call),
    )


@pytest.mark.parametrize(("device", "case"), KEYS[:-1] + MANY_KEYS)
def bench_gather_index_k(measure, sized, device, case):
    case = sized(case)
    call, cache = case.make(device), case.cache(device)["index_k_cache"]
    slots = distinct_slots(len(call["k"]), cache)
    ops.store_index_k(**call, slots=slots, index_k_cache=cache)

    def check(got):
        (k8, k_scale), (expected, expected_scale) = got, reference.gather_index_k(cache, slots)
        assert torch.equal(k8.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(k_scale.double(), expected_scale)

    measure(
        lambda: ops.gather_index_k(cache, slots),
        device=device,
        check=check,
        nbytes=2 * (call["k"].numel() + 4 * len(slots)) + size_of(slots),
    )


def stored(case: LatentCase, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, their slots, all inside the cache, and the cache."""
    call = case.make(device)
    return call["kv"], distinct_slots(len(call["kv"]), call["kv_cache"]), call["kv_cache"]


LATENTS = cpu(LatentCase(tokens=16_384, pages=512)) + gpu(
    *(LatentCase(tokens=tokens, pages=4096, large=True) for tokens in (131_072, 8192, *DECODE))
)


@pytest.mark.parametrize(("device", "case"), LATENTS)
def bench_store_latent_kv(measure, sized, device, case):
    kv, slots, cache = stored(sized(case), device)
    other = cache.clone()

    def op():
        ops.store_latent_kv(kv, slots, cache)
        return cache

    def check(got):
        kept = reference.gather_latent_kv(got, slots)
        reference.store_latent_kv(kv, slots, other)
        expected = reference.gather_latent_kv(other, slots)
        assert (kept != expected).double().mean() < 1e-2
        torch.testing.assert_close(kept, expected, rtol=0.13, atol=1e-3)

    measure(
        op,
        device=device,
        check=check,
        nbytes=size_of(kv, slots) + 656 * len(kv),
        baseline=Baseline("torch", lambda: plain_torch.store_latent_kv(kv, slots, other)),
    )


@pytest.mark.parametrize(("device", "case"), LATENTS)
def bench_gather_latent_kv(measure, sized, device, case):
    kv, slots, cache = stored(sized(case), device)
    reference.store_latent_kv(kv, slots, cache)

    def check(got):
        assert got.equal(reference.gather_latent_kv(cache, slots).bfloat16())

    measure(
        lambda: ops.gather_latent_kv(cache, slots),
        device=device,
        check=check,
        nbytes=656 * len(kv) + size_of(slots) + 2 * 576 * len(kv),
        baseline=Baseline("torch", lambda: plain_torch.latent_rows(cache, slots, torch.bfloat16)),
    )
