"""The schemas are public API: other stacks call them by name. A change here is a change of the contract."""

import inspect
import math

import pytest
import torch

from indexcache_ext import ops

SCHEMAS = (
    # Quantisation
    "quantize_index_q(Tensor q, Tensor weights, Tensor? cos_sin, Tensor? positions, *, float scale, "
    "bool interleaved=False, bool hadamard=False, bool ue8m0=False) -> (Tensor, Tensor)",
    "quantize_index_k(Tensor k, Tensor? norm_weight, Tensor? norm_bias, Tensor? cos_sin, Tensor? positions, *, "
    "float eps=1e-6, bool interleaved=False, bool hadamard=False, bool ue8m0=False) -> (Tensor, Tensor)",
    "store_index_k(Tensor k, Tensor? norm_weight, Tensor? norm_bias, Tensor? cos_sin, Tensor? positions, "
    "Tensor slots, Tensor(a!) index_k_cache, *, float eps=1e-6, bool interleaved=False, bool hadamard=False, "
    "bool ue8m0=False) -> ()",
    "gather_index_k(Tensor index_k_cache, Tensor slots) -> (Tensor, Tensor)",
    "store_latent_kv(Tensor kv, Tensor slots, Tensor(a!) kv_cache) -> ()",
    "gather_latent_kv(Tensor kv_cache, Tensor slots) -> Tensor",
    # Indexer
    "indexer_logits(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor starts, Tensor ends) -> Tensor",
    "indexer_logits.out(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor starts, Tensor ends, *, "
    "Tensor(a!) out) -> ()",
    "indexer_logits_paged(Tensor q, Tensor index_k_cache, Tensor weights, Tensor context_lens, Tensor block_table, "
    "SymInt max_context_len) -> Tensor",
    "indexer_logits_paged.out(Tensor q, Tensor index_k_cache, Tensor weights, Tensor context_lens, "
    "Tensor block_table, SymInt max_context_len, *, Tensor(a!) out) -> ()",
    "topk(Tensor logits, Tensor starts, Tensor ends, SymInt k) -> Tensor",
    "topk.out(Tensor logits, Tensor starts, Tensor ends, SymInt k, *, Tensor(a!) out) -> ()",
    "topk_to_slots(Tensor logits, Tensor starts, Tensor ends, SymInt k, Tensor block_table, Tensor requests, "
    "SymInt page_size) -> Tensor",
    "topk_to_slots.out(Tensor logits, Tensor starts, Tensor ends, SymInt k, Tensor block_table, Tensor requests, "
    "SymInt page_size, *, Tensor(a!) out) -> ()",
    "topk_reads(Tensor logits, Tensor starts, Tensor ends, SymInt k) -> Tensor",
    "indexer_topk(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor starts, Tensor ends, SymInt topk) "
    "-> Tensor",
    "indexer_topk.out(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor starts, Tensor ends, SymInt topk, *, "
    "Tensor(a!) out) -> ()",
    "indexer_topk_paged(Tensor q, Tensor index_k_cache, Tensor weights, Tensor context_lens, Tensor block_table, "
    "SymInt topk) -> Tensor",
    "indexer_topk_paged.out(Tensor q, Tensor index_k_cache, Tensor weights, Tensor context_lens, Tensor block_table, "
    "SymInt topk, *, Tensor(a!) out) -> ()",
    "to_slots(Tensor indices, Tensor block_table, Tensor requests, SymInt page_size) -> Tensor",
    "to_slots.out(Tensor indices, Tensor block_table, Tensor requests, SymInt page_size, *, Tensor(a!) out) -> ()",
    # Attention
    "sparse_mla(Tensor q, Tensor kv, Tensor indices, float sm_scale, SymInt d_v=512, Tensor? sink=None, "
    "Tensor? lengths=None) -> (Tensor, Tensor)",
    "sparse_mla.out(Tensor q, Tensor kv, Tensor indices, float sm_scale, SymInt d_v=512, Tensor? sink=None, "
    "Tensor? lengths=None, *, Tensor(a!) out, Tensor(b!) lse) -> ()",
    "sparse_mla_paged(Tensor q, Tensor kv_cache, Tensor slots, float sm_scale, Tensor? sink=None, "
    "Tensor? lengths=None) -> (Tensor, Tensor)",
    "sparse_mla_paged.out(Tensor q, Tensor kv_cache, Tensor slots, float sm_scale, Tensor? sink=None, "
    "Tensor? lengths=None, *, Tensor(a!) out, Tensor(b!) lse) -> ()",
)

