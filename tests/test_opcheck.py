"""Every op as torch sees it: schema, fake kernel, autograd registration, AOT dispatch, and the refusal of autograd."""

import pytest
import torch
from compare import assert_same_bits, results
from op_calls import CALLS, IDS, arguments, buffers, has_out, outcome
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from indexcache_ext import ops

WITH_OUT = [(name, case) for name, case in CALLS if has_out(name)]
OUT_IDS = [f"{name}-{i}" for i, (name, _) in enumerate(WITH_OUT)]


def split(op, call: dict) -> tuple[tuple, dict]:
    """Positional and keyword-only arguments, as the dispatcher passes them."""
    keyword = {a.name for a in op._schema.arguments if a.kwarg_only}
    return tuple(v for n, v in call.items() if n not in keyword), {n: v for n, v in call.items() if n in keyword}


# --- opcheck ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def allclose_of_e4m3(monkeypatch):
    """opcheck compares inputs before and after by torch.allclose, which has no e4m3 kernel: compare their bits."""
    allclose = torch.allclose

    def by_bits(x, y, *args, **kwargs):
        if x.dtype == torch.float8_e4m3fn:
            return torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        return allclose(x, y, *args, **kwargs)

    monkeypatch.setattr(torch, "allclose", by_bits)


@pytest.mark.usefixtures("allclose_of_e4m3")
@pytest.mark.parametrize(("name", "case"), CALLS, ids=IDS)
def test_opcheck(name, case, device):
    op = getattr(torch.ops.indexcache, name).default
    torch.library.opcheck(op, *split(op, arguments(name, case, device)))


@pytest.mark.usefixtures("allclose_of_e4m3")
@pytest.mark.parametrize(("name", "case"), WITH_OUT, ids=OUT_IDS)
def test_opcheck_out(name, case, device):
    op = getattr(torch.ops.indexcache, name).out
    call = arguments(name, case, device)
    torch.library.opcheck(op, *split(op, call | buffers(outcome(name, call))))


@pytest.mark.parametrize(("name", "case"), WITH_OUT, ids=OUT_IDS)
def test_typed_function_returns_the_given_buffers(name, case, device):
    call = arguments(name, case, device)
    expected = outcome(name, call)
    given = buffers(expected)
    returned = results(getattr(ops, name)(**call, **given))
    for actual, buffer, wanted in zip(returned, given.values(), expected, strict=True):
        assert actual is buffer
        assert_same_bits(buffer, wanted)


# --- Fake kernels -----------------------------------------------------------------------------------------------------


def int64(x):
    return x.long()


def shorter(x):
    return x[:-1]


def flat(x):
    return x.flatten()


BAD_ARGUMENTS = (
    ("quantize_index_q", {"q": int64}),
    ("quantize_index_q", {"weights": shorter}),
    ("quantize_index_q", {"cos_sin": lambda x: None}),
    ("quantize_index_q", {"cos_sin": lambda x: x[:, 1:].contiguous()}),
    ("quantize_index_k", {"k": flat}),
    ("quantize_index_k", {"norm_weight": lambda x: None}),
    ("quantize_index_k", {"norm_bias": shorter}),
    ("quantize_index_k", {"positions": lambda x: x.float()}),
    ("quantize_index_k", {n: lambda x: x[..., :48].contiguous() for n in ("k", "norm_weight", "norm_bias")}),
    ("store_index_k", {"slots": shorter}),
    ("store_index_k", {"index_k_cache": lambda x: x[:, :32]}),
    ("gather_index_k", {"index_k_cache": flat}),
    ("gather_index_k", {"slots": lambda x: x.float()}),
    ("store_latent_kv", {"kv": lambda x: x[:, :512]}),
    ("store_latent_kv", {"kv_cache": lambda x: x.int()}),
    ("gather_latent_kv", {"kv_cache": lambda x: x[:, :, 1:]}),
    ("indexer_logits", {"q": lambda x: x.float()}),
    ("indexer_logits", {"k_scale": shorter}),
    ("indexer_logits", {"ends": int64}),
    ("indexer_logits_paged", {"context_lens": flat}),
    ("indexer_logits_paged", {"max_context_len": lambda x: -1}),
    ("topk", {"logits": lambda x: x.double()}),
    ("topk", {"starts": int64}),
    ("topk", {"k": lambda x: 0}),
    ("topk", {"logits": lambda x: x.half()}),
    ("topk_to_slots", {"logits": lambda x: x.half()}),
    ("topk_to_slots", {"ends": shorter}),
    ("topk_to_slots", {"block_table": flat}),
    ("topk_to_slots", {"requests": shorter}),
    ("topk_to_slots", {"page_size": lambda x: 0}),
    ("topk_reads", {"starts": int64}),
    ("topk_reads", {"k": lambda x: 0}),
    ("indexer_topk", {"weights": lambda x: x[:, 1:].contiguous()}),
    ("indexer_topk", {"topk": lambda x: 0}),
    ("indexer_topk_paged", {"block_table": shorter}),
    ("to_slots", {"requests": shorter}),
    ("to_slots", {"page_size": lambda x: 0}),
    ("sparse_mla", {"kv": lambda x: x.float()}),
    ("sparse_mla", {"indices": int64}),
    ("sparse_mla", {"d_v": lambda x: 97}),
    ("sparse_mla", {"sink": shorter}),
    ("sparse_mla_paged", {"q": lambda x: x[..., :512]}),
    ("sparse_mla_paged", {"lengths": shorter}),
)


