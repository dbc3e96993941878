"""``indexcache_ext._C``: the ops on NumPy and DLPack arrays are those of torch, bit for bit, and need no torch."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from case_types import AttentionCase, TopkCase
from compare import assert_same_bits
from op_calls import CALLS, IDS, MUTATED, arguments, buffers, has_out, outcome
from torch import Tensor

import indexcache_ext

_C = pytest.importorskip("indexcache_ext._C", reason="built without _C", exc_type=ImportError)

AS_BITS = {torch.float8_e4m3fn: torch.uint8, torch.bfloat16: torch.uint16}  # what NumPy has no dtype for
WORKER = Path(__file__).with_name("dlpack_worker.py")


def numpy_array(x: Tensor) -> np.ndarray:
    return x.contiguous().view(AS_BITS.get(x.dtype, x.dtype)).numpy()


def assert_array_is(array: np.ndarray, tensor: Tensor) -> None:
    wanted = numpy_array(tensor)
    assert array.dtype == wanted.dtype and array.shape == wanted.shape
    assert array.tobytes() == wanted.tobytes()


def ask_worker(folder: Path, calls: list[dict]) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Answers and results of `calls`, each with `op`, `call` (arguments by name) and maybe `padded` and `read_only`."""
    arrays, jobs = {}, []
    for i, call in enumerate(calls):
        keys = {name: f"{i}.{name}" for name, x in call["call"].items() if isinstance(x, Tensor)}
        arrays |= {key: numpy_array(call["call"][name]) for name, key in keys.items()}
        plain = {name: x for name, x in call["call"].items() if name not in keys}
        extra = {"padded": call.get("padded", []), "read_only": call.get("read_only", [])}
        jobs.append({"op": call["op"], "arguments": plain, "arrays": keys, **extra})
    np.savez(folder / "arrays.npz", **arrays)
    (folder / "calls.json").write_text(json.dumps(jobs))
    done = subprocess.run([sys.executable, str(WORKER), str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "answers.json").read_text()), dict(np.load(folder / "results.npz"))


def test_numpy_without_torch_equals_torch(tmp_path):
    """Every op and every out variant, and rows with padding between them."""
    calls, expected = [], []
    for name, case in CALLS:
        call = arguments(name, case, "cpu")
        fresh = {n: x.clone() if n == MUTATED.get(name) else x for n, x in call.items()}
        wanted = outcome(name, fresh)
        calls.append({"op": name, "call": call})
        expected.append(wanted)
        if has_out(name):
            calls.append({"op": name, "call": call | buffers(wanted)})
            expected.append(wanted)
    for name, case, padded in (
        ("topk", TopkCase(columns=90, k=9), ["logits"]),
        ("topk", TopkCase(columns=90, k=9, dtype=torch.bfloat16), ["logits"]),
        ("sparse_mla", AttentionCase(d_qk=40, d_v=24, keys=40, k=9), ["q", "kv"]),
    ):
        call = arguments(name, case, "cpu")
        calls.append({"op": name, "call": call, "padded": padded})
        expected.append(outcome(name, call))

    answers, found = ask_worker(tmp_path, calls)
    for i, (call, answer, wanted) in enumerate(zip(calls, answers, expected, strict=True)):
        assert answer == {"results": len(wanted)}, (call["op"], answer)
        for j, tensor in enumerate(wanted):
            assert_array_is(found[f"{i}.{j}"], tensor)


def one_call(name: str) -> dict:
    return arguments(name, next(case for n, case in CALLS if n == name), "cpu")


def test_bad_input_has_the_text_of_torch(tmp_path):
    """The checks are the same code, so the sentence is the same, as a ValueError."""
    topk, mla, store = one_call("topk"), one_call("sparse_mla"), one_call("store_latent_kv")
    bad = [
        {"op": "topk", "call": topk | {"starts": topk["starts"].long()}},
        {"op": "topk", "call": topk | {"k": 0}},
        {"op": "topk", "call": topk | {"logits": topk["logits"].double()}},
        {"op": "topk", "call": topk | {"ends": topk["ends"][:-1]}},
        {"op": "topk", "call": topk | {"out": torch.zeros(2, 2, dtype=torch.int32)}},
        {"op": "topk_to_slots", "call": one_call("topk_to_slots") | {"page_size": 0}},
        {"op": "topk_reads", "call": one_call("topk_reads") | {"k": 0}},
        {"op": "indexer_topk", "call": one_call("indexer_topk") | {"topk": -1}},
        {"op": "sparse_mla", "call": mla | {"kv": mla["kv"].float()}},
        {"op": "sparse_mla", "call": mla | {"d_v": 0}},
        {"op": "store_latent_kv", "call": store | {"kv": store["kv"][:, 1:]}},
        {"op": "quantize_index_q", "call": one_call("quantize_index_q") | {"positions": None}},
    ]
    answers, _ = ask_worker(tmp_path, bad)
    for call, answer in zip(bad, answers, strict=True):
        packet = getattr(torch.ops.indexcache, call["op"])
        with pytest.raises(RuntimeError) as raised:
            (packet.out if "out" in call["call"] else packet.default)(
                **{n: x.contiguous() if isinstance(x, Tensor) else x for n, x in call["call"].items()}
            )
        assert answer.get("is_value_error"), answer
        assert answer["error"].startswith(f"indexcache::{call['op']}: expected ")
        assert answer["error"] in str(raised.value)