NAMES = sorted({schema.split("(")[0].removesuffix(".out") for schema in SCHEMAS})
PYTHON_TYPES = {
    "Tensor": "Tensor",
    "Optional[Tensor]": "Tensor | None",
    "float": "float",
    "bool": "bool",
    "int": "int",
    "SymInt": "int",
}


def overload(name: str) -> torch._ops.OpOverload:
    packet, _, variant = name.partition(".")
    return getattr(getattr(torch.ops.indexcache, packet), variant or "default")


def registered() -> set[str]:
    """Names of all ops of the namespace, `topk.out` style."""
    names = (schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("indexcache::"))
    packets = {name.removeprefix("indexcache::") for name in names}
    return {
        packet if variant == "default" else f"{packet}.{variant}"
        for packet in packets
        for variant in getattr(torch.ops.indexcache, packet).overloads()
    }


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.split("(")[0])
def test_schema_is_the_contract(schema):
    # Both texts go through torch's parser, which settles spelling (1e-6 or 1e-06) and keeps everything else.
    assert str(overload(schema.split("(")[0])._schema) == str(torch._C.parse_schema(f"indexcache::{schema}"))


def test_no_op_is_missing_and_none_is_undocumented():
    assert registered() == {schema.split("(")[0] for schema in SCHEMAS}
    assert sorted(ops.__all__) == NAMES


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.split("(")[0])
def test_every_overload_has_a_cpu_and_a_fake_kernel(schema):
    name = overload(schema.split("(")[0]).name()
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.split("(")[0])
def test_every_overload_has_a_cuda_kernel(schema):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(overload(schema.split("(")[0]).name(), "CUDA")


@pytest.mark.parametrize("name", NAMES)
def test_typed_function_has_the_schema_arguments(name):
    """Names, order, defaults, keyword-only marks and types; the out overload adds its buffers as keywords."""
    packet = getattr(torch.ops.indexcache, name)
    parameters = inspect.signature(getattr(ops, name)).parameters
    arguments = list(packet.default._schema.arguments)
    buffers = []
    if "out" in packet.overloads():
        buffers = packet.out._schema.arguments[len(arguments) :]
        assert [a.name for a in packet.out._schema.arguments[: len(arguments)]] == [a.name for a in arguments]
    assert list(parameters) == [argument.name for argument in (*arguments, *buffers)]

    for argument in arguments:
        parameter = parameters[argument.name]
        assert (parameter.kind is inspect.Parameter.KEYWORD_ONLY) == argument.kwarg_only, argument.name
        assert parameter.annotation == PYTHON_TYPES[str(argument.real_type)], argument.name
        if not argument.has_default_value():
            assert parameter.default is inspect.Parameter.empty, argument.name
        elif isinstance(argument.default_value, float):
            assert math.isclose(parameter.default, argument.default_value, rel_tol=1e-12), argument.name
        else:
            assert parameter.default == argument.default_value, argument.name
    for buffer in buffers:
        assert parameters[buffer.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[buffer.name].default is None and parameters[buffer.name].annotation == "Tensor | None"


@pytest.mark.parametrize("name", NAMES)
def test_typed_function_names_its_results_and_arguments(name):
    function = getattr(ops, name)
    results = getattr(torch.ops.indexcache, name).default._schema.returns
    assert inspect.signature(function).return_annotation == {0: "None", 1: "Tensor", 2: "tuple[Tensor, Tensor]"}[
        len(results)
    ]
    assert function.__doc__ and function.__doc__.strip()


def test_out_and_lse_come_together():
    q, kv = torch.ones(1, 1, 4), torch.ones(2, 4)
    indices = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="indexcache::sparse_mla: expected out and lse to be given together, got out"):
        ops.sparse_mla(q, kv, indices, 1.0, d_v=4, out=torch.empty(1, 1, 4))
    with pytest.raises(ValueError, match="got lse without out"):
        ops.sparse_mla_paged(q, kv, indices, 1.0, lse=torch.empty(1, 1))
