"""Under torch.compile the ops stay whole graphs, keep symbolic shapes and give the bits of eager mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from case_data import Data
from compare import assert_same_bits, results
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from indexcache_ext import ops

HEADS, DIM, ROT, TOPK, PAGE = 4, 64, 32, 24, 16
MLA_HEADS, D_QK, D_V = 3, 96, 64


def has_cpp_compiler() -> bool:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not has_cpp_compiler(), reason="needs a C++ compiler")),
]


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()


def rotary_table(max_position: int) -> Tensor:
    angle = torch.arange(max_position)[:, None] * 100.0 ** -torch.linspace(0, 1, ROT // 2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def prefill(
    index_q: Tensor, gates: Tensor, index_k: Tensor, norm: Tensor, cos_sin: Tensor, q: Tensor, kv: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One Full layer over the last T of N tokens: quantise, select, attend, with torch ops in between."""
    tokens, keys = index_q.size(0), index_k.size(0)
    positions = torch.arange(keys, device=kv.device, dtype=torch.int32)
    q8, weights = ops.quantize_index_q(
        index_q, gates * 0.5, cos_sin, positions[keys - tokens :], scale=DIM**-0.5, hadamard=True
    )
    k8, k_scale = ops.quantize_index_k(index_k, norm, None, cos_sin, positions, hadamard=True)
    ends = positions[keys - tokens :] + 1
    picked = ops.indexer_topk(q8, k8, k_scale, weights, torch.zeros_like(ends), ends, TOPK)
    out, lse = ops.sparse_mla(q, kv, picked, D_QK**-0.5, D_V, lengths=(picked >= 0).sum(1, dtype=torch.int32))
    return picked, out.relu(), lse


def prefill_inputs(tokens: int, keys: int, device: str) -> tuple[Tensor, ...]:
    data = Data(f"prefill {tokens} {keys}", "cpu")
    inputs = (
        data.randn(tokens, HEADS, DIM).bfloat16(),
        data.randn(tokens, HEADS),
        data.randn(keys, DIM).bfloat16(),
        data.randn(DIM),
        rotary_table(512),
        data.randn(tokens, MLA_HEADS, D_QK).bfloat16(),
        data.randn(keys, D_QK).bfloat16(),
    )
    return tuple(x.to(device) for x in inputs)


def decode(
    index_q: Tensor,
    gates: Tensor,
    index_k: Tensor,
    latent: Tensor,
    q: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    index_k_cache: Tensor,
    kv_cache: Tensor,
    picked: Tensor,
    out: Tensor,
    lse: Tensor,
) -> Tensor:
    """One decode step of B requests on the paged caches, written in place, into buffers that the caller owns."""
    requests = torch.arange(q.size(0), device=q.device, dtype=torch.int32)
    last = (lengths - 1)[:, None]
    slots = ops.to_slots(last, block_table, requests, 64)[:, 0]
    ops.store_index_k(index_k, None, None, None, None, slots, index_k_cache)
    ops.store_latent_kv(latent, slots, kv_cache)
    q8, weights = ops.quantize_index_q(index_q, gates, None, None, scale=1.0)
    ops.indexer_topk_paged(
        q8[:, None], index_k_cache, weights[:, None], lengths[:, None], block_table, TOPK, out=picked
    )
    chosen = ops.to_slots(picked[:, 0], block_table, requests, 64)
    ops.sparse_mla_paged(q, kv_cache, chosen, 576**-0.5, out=out, lse=lse)
    return out * 2


def decode_inputs(device: str) -> tuple[Tensor, ...]:
    data = Data("decode", "cpu")
    batch, pages = 3, 9
    index_k_cache = torch.zeros(pages, 64, DIM + 4, dtype=torch.uint8)
    kv_cache = torch.zeros(pages, 64, 656, dtype=torch.uint8)
    everywhere = torch.arange(pages * 64)
    ops.store_index_k(data.randn(pages * 64, DIM), None, None, None, None, everywhere, index_k_cache)
    ops.store_latent_kv(data.randn(pages * 64, 576), everywhere, kv_cache)
    inputs = (
        data.randn(batch, HEADS, DIM),
        data.randn(batch, HEADS),
        data.randn(batch, DIM),
        data.randn(batch, 576).bfloat16(),
        data.randn(batch, MLA_HEADS, 576).bfloat16(),
        torch.tensor([150, 65, 3], dtype=torch.int32),
        data.permutation(pages).int().view(batch, 3),
        index_k_cache,
        kv_cache,
        torch.full((batch, 1, TOPK), -7, dtype=torch.int32),
        torch.full((batch, MLA_HEADS, 512), -7.0).bfloat16(),
        torch.full((batch, MLA_HEADS), -7.0),
    )
    return tuple(x.to(device) for x in inputs)


