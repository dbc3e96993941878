"""Quantisation and the caches, against the same steps in plain torch."""

import plain_torch
import pytest
import torch
from case_types import LatentCase, QuantizeCase
from harness import Baseline, cpu, gpu, sampled_rows, size_of
from torch import Tensor

from indexcache_ext import ops, reference


def assert_quantized(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Scales agree to f32 rounding; a value may differ where x / scale lies within that of two e4m3 numbers."""
    torch.testing.assert_close(got[1].double(), expected[1].double(), rtol=1e-5, atol=1e-9)
    differ = got[0].view(torch.uint8) != expected[0].view(torch.uint8)
    assert differ.double().mean() < 1e-3
    torch.testing.assert_close(got[0].double(), expected[0].double(), rtol=0.13, atol=2**-8)


@pytest.mark.parametrize(
    ("device", "case"),
    cpu(QuantizeCase(tokens=2048, heads=32)) + gpu(QuantizeCase(tokens=16_384, heads=64, large=True)),
)
def bench_quantize_index_q(measure, sized, device, case):
    call = sized(case).make(device)
    rows = sampled_rows(len(call["q"]), 64).to(device)

    def check(got):
        part = call | {name: call[name][rows] for name in ("q", "weights", "positions")}
        assert_quantized((got[0][rows], got[1][rows]), reference.quantize_index_q(**part))

    measure(
        lambda: ops.quantize_index_q(**call),
        device=device,
        check=check,
        nbytes=size_of(call["q"], call["weights"]) * 3 // 2,
        baseline=Baseline("torch", lambda: plain_torch.quantize_index_q(call)),
    )


@pytest.mark.parametrize(
    ("device", "case"),
    cpu(QuantizeCase(tokens=65_536, norm="bias")) + gpu(QuantizeCase(tokens=1 << 20, norm="bias", large=True)),
)
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
        nbytes=size_of(call["k"]) + call["k"].numel() + 4 * len(call["k"]),
        baseline=Baseline("torch", lambda: plain_torch.quantize_index_k(call)),
    )


def stored(case: LatentCase, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, their slots, all inside the cache, and the cache."""
    call = case.make(device)
    cache = call["kv_cache"]
    slots = torch.randperm(cache.size(0) * cache.size(1), device=device)[: len(call["kv"])].int()
    return call["kv"], slots, cache


LATENTS = cpu(LatentCase(tokens=16_384, pages=512)) + gpu(LatentCase(tokens=131_072, pages=4096, large=True))


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