@pytest.mark.parametrize(("name", "changes"), BAD_ARGUMENTS, ids=[f"{n}-{'-'.join(c)}" for n, c in BAD_ARGUMENTS])
def test_fake_refuses_like_the_op(name, changes):
    call = arguments(name, next(case for n, case in CALLS if n == name), "cpu")
    for argument, change in changes.items():
        call[argument] = change(call[argument])
    op = getattr(torch.ops.indexcache, name).default
    with pytest.raises(RuntimeError, match=f"indexcache::{name}: expected ") as real:
        op(**call)
    with FakeTensorMode() as mode, pytest.raises(RuntimeError) as fake:
        op(**{n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in call.items()})
    assert str(fake.value).splitlines()[0] in str(real.value)


@pytest.mark.parametrize(("name", "case"), WITH_OUT, ids=OUT_IDS)
def test_fake_refuses_a_wrong_buffer(name, case):
    call = arguments(name, case, "cpu")
    given = buffers(outcome(name, call))
    op = getattr(torch.ops.indexcache, name).out
    for argument in given:
        for wrong in (given[argument][:-1], given[argument].double()):
            bad = call | given | {argument: wrong}
            with pytest.raises(RuntimeError, match=f"indexcache::{name}: expected {argument} to be") as real:
                op(**bad)
            with FakeTensorMode() as mode, pytest.raises(RuntimeError) as fake:
                op(**{n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in bad.items()})
            assert str(fake.value).splitlines()[0] in str(real.value)


# --- Autograd ---------------------------------------------------------------------------------------------------------

FLOAT_RESULTS = (
    "quantize_index_q", "quantize_index_k", "indexer_logits", "indexer_logits_paged", "sparse_mla", "sparse_mla_paged",
)  # fmt: skip


def differentiable(call: dict) -> list[str]:
    return [n for n, v in call.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]


REFUSED = [
    pytest.param(name, case, variant, id=f"{call_id}.{variant}")
    for call_id, (name, case) in zip(IDS, CALLS)
    if name in FLOAT_RESULTS
    for variant in getattr(torch.ops.indexcache, name).overloads()
]


def call_of(name, case, variant, device="cpu") -> dict:
    call = arguments(name, case, device)
    return call | (buffers(outcome(name, call)) if variant == "out" else {})


@pytest.mark.parametrize(("name", "case", "variant"), REFUSED)
def test_an_input_that_requires_grad_is_refused(name, case, variant):
    """Eagerly, through the raw op, whichever argument it is; and only while grad mode is on."""
    op = getattr(getattr(torch.ops.indexcache, name), variant)
    call = call_of(name, case, variant)
    expected = outcome(name, arguments(name, case, "cpu"))
    assert differentiable(call)
    for argument in differentiable(call):
        leaf = call | {argument: call[argument].detach().clone().requires_grad_()}
        with pytest.raises(RuntimeError, match=rf"indexcache::{name}: expected {argument} not to require grad.*detach"):
            op(**leaf)
        for allowed in (torch.no_grad, torch.inference_mode):
            with allowed():
                returned = op(**leaf)
            written = returned if variant == "default" else [leaf[n] for n in ("out", "lse") if n in leaf]
            for actual, wanted in zip(results(written), expected, strict=True):
                assert_same_bits(actual.detach(), wanted)


@pytest.mark.parametrize(("name", "case", "variant"), REFUSED)
def test_autograd_registration(name, case, variant):
    op = getattr(getattr(torch.ops.indexcache, name), variant)
    call = call_of(name, case, variant)
    argument = differentiable(call)[0]
    call[argument].requires_grad_()
    torch.library.opcheck(op, *split(op, call), test_utils="test_autograd_registration")


def sparse_mla_call() -> tuple:
    call = arguments("sparse_mla", next(case for name, case in CALLS if name == "sparse_mla"), "cpu")
    return call.pop("q"), call


def compiled(function, x):
    return torch.compile(function, backend="aot_eager", fullgraph=True)(x)


def aot(function, x):
    return aot_function(function, fw_compiler=lambda graph, inputs: graph)(x)


def traced(function, x):
    return make_fx(function, tracing_mode="symbolic")(x)


def faked(function, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return function(mode.from_tensor(x))


def functorch(function, x):
    return torch.func.grad(lambda y: function(y).float().sum())(x.detach())


@pytest.mark.parametrize("run", [compiled, aot, traced, faked, functorch], ids=lambda run: run.__name__)
def test_tracers_refuse_like_eager(run):
    q, rest = sparse_mla_call()
    with pytest.raises(Exception, match="indexcache::sparse_mla: expected q not to require grad"):
        run(lambda x: torch.ops.indexcache.sparse_mla(x, **rest)[0], q.requires_grad_())


def test_a_selection_may_come_from_tensors_that_require_grad():
    """Indices have no gradient to lose."""
    logits = torch.randn(3, 20, requires_grad=True)
    starts, ends = torch.zeros(3, dtype=torch.int32), torch.full((3,), 20, dtype=torch.int32)
    picked = torch.ops.indexcache.topk(logits, starts, ends, 4)
    assert not picked.requires_grad
    assert torch.equal(picked, logits.topk(4).indices.sort().values.int())