def assert_all_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for x, y in zip(actual, expected, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_equals_eager(backend, device):
    inputs = prefill_inputs(17, 90, device)
    expected = prefill(*inputs)
    assert (expected[0][-1] >= 0).sum() == TOPK  # more keys than entries: the selection selects
    actual = torch.compile(prefill, backend=backend, fullgraph=True)(*inputs)
    assert_all_same_bits(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_in_place_equals_eager(backend, device):
    expected_inputs, inputs = decode_inputs(device), decode_inputs(device)
    before = [x.clone() for x in inputs]
    expected = decode(*expected_inputs)
    actual = torch.compile(decode, backend=backend, fullgraph=True)(*inputs)
    assert_same_bits(actual, expected)
    assert_all_same_bits(inputs, expected_inputs)
    written = [not torch.equal(x, y) for x, y in zip(inputs, before)]
    assert written == [False] * 7 + [True] * 5  # the two caches and the three buffers


def assert_compiles_once(function: Callable, calls: list[tuple[Tensor, ...]]) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    compiled(*calls[0])
    frames = counter.frame_count
    for inputs in calls:
        actual, expected = results(compiled(*inputs)), results(function(*inputs))
        assert_all_same_bits(actual, expected)
    assert counter.frame_count == frames


def test_dynamic_shapes_compile_once(device):
    sizes = ((17, 90), (5, 41), (33, 70), (64, 200))
    assert_compiles_once(prefill, [prefill_inputs(*size, device) for size in sizes])


def test_fakes_keep_symbols(device):
    """The results' sizes are the inputs' symbols, not the numbers of the first call."""
    shapes = {}

    def capture(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        for node in graph.graph.nodes:
            if node.op == "call_function" and getattr(node.target, "namespace", "") == "indexcache":
                value = node.meta["example_value"]
                shapes[node.target._opname] = [tuple(x.shape) for x in results(value)]
        return graph

    inputs = prefill_inputs(17, 90, device)
    for x, rows in zip(inputs, (17, 17, 90, None, None, 17, 90)):
        if rows is not None:
            torch._dynamo.mark_dynamic(x, 0)
    torch.compile(prefill, backend=capture, fullgraph=True)(*inputs)
    (q8, _), (k8, _) = shapes["quantize_index_q"], shapes["quantize_index_k"]
    tokens, keys = q8[0], k8[0]
    assert all(isinstance(size, torch.SymInt) for size in (tokens, keys)) and str(tokens) != str(keys)
    symbols = {name: [[str(size) for size in shape] for shape in found] for name, found in shapes.items()}
    assert symbols["quantize_index_q"] == [[str(tokens), "4", "64"], [str(tokens), "4"]]
    assert symbols["quantize_index_k"] == [[str(keys), "64"], [str(keys)]]
    assert symbols["indexer_topk"] == [[str(tokens), "24"]]
    assert symbols["sparse_mla"] == [[str(tokens), "3", "64"], [str(tokens), "3"]]


def test_k_may_be_symbolic(device):
    def select(logits: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        starts, k = torch.zeros_like(ends), logits.size(1) // 4
        pages = torch.arange(logits.size(1) // PAGE, dtype=torch.int32, device=ends.device).flip(0)
        slots = ops.topk_to_slots(logits, starts, ends, k, pages[None], starts, PAGE)
        return ops.topk(logits.bfloat16(), starts, ends, k), slots

    calls = []
    for rows, columns in ((6, 100), (9, 37), (3, 64)):
        logits = Data(f"{columns}", "cpu").randn(rows, columns).to(device)
        calls.append((logits, torch.arange(columns - rows, columns, device=device, dtype=torch.int32)))
    assert_compiles_once(select, calls)


def test_export(device):
    class Layer(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return prefill(*inputs)

    inputs = prefill_inputs(17, 90, device)
    program = torch.export.export(Layer(), inputs)
    assert_all_same_bits(program.module()(*inputs), prefill(*inputs))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "indexcache.indexer_topk.default" in called and "indexcache.sparse_mla.default" in called
