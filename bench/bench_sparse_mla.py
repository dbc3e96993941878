"""Sparse MLA against the obvious torch: gather the listed rows, two einsums and a softmax."""

import plain_torch
import pytest
import torch
from case_types import AttentionCase
from harness import Baseline, cpu, gpu, sampled_rows, size_of
from plain_torch import LATENT
from torch import Tensor

from indexcache_ext import ops, reference

MARKS = tuple(
    AttentionCase(tokens=256, heads=64, keys=16_384, k=2048, indices="random", dtype=dtype)
    for dtype in (torch.bfloat16, torch.float32)
)
PREFILL = tuple(
    AttentionCase(tokens=4096, heads=heads, keys=keys, k=2048, indices="random", large=True)
    for heads in (128, 64)
    for keys in (8192, 131_072)
)
ASCENDING = tuple(  # as top-k lists them: all blocks walk through the rows together
    AttentionCase(tokens=4096, heads=heads, keys=131_072, k=2048, indices="ascending", large=True)
    for heads in (128, 64)
)
PAGED = tuple(  # decode, and a prefill from the cache
    AttentionCase(tokens=tokens, heads=heads, keys=131_072, k=2048, indices="random", page_size=64, large=True)
    for heads, batches in ((128, (256, 32, 8, 1)), (64, (4096, 128, 32, 8, 1)), (16, (128,)))
    for tokens in batches
)
# Few heads: lists of which neighbours share nine tenths, or nothing; time against that of 64 heads.
FEW_HEADS = tuple(
    (AttentionCase(tokens=4096, heads=heads, keys=131_072, k=2048, indices=indices, large=True), 1 / share)
    for indices, shares in (("neighbours", {32: 0.55, 16: 0.35, 8: 0.25}), ("distinct", {32: 1, 16: 1, 8: 1}))
    for heads, share in shares.items()
)
CPU_DECODE = AttentionCase(tokens=16, heads=64, keys=16_384, k=2048, indices="random", page_size=64)


def agree(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    """Each output vector as a whole, relative to its length, and each lse."""
    (out, lse), (expected_out, expected_lse) = ((pair[0].double(), pair[1].double()) for pair in (got, expected))
    error = (out - expected_out).norm(dim=-1) / expected_out.norm(dim=-1)
    assert error.amax() <= tolerance, f"an output is {error.amax():.2g} off, more than {tolerance:g}"
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=tolerance)


def attention(measure, device, case, *, op, oracle, baseline, row_bytes, mark=None) -> None:
    """Measure op(call) of a case whose entries are all valid, against oracle(call) and baseline(call)."""
    call = case.make(device)
    entries = "slots" if case.page_size else "indices"
    rows = sampled_rows(len(call["q"])).to(device)

    def check(got):
        agree(got, baseline(call), tolerance=5e-2)  # every row; in bf16 torch rounds the scores
        part = call | {"q": call["q"][rows], entries: call[entries][rows]}
        agree((got[0][rows], got[1][rows]), oracle(part), tolerance=1e-5 if case.dtype == torch.float32 else 1e-2)

    q, listed, results = call["q"], call[entries].numel(), op(call)
    measure(
        lambda: op(call),
        device=device,
        check=check,
        roof="F32" if device == "cpu" else "R16",
        flops=2 * q.size(1) * (q.size(2) + LATENT) * listed,
        nbytes=size_of(q, call[entries], *results) + listed * row_bytes,
        baseline=Baseline("torch gather + einsum", lambda: baseline(call)),
        mark=mark,
    )


@pytest.mark.parametrize(("device", "case"), cpu(*MARKS) + gpu(*PREFILL, *ASCENDING))
def bench_sparse_mla(measure, sized, device, case):
    attention(
        measure,
        device,
        sized(case),
        op=lambda call: ops.sparse_mla(**call),
        oracle=lambda call: reference.sparse_mla(**call),
        baseline=lambda call: plain_torch.sparse_mla(
            call["q"], lambda listed: call["kv"][listed], call["indices"], call["sm_scale"]
        ),
        row_bytes=576 * case.dtype.itemsize,
        mark=3 if case in MARKS else None,
    )


@pytest.mark.parametrize(("device", "case"), cpu(CPU_DECODE) + gpu(*PAGED))
def bench_sparse_mla_paged(measure, sized, device, case):
    attention(
        measure,
        device,
        sized(case),
        op=lambda call: ops.sparse_mla_paged(**call),
        oracle=lambda call: reference.sparse_mla_paged(**call),
        baseline=lambda call: plain_torch.sparse_mla(
            call["q"],
            lambda listed: plain_torch.latent_rows(call["kv_cache"], listed, case.dtype),
            call["slots"],
            call["sm_scale"],
        ),
        row_bytes=656,
    )


@pytest.mark.parametrize(("device", "case"), gpu(*(case for case, _ in FEW_HEADS)))
def bench_few_heads(measure, sized, device, case):
    call = sized(case).make(device)
    padded = call | {"q": torch.randn(len(call["q"]), 64, 576, device=device, dtype=case.dtype)}
    rows = sampled_rows(len(call["q"])).to(device)

    def check(got):
        part = call | {"q": call["q"][rows], "indices": call["indices"][rows]}
        agree((got[0][rows], got[1][rows]), reference.sparse_mla(**part), tolerance=1e-2)

    measure(
        lambda: ops.sparse_mla(**call),
        device=device,
        check=check,
        roof="R16",
        flops=2 * case.heads * (576 + LATENT) * call["indices"].numel(),
        nbytes=size_of(call["q"], call["indices"], call["kv"]),
        baseline=Baseline("ours, 64 heads", lambda: ops.sparse_mla(**padded)),
        mark=dict(FEW_HEADS)[case],
    )
