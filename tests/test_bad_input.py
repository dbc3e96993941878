"""Every op refuses every argument that is wrong, with a message that names op, argument, expected and got.

One table says what each op takes. From it come the wrong calls: each argument in turn gets another dtype, one dimension
more, another size, gaps between its elements, another device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from case_types import (
    AttentionCase,
    IndexerCase,
    LatentCase,
    PagedIndexerCase,
    QuantizeCase,
    SlotsCase,
    TopkCase,
    TopkSlotsCase,
)
from torch import Tensor

ops = torch.ops.indexcache

_QUERY = QuantizeCase(tokens=5, heads=3, dim=16, rot=8)
_KEY = QuantizeCase(tokens=5, dim=16, rot=8, norm="bias", pages=2)
_LATENT = LatentCase(tokens=5, page_size=8, pages=2)
_INDEXER = IndexerCase(tokens=5, keys=7, heads=3, dim=16)
_PAGED = PagedIndexerCase(lengths=(70, 65), queries=3, heads=4, dim=16, max_context_len=9, table_pages=2)
_TOPK = TopkCase(rows=5, columns=7, k=4)
_TOPK_SLOTS = TopkSlotsCase(rows=5, columns=7, k=4, requests=2, table_pages=3)
_SLOTS = SlotsCase(tokens=5, k=6, requests=2, table_pages=3)
_DENSE = AttentionCase(tokens=5, heads=3, keys=11, k=6, d_qk=16, d_v=8, sink="randn", lengths=True)
_CACHED = AttentionCase(tokens=5, heads=3, keys=16, k=6, page_size=8, sink="randn", lengths=True)

FLOATS, INTS = "bfloat16 or float32", "int32 or int64"
DENSE, ROWS, PAGES = "contiguous ", "with inner stride 1, ", "contiguous inside a page, "

_TRANSFORM = {"cos_sin": "float32 [max_position, rot]", "positions": f"{INTS} [5]"}
_KEY_INPUT = {"k": f"{FLOATS} [keys, dim]", "norm_weight": "float32 [16]", "norm_bias": "float32 [16]", **_TRANSFORM}
_SCORES = {
    "q": "float8_e4m3fn [tokens, heads, dim]",
    "k": "float8_e4m3fn [keys, 16]",
    "k_scale": "float32 [7]",
    "weights": "float32 [5, 3]",
    "starts": "int32 [5]",
    "ends": "int32 [5]",
}
_PAGED_SCORES = {
    "q": "float8_e4m3fn [requests, queries, heads, dim]",
    "index_k_cache": "uint8 [pages, 64, 20]",
    "weights": "float32 [2, 3, 4]",
    "context_lens": "int32 [2, 3]",
    "block_table": "int32 [2, pages]",
}
_LOGITS = {"logits": f"{FLOATS} [rows, columns]", "starts": "int32 [5]", "ends": "int32 [5]"}
_TABLE = {"block_table": "int32 [requests, pages]", "requests": "int32 [5]"}
_SOFTMAX = {"sink": "float32 [3]", "lengths": "int32 [5]"}

# What each op takes, in the words of its errors. The first argument sets the device of all.
EXPECTED: dict[str, dict[str, str]] = {
    "quantize_index_q": {"q": f"{FLOATS} [tokens, heads, dim]", "weights": "float32 [5, 3]", **_TRANSFORM},
    "quantize_index_k": _KEY_INPUT,
    "store_index_k": {**_KEY_INPUT, "slots": f"{INTS} [5]", "index_k_cache": "uint8 [pages, 64, 20]"},
    "gather_index_k": {"index_k_cache": "uint8 [pages, 64, dim + 4]", "slots": f"{INTS} [rows]"},
    "store_latent_kv": {
        "kv": f"{FLOATS} [tokens, 576]",
        "slots": f"{INTS} [5]",
        "kv_cache": "uint8 [pages, page_size, 656]",
    },
    "gather_latent_kv": {"kv_cache": "uint8 [pages, page_size, 656]", "slots": f"{INTS} [rows]"},
    "indexer_logits": _SCORES,
    "indexer_logits_paged": _PAGED_SCORES,
    "topk": _LOGITS,
    "topk_to_slots": _LOGITS | _TABLE,
    "topk_reads": _LOGITS,
    "indexer_topk": _SCORES,
    "indexer_topk_paged": _PAGED_SCORES,
    "to_slots": {"indices": "int32 [tokens, k]", **_TABLE},
    "sparse_mla": {
        "q": f"{FLOATS} [tokens, heads, d_qk]",
        "kv": "bfloat16 [keys, 16]",
        "indices": "int32 [5, k]",
        **_SOFTMAX,
    },
    "sparse_mla_paged": {
        "q": f"{FLOATS} [tokens, heads, 576]",
        "kv_cache": "uint8 [pages, page_size, 656]",
        "slots": "int32 [5, k]",
        **_SOFTMAX,
    },
}

# What each out overload writes.
OUTS: dict[str, dict[str, str]] = {
    "indexer_logits": {"out": "float32 [5, 7]"},
    "indexer_logits_paged": {"out": "float32 [2, 3, 9]"},
    "topk": {"out": "int32 [5, 4]"},
    "topk_to_slots": {"out": "int32 [5, 4]"},
    "indexer_topk": {"out": "int32 [5, 4]"},
    "indexer_topk_paged": {"out": "int32 [2, 3, 4]"},
    "to_slots": {"out": "int32 [5, 6]"},
    "sparse_mla": {"out": "bfloat16 [5, 3, 8]", "lse": "float32 [5, 3]"},
    "sparse_mla_paged": {"out": "bfloat16 [5, 3, 512]", "lse": "float32 [5, 3]"},
}

# Arguments whose strides are not all fixed: the dimension that must still be dense, and how the error says so.
STRIDED = {
    ("topk", "logits"): (1, ROWS),
    ("topk_to_slots", "logits"): (1, ROWS),
    ("topk_reads", "logits"): (1, ROWS),
    ("sparse_mla", "q"): (2, ROWS),
    ("sparse_mla", "kv"): (1, ROWS),
    ("sparse_mla_paged", "q"): (2, ROWS),
    ("store_latent_kv", "kv"): (1, ROWS),
}


def strides_of(op: str, argument: str) -> tuple[int, str]:
    return (1, PAGES) if argument.endswith("cache") else STRIDED.get((op, argument), (0, DENSE))


def good_call(op: str, device: str) -> dict:
    """A call that the op accepts."""
    if op == "quantize_index_q":
        return _QUERY.make(device)
    if op in ("quantize_index_k", "store_index_k"):
        return _KEY.make(device) | (_KEY.cache(device) if op == "store_index_k" else {})
    if op == "gather_index_k":
        return _KEY.cache(device)
    if op in ("store_latent_kv", "gather_latent_kv"):
        call = _LATENT.make(device)
        return {name: x for name, x in call.items() if op == "store_latent_kv" or name != "kv"}
    if op in ("indexer_logits", "indexer_topk"):
        return _INDEXER.make(device) | ({"topk": 4} if op == "indexer_topk" else {})
    if op == "indexer_logits_paged":
        return _PAGED.make(device)
    if op == "indexer_topk_paged":
        return {name: x for name, x in _PAGED.make(device).items() if name != "max_context_len"} | {"topk": 4}
    selections = {"topk": _TOPK, "topk_to_slots": _TOPK_SLOTS, "topk_reads": _TOPK, "to_slots": _SLOTS}
    return (selections | {"sparse_mla": _DENSE, "sparse_mla_paged": _CACHED})[op].make(device)


def good_outs(op: str, device: str) -> dict[str, Tensor]:
    returned = getattr(ops, op)(**good_call(op, device))
    returned = (returned,) if isinstance(returned, Tensor) else returned
    return dict(zip(OUTS[op], returned))


# --- Ways to be wrong -------------------------------------------------------------------------------------------------

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip


def shape_in(expected: str) -> list[str]:
    return expected[expected.index("[") + 1 : -1].split(", ")


def wrong_dtypes(good: Tensor, expected: str) -> Iterator[Tensor]:
    accepted = expected[: expected.index(" [")].split(" or ")
    for dtype in DTYPES:
        if str(dtype).removeprefix("torch.") not in accepted:
            yield torch.empty(good.shape, dtype=dtype, device=good.device)


def wrong_ranks(good: Tensor, expected: str) -> Iterator[Tensor]:
    yield good.contiguous().unsqueeze(0)
    yield good.contiguous().unsqueeze(-1)
    yield good[0].contiguous()


def wrong_sizes(good: Tensor, expected: str) -> Iterator[Tensor]:
    for dim, size in enumerate(shape_in(expected)):
        if size.isdigit():
            for other in {int(size) + 1, int(size) - 1, 0} - {int(size)}:
                shape = list(good.shape)
                shape[dim] = other
                yield torch.zeros(shape, dtype=torch.float32, device=good.device).to(good.dtype)


def with_gaps(good: Tensor, first: int) -> Iterator[Tensor]:
    """Copies that are not dense from dimension `first` on: with a gap in one dimension, and with two exchanged."""
    for dim in range(first, good.dim()):
        wide = torch.zeros([2 * n if i == dim else n for i, n in enumerate(good.shape)], device=good.device)
        yield wide.to(good.dtype)[(slice(None),) * dim + (slice(None, None, 2),)]
    if good.dim() - first > 1:
        yield good.contiguous().transpose(-1, -2).contiguous().transpose(-1, -2)


def described(x: Tensor) -> str:
    """A tensor as the errors name it."""
    dtype = str(x.dtype).removeprefix("torch.")
    dtype = "another dtype" if dtype == "float8_e5m2" else dtype
    strides = "" if x.is_contiguous() else f" with strides {list(x.stride())}"
    return f"{dtype} {list(x.shape)}{strides} on {x.device}"


def assert_refused(op: str, argument: str, expected: str, got: str, call: dict, overload: str = "default") -> None:
    message = f"indexcache::{op}: expected {argument} to be {expected}, got {got}"
    with pytest.raises(RuntimeError, match=re.escape(message) + r"(\n|$)"):
        getattr(getattr(ops, op), overload)(**call)


def arguments_of(table: dict[str, dict[str, str]]) -> list[tuple[str, str]]:
    return [(op, argument) for op, expected in table.items() for argument in expected]


def by_name(value: object) -> str:
    return str(value)


every_argument = pytest.mark.parametrize("op,argument", arguments_of(EXPECTED), ids=by_name)
every_out = pytest.mark.parametrize("op,argument", arguments_of(OUTS), ids=by_name)
every_mistake = pytest.mark.parametrize("mistake", [wrong_dtypes, wrong_ranks, wrong_sizes], ids=lambda f: f.__name__)


@pytest.mark.parametrize("op", EXPECTED)
def test_the_good_call_is_good(device: str, op: str) -> None:
    getattr(ops, op)(**good_call(op, device))


@every_mistake
@every_argument
def test_wrong_dtype_rank_and_size(device: str, op: str, argument: str, mistake) -> None:
    call, expected = good_call(op, device), EXPECTED[op][argument]
    for bad in mistake(call[argument], expected):
        assert_refused(op, argument, with_known_dim(expected, bad), described(bad), call | {argument: bad})


def with_known_dim(expected: str, bad: Tensor) -> str:
    """gather_index_k takes the head dim from the cache: where it can be read, the error shows it."""
    readable = "dim + 4" in expected and bad.dim() == 3 and bad.size(2) > 4
    return expected.replace("dim + 4", str(bad.size(2))) if readable else expected


@every_argument
def test_wrong_strides(device: str, op: str, argument: str) -> None:
    call = good_call(op, device)
    first, words = strides_of(op, argument)
    bad_tensors = list(with_gaps(call[argument], first))
    assert bad_tensors
    for bad in bad_tensors:
        expected = words + with_known_dim(EXPECTED[op][argument], bad)
        assert_refused(op, argument, expected, described(bad), call | {argument: bad})


@every_mistake
@every_out
def test_wrong_out(device: str, op: str, argument: str, mistake) -> None:
    call, outs, expected = good_call(op, device), good_outs(op, device), OUTS[op][argument]
    for bad in mistake(outs[argument], expected):
        assert_refused(op, argument, expected, described(bad), call | outs | {argument: bad}, "out")


@every_out
def test_wrong_strides_of_out(device: str, op: str, argument: str) -> None:
    call, outs = good_call(op, device), good_outs(op, device)
    for bad in with_gaps(outs[argument], 0):
        assert_refused(op, argument, DENSE + OUTS[op][argument], described(bad), call | outs | {argument: bad}, "out")


if torch.cuda.is_available():

    @every_argument
    def test_wrong_device(op: str, argument: str) -> None:
        """Every argument on the GPU but one, the other way round for the first, which sets the device of all."""
        here, there = good_call(op, "cuda"), good_call(op, "cpu")
        main = next(iter(EXPECTED[op]))
        if argument == main:
            second = list(EXPECTED[op])[1]
            expected = f"{EXPECTED[op][second]} on cpu"
            assert_refused(op, second, expected, described(here[second]), here | {main: there[main]})
        else:
            expected = f"{EXPECTED[op][argument]} on cuda:0"
            assert_refused(op, argument, expected, described(there[argument]), here | {argument: there[argument]})

    @every_out
    def test_wrong_device_of_out(op: str, argument: str) -> None:
        call, outs = good_call(op, "cuda"), good_outs(op, "cuda")
        bad = outs[argument].cpu()
        expected = f"{OUTS[op][argument]} on cuda:0"
        assert_refused(op, argument, expected, described(bad), call | outs | {argument: bad}, "out")


# --- Numbers, and arguments that belong together ----------------------------------------------------------------------

NUMBERS = [
    ("topk", "k", 0, ">= 1"),
    ("topk", "k", -5, ">= 1"),
    ("topk_to_slots", "k", 0, ">= 1"),
    ("topk_to_slots", "page_size", 0, ">= 1"),
    ("topk_reads", "k", 0, ">= 1"),
    ("indexer_topk", "topk", 0, ">= 1"),
    ("indexer_topk_paged", "topk", -1, ">= 1"),
    ("indexer_logits_paged", "max_context_len", -1, ">= 0"),
    ("indexer_logits_paged", "max_context_len", 2**31, f"<= {2**31 - 1}"),
    ("to_slots", "page_size", 0, ">= 1"),
    ("to_slots", "page_size", -64, ">= 1"),
    ("sparse_mla", "d_v", 0, ">= 1"),
    ("sparse_mla", "d_v", -1, ">= 1"),
    ("sparse_mla", "d_v", 17, "<= 16"),
]


@pytest.mark.parametrize("op,argument,value,expected", NUMBERS)
def test_number_out_of_range(device: str, op: str, argument: str, value: int, expected: str) -> None:
    assert_refused(op, argument, expected, str(value), good_call(op, device) | {argument: value})


@pytest.mark.parametrize("op", ["quantize_index_q", "quantize_index_k", "store_index_k"])
def test_rotary_table_and_hadamard(device: str, op: str) -> None:
    call = good_call(op, device)
    for missing in ("cos_sin", "positions"):
        assert_refused(op, missing, "given together with the other", "None", call | {missing: None})
    for width in (7, 18):
        table = torch.zeros(23, width, device=device)
        expected = "of an even width up to the head dim 16"
        assert_refused(op, "cos_sin", expected, described(table), call | {"cos_sin": table})
    main = "q" if op == "quantize_index_q" else "k"
    odd = good_call(op, device)[main][..., :12].contiguous()
    narrow = {name: odd.new_ones(12, dtype=torch.float32) for name in ("norm_weight", "norm_bias") if name in call}
    assert_refused(
        op,
        "hadamard",
        "False for a head dim that is no power of two",
        "True with head dim 12",
        call | {main: odd, "hadamard": True} | narrow,
    )
    if main == "k":
        assert_refused(op, "norm_weight", "given where norm_bias is", "None", call | {"norm_weight": None})


@pytest.mark.parametrize(
    "op,dense,name",
    [
        ("quantize_index_q", "q", "dim"),
        ("quantize_index_k", "k", "dim"),
        ("indexer_logits", "q k", "dim"),
        ("indexer_topk", "q k", "dim"),
        ("indexer_logits_paged", "q index_k_cache", "dim"),
        ("indexer_topk_paged", "q index_k_cache", "dim"),
        ("sparse_mla", "q kv", "d_qk"),
    ],
)
def test_vectors_of_no_dims(device: str, op: str, dense: str, name: str) -> None:
    """A dot product over nothing is a mistake, not a 0."""
    call = good_call(op, device)
    for argument in dense.split():
        rest = 4 if argument.endswith("cache") else 0  # the scale
        call[argument] = call[argument][..., :rest].contiguous()
    assert_refused(op, name, ">= 1", "0", call)


def test_more_heads_or_dims_than_an_int_counts(device: str) -> None:
    call, limit, size = good_call("sparse_mla", device), f"<= {2**31 - 1}", str(2**31)
    heads = {"q": call["q"][:1, :1].expand(1, 2**31, -1)}
    dims = {"q": call["q"].new_empty(0, 1, 2**31), "kv": call["kv"].new_empty(0, 2**31)}
    assert_refused("sparse_mla", "heads", limit, size, call | heads)
    assert_refused("sparse_mla", "d_qk", limit, size, call | dims)


@pytest.mark.parametrize("op", ["store_latent_kv", "gather_latent_kv", "sparse_mla_paged"])
def test_cache_page_of_nothing(device: str, op: str) -> None:
    cache = torch.zeros(3, 0, 656, dtype=torch.uint8, device=device)
    expected = "uint8 [pages, page_size >= 1, 656]"
    assert_refused(op, "kv_cache", expected, described(cache), good_call(op, device) | {"kv_cache": cache})


@pytest.mark.parametrize("name", ["nonsense", "sm90" if not torch.cuda.is_available() else "cpu"])
def test_forced_backend_that_cannot_serve_says_why(device: str, backend, name: str) -> None:
    if name == device:
        device = "cuda"
    call = good_call("topk", device)
    backend(name)
    with pytest.raises(RuntimeError, match=rf"indexcache::topk: .*INDEXCACHE_BACKEND.*({name}|{device})"):
        ops.topk(**call)


# --- Sizes of 0 are legal ---------------------------------------------------------------------------------------------


def test_no_heads(device: str) -> None:
    q, weights = torch.zeros(5, 0, 16, device=device), torch.zeros(5, 0, device=device)
    q8, folded = ops.quantize_index_q(q, weights, None, None, scale=1.0)
    assert q8.shape == (5, 0, 16) and folded.shape == (5, 0)


def test_rotary_table_without_positions_in_it(device: str) -> None:
    """Every position is outside a table of no rows."""
    call = good_call("quantize_index_k", device) | {"cos_sin": torch.zeros(0, 8, device=device)}
    k8, k_scale = ops.quantize_index_k(**call)
    assert k_scale.isnan().all() and (k8.view(torch.uint8) == 0x7F).all()