def test_arrays_that_cannot_serve_are_refused():
    call = {n: numpy_array(x) if isinstance(x, Tensor) else x for n, x in one_call("topk").items()}
    with pytest.raises(ValueError, match="expected logits to be an array .*got list"):
        _C.topk(**call | {"logits": [1.0, 2.0]})
    with pytest.raises(ValueError, match="expected starts to be an array .*got NoneType"):
        _C.topk(**call | {"starts": None})
    with pytest.raises(ValueError, match="expected logits to be .*strides"):
        _C.topk(**call | {"logits": np.zeros((5, 100), dtype="f4,u1")["f0"]})  # elements 5 bytes apart
    with pytest.raises(ValueError, match="expected logits to be bfloat16 or float32"):
        _C.topk(**call | {"logits": call["logits"].astype(np.complex64)})
    with pytest.raises(ValueError, match="expected logits to be bfloat16 or float32"):
        _C.topk(**call | {"logits": call["logits"].astype(">f4")})
    out = np.zeros((5, call["k"]), np.int32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="expected out to be a writable array"):
        _C.topk(**call, out=out)
    with pytest.raises(TypeError):
        _C.topk(call["logits"], call["starts"], call["ends"])


def test_read_only_caches_and_inputs(tmp_path):
    """Inputs may be read-only, what an op writes may not."""
    store = one_call("store_latent_kv")
    inputs = {"op": "store_latent_kv", "call": store, "read_only": ["kv", "slots"]}
    cache = {"op": "store_latent_kv", "call": store, "read_only": ["kv_cache"]}
    accepted, refused = ask_worker(tmp_path, [inputs, cache])[0]
    assert accepted == {"results": 1}
    assert refused["is_value_error"] and "expected kv_cache to be a writable array" in refused["error"]


@pytest.mark.parametrize("name", sorted({name for name, _ in CALLS}))
def test_signatures_are_those_of_the_schema(name):
    """pybind11 writes the signature as the first line of the docstring."""
    text = getattr(_C, name).__doc__.splitlines()[0]
    listed = [part.split(":")[0].strip() for part in text[text.index("(") + 1 : text.rindex(")")].split(", ")]
    typed = inspect.signature(getattr(indexcache_ext.ops, name)).parameters
    assert [part for part in listed if part != "*"] == [*typed, "stream"]
    keywords = listed[listed.index("*") + 1 :]
    assert keywords == [n for n, p in typed.items() if p.kind is inspect.Parameter.KEYWORD_ONLY] + ["stream"]


@pytest.mark.parametrize(("name", "case"), CALLS, ids=IDS)
def test_dlpack_of_another_library(name, case, device):
    """torch as the foreign library: its tensors export themselves; CPU results are NumPy, CUDA results export too."""
    call = arguments(name, case, device)
    expected = outcome(name, {n: x.clone() if n == MUTATED.get(name) else x for n, x in call.items()})
    foreign = {n: x.view(torch.uint8) if _is_e4m3(x) else x for n, x in call.items()}
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    returned = getattr(_C, name)(**foreign, stream=stream)
    if name in MUTATED:
        assert returned is None
        assert_same_bits(call[MUTATED[name]], expected[0])
        return
    returned = returned if isinstance(returned, tuple) else (returned,)
    for actual, wanted in zip(returned, expected, strict=True):
        if device == "cpu":
            assert_array_is(actual, wanted)
        else:
            exported = torch.from_dlpack(actual)
            assert exported.device == wanted.device
            assert_same_bits(exported, wanted.view(torch.uint8) if _is_e4m3(wanted) else wanted)


def _is_e4m3(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.float8_e4m3fn


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("name", "case"), CALLS, ids=IDS)
def test_cupy_equals_torch(name, case):
    cupy = pytest.importorskip("cupy")
    call = arguments(name, case, "cuda")
    expected = outcome(name, {n: x.clone() if n == MUTATED.get(name) else x for n, x in call.items()})
    torch.cuda.synchronize()
    arrays = {
        n: cupy.from_dlpack(x.view(AS_BITS.get(x.dtype, x.dtype))) if isinstance(x, Tensor) else x
        for n, x in call.items()
    }
    returned = getattr(_C, name)(**arrays)
    returned = arrays[MUTATED[name]] if name in MUTATED else returned
    returned = returned if isinstance(returned, tuple) else (returned,)
    for actual, wanted in zip(returned, expected, strict=True):
        assert isinstance(actual, cupy.ndarray)
        bits = actual.view(cupy.uint16) if wanted.dtype == torch.bfloat16 else actual  # DLPack has bfloat16
        assert_array_is(cupy.asnumpy(bits), wanted.cpu())


def test_build_info_and_capabilities():
    info = _C.build_info()
    assert isinstance(info, dict) and info["version"] == indexcache_ext.__version__
    table = _C.capabilities()
    assert all(set(row) == {"op", "backend", "limits"} for row in table)
    on_cpu = {row["op"] for row in table if row["backend"] == "cpu"}
    assert on_cpu == {name for name, _ in CALLS}
