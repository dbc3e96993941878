"""Fake kernels, which tell torch.compile and FakeTensorMode the results' shapes, and the refusal of autograd.

The checks are the C++ ones that need no data and no strides, with the same text, so that a wrong call fails while it is
traced. Sizes may be symbolic: they are compared by ``torch._check`` and never turned into Python ints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

_FLOAT = (torch.bfloat16, torch.float32)
_F32 = (torch.float32,)
_E4M3 = (torch.float8_e4m3fn,)
_U8 = (torch.uint8,)
_I32 = (torch.int32,)
_INT = (torch.int32, torch.int64)

_INDEX_PAGE = 64  # tokens of a page of the index-key cache
_LATENT_DIM, _ROPE_DIM, _LATENT_BYTES = 512, 64, 656

_registrations = torch.library.Library("indexcache", "IMPL")  # they live as long as this object


class _Check:
    """The argument checks of one call; ``main`` is the argument whose device the others must share."""

    def __init__(self, op: str, main: Tensor):
        self.op, self.device = op, main.device

    def fail(self, argument: str, expected: str, got: str) -> NoReturn:
        raise RuntimeError(_text(self.op, argument, expected, got))

    def tensor(self, argument: str, value: Tensor | None, dtypes: tuple[torch.dtype, ...], shape: Sequence) -> None:
        """``shape`` holds sizes, and names for dimensions that may have any size."""
        if value is None:
            return
        expected = f"{' or '.join(_name(dtype) for dtype in dtypes)} [{', '.join(map(str, shape))}]"
        if value.dtype not in dtypes or value.dim() != len(shape):
            self.fail(argument, expected, _describe(value))
        for size, wanted in zip(value.shape, shape):
            if not isinstance(wanted, str):
                torch._check(size == wanted, lambda: _text(self.op, argument, expected, _describe(value)))
        if value.device != self.device:
            self.fail(argument, f"{expected} on {self.device}", _describe(value))

    def at_least(self, argument: str, value: int, minimum: int) -> None:
        torch._check(value >= minimum, lambda: _text(self.op, argument, f">= {minimum}", str(value)))

    def index_k_cache(self, cache: Tensor, dim: int) -> None:
        self.tensor("index_k_cache", cache, _U8, ("pages", _INDEX_PAGE, dim + 4))

    def kv_cache(self, cache: Tensor) -> None:
        self.tensor("kv_cache", cache, _U8, ("pages", "page_size", _LATENT_BYTES))

    def slot_table(self, block_table: Tensor, requests: Tensor, rows: int, page_size: int) -> None:
        self.tensor("block_table", block_table, _I32, ("requests", "pages"))
        self.tensor("requests", requests, _I32, (rows,))
        self.at_least("page_size", page_size, 1)

    def rope(self, tokens: int, dim: int, cos_sin: Tensor | None, positions: Tensor | None, hadamard: bool) -> None:
        if (cos_sin is None) != (positions is None):
            self.fail("cos_sin" if cos_sin is None else "positions", "given together with the other", "None")
        self.tensor("cos_sin", cos_sin, _F32, ("max_position", "rot"))
        self.tensor("positions", positions, _INT, (tokens,))
        if cos_sin is not None:
            rot = cos_sin.size(1)
            expected = f"of an even width up to the head dim {dim}"
            for fits in (rot % 2 == 0, rot <= dim):
                torch._check(fits, lambda: _text(self.op, "cos_sin", expected, _describe(cos_sin)))
        if hadamard and isinstance(dim, int) and dim & (dim - 1):
            self.fail("hadamard", "False for a head dim that is no power of two", f"True with head dim {dim}")


def _text(op: str, argument: str, expected: str, got: str) -> str:
    return f"indexcache::{op}: expected {argument} to be {expected}, got {got}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(tensor: Tensor) -> str:
    strides = "" if tensor.is_contiguous() else f" with strides [{', '.join(map(str, tensor.stride()))}]"
    return f"{_name(tensor.dtype)} [{', '.join(map(str, tensor.shape))}]{strides} on {tensor.device}"


# --- Quantisation -----------------------------------------------------------------------------------------------------


def _quantize_index_q(
    q, weights, cos_sin, positions, *, scale, interleaved=False, hadamard=False, ue8m0=False
) -> tuple[Tensor, Tensor]:
    check = _Check("quantize_index_q", q)
    check.tensor("q", q, _FLOAT, ("tokens", "heads", "dim"))
    tokens, heads, dim = q.shape
    check.at_least("dim", dim, 1)
    check.tensor("weights", weights, _F32, (tokens, heads))
    check.rope(tokens, dim, cos_sin, positions, hadamard)
    return q.new_empty(q.shape, dtype=torch.float8_e4m3fn), weights.new_empty((tokens, heads))


def _check_index_k(op: str, k, norm_weight, norm_bias, cos_sin, positions, hadamard) -> _Check:
    check = _Check(op, k)
    check.tensor("k", k, _FLOAT, ("keys", "dim"))
    tokens, dim = k.shape
    check.at_least("dim", dim, 1)
    check.tensor("norm_weight", norm_weight, _F32, (dim,))
    check.tensor("norm_bias", norm_bias, _F32, (dim,))
    if norm_bias is not None and norm_weight is None:
        check.fail("norm_weight", "given where norm_bias is", "None")
    check.rope(tokens, dim, cos_sin, positions, hadamard)
    return check


def _quantize_index_k(
    k, norm_weight, norm_bias, cos_sin, positions, *, eps=1e-6, interleaved=False, hadamard=False, ue8m0=False
) -> tuple[Tensor, Tensor]:
    _check_index_k("quantize_index_k", k, norm_weight, norm_bias, cos_sin, positions, hadamard)
    return k.new_empty(k.shape, dtype=torch.float8_e4m3fn), k.new_empty((k.size(0),), dtype=torch.float32)


def _store_index_k(
    k, norm_weight, norm_bias, cos_sin, positions, slots, index_k_cache,
    *, eps=1e-6, interleaved=False, hadamard=False, ue8m0=False,
) -> None:  # fmt: skip
    check = _check_index_k("store_index_k", k, norm_weight, norm_bias, cos_sin, positions, hadamard)
    check.tensor("slots", slots, _INT, (k.size(0),))
    check.index_k_cache(index_k_cache, k.size(1))


def _gather_index_k(index_k_cache, slots) -> tuple[Tensor, Tensor]:
    check = _Check("gather_index_k", index_k_cache)
    expected = f"uint8 [pages, {_INDEX_PAGE}, dim + 4]"
    if index_k_cache.dim() != 3:
        check.fail("index_k_cache", expected, _describe(index_k_cache))
    dim = index_k_cache.size(2) - 4
    torch._check(dim >= 1, lambda: _text(check.op, "index_k_cache", expected, _describe(index_k_cache)))
    check.index_k_cache(index_k_cache, dim)
    check.tensor("slots", slots, _INT, ("rows",))
    rows = slots.size(0)
    return (
        index_k_cache.new_empty((rows, dim), dtype=torch.float8_e4m3fn),
        index_k_cache.new_empty((rows,), dtype=torch.float32),
    )


def _store_latent_kv(kv, slots, kv_cache) -> None:
    check = _Check("store_latent_kv", kv)
    check.tensor("kv", kv, _FLOAT, ("tokens", _LATENT_DIM + _ROPE_DIM))
    check.tensor("slots", slots, _INT, (kv.size(0),))
    check.kv_cache(kv_cache)


def _gather_latent_kv(kv_cache, slots) -> Tensor:
    check = _Check("gather_latent_kv", kv_cache)
    check.kv_cache(kv_cache)
    check.tensor("slots", slots, _INT, ("rows",))
    return kv_cache.new_empty((slots.size(0), _LATENT_DIM + _ROPE_DIM), dtype=torch.bfloat16)


# --- Indexer ----------------------------------------------------------------------------------------------------------


def _check_indexer(op: str, q, k, k_scale, weights, starts, ends) -> _Check:
    check = _Check(op, q)
    check.tensor("q", q, _E4M3, ("tokens", "heads", "dim"))
    tokens, heads, dim = q.shape
    check.at_least("dim", dim, 1)
    check.tensor("k", k, _E4M3, ("keys", dim))
    check.tensor("k_scale", k_scale, _F32, (k.size(0),))
    check.tensor("weights", weights, _F32, (tokens, heads))
    check.tensor("starts", starts, _I32, (tokens,))
    check.tensor("ends", ends, _I32, (tokens,))
    return check


def _check_indexer_paged(op: str, q, index_k_cache, weights, context_lens, block_table) -> _Check:
    check = _Check(op, q)
    check.tensor("q", q, _E4M3, ("requests", "queries", "heads", "dim"))
    requests, queries, heads, dim = q.shape
    check.at_least("dim", dim, 1)
    check.index_k_cache(index_k_cache, dim)
    check.tensor("weights", weights, _F32, (requests, queries, heads))
    check.tensor("context_lens", context_lens, _I32, (requests, queries))
    check.tensor("block_table", block_table, _I32, (requests, "pages"))
    return check


def _indexer_logits(q, k, k_scale, weights, starts, ends) -> Tensor:
    _check_indexer("indexer_logits", q, k, k_scale, weights, starts, ends)
    return weights.new_empty((q.size(0), k.size(0)))


def _indexer_logits_paged(q, index_k_cache, weights, context_lens, block_table, max_context_len) -> Tensor:
    check = _check_indexer_paged("indexer_logits_paged", q, index_k_cache, weights, context_lens, block_table)
    check.at_least("max_context_len", max_context_len, 0)
    return weights.new_empty((q.size(0), q.size(1), max_context_len))


def _check_topk(op: str, logits, starts, ends, k) -> _Check:
    check = _Check(op, logits)
    check.tensor("logits", logits, _FLOAT, ("rows", "columns"))
    rows = logits.size(0)
    check.tensor("starts", starts, _I32, (rows,))
    check.tensor("ends", ends, _I32, (rows,))
    check.at_least("k", k, 1)
    return check


def _topk(logits, starts, ends, k) -> Tensor:
    _check_topk("topk", logits, starts, ends, k)
    return starts.new_empty((logits.size(0), k))


def _topk_to_slots(logits, starts, ends, k, block_table, requests, page_size) -> Tensor:
    check = _check_topk("topk_to_slots", logits, starts, ends, k)
    check.slot_table(block_table, requests, logits.size(0), page_size)
    return starts.new_empty((logits.size(0), k))


def _topk_reads(logits, starts, ends, k) -> Tensor:
    _check_topk("topk_reads", logits, starts, ends, k)
    return starts.new_empty((logits.size(0),))


def _indexer_topk(q, k, k_scale, weights, starts, ends, topk) -> Tensor:
    check = _check_indexer("indexer_topk", q, k, k_scale, weights, starts, ends)
    check.at_least("topk", topk, 1)
    return starts.new_empty((q.size(0), topk))


def _indexer_topk_paged(q, index_k_cache, weights, context_lens, block_table, topk) -> Tensor:
    check = _check_indexer_paged("indexer_topk_paged", q, index_k_cache, weights, context_lens, block_table)
    check.at_least("topk", topk, 1)
    return context_lens.new_empty((q.size(0), q.size(1), topk))


def _to_slots(indices, block_table, requests, page_size) -> Tensor:
    check = _Check("to_slots", indices)
    check.tensor("indices", indices, _I32, ("tokens", "k"))
    check.slot_table(block_table, requests, indices.size(0), page_size)
    return indices.new_empty(indices.shape)


# --- Attention --------------------------------------------------------------------------------------------------------


def _attention(check: _Check, q, argument: str, rows, d_v, sink, lengths) -> tuple[Tensor, Tensor]:
    tokens, heads = q.size(0), q.size(1)
    check.tensor(argument, rows, _I32, (tokens, "k"))
    check.tensor("sink", sink, _F32, (heads,))
    check.tensor("lengths", lengths, _I32, (tokens,))
    return q.new_empty((tokens, heads, d_v)), q.new_empty((tokens, heads), dtype=torch.float32)


def _sparse_mla(q, kv, indices, sm_scale, d_v=512, sink=None, lengths=None) -> tuple[Tensor, Tensor]:
    check = _Check("sparse_mla", q)
    check.tensor("q", q, _FLOAT, ("tokens", "heads", "d_qk"))
    d_qk = q.size(2)
    check.at_least("d_qk", d_qk, 1)
    check.tensor("kv", kv, (q.dtype,), ("keys", d_qk))
    check.at_least("d_v", d_v, 1)
    torch._check(d_v <= d_qk, lambda: _text(check.op, "d_v", f"<= {d_qk}", str(d_v)))
    return _attention(check, q, "indices", indices, d_v, sink, lengths)


def _sparse_mla_paged(q, kv_cache, slots, sm_scale, sink=None, lengths=None) -> tuple[Tensor, Tensor]:
    check = _Check("sparse_mla_paged", q)
    check.tensor("q", q, _FLOAT, ("tokens", "heads", _LATENT_DIM + _ROPE_DIM))
    check.kv_cache(kv_cache)
    return _attention(check, q, "slots", slots, _LATENT_DIM, sink, lengths)


# --- Registration -----------------------------------------------------------------------------------------------------

_FAKES: dict[str, Callable] = {
    "quantize_index_q": _quantize_index_q,
    "quantize_index_k": _quantize_index_k,
    "store_index_k": _store_index_k,
    "gather_index_k": _gather_index_k,
    "store_latent_kv": _store_latent_kv,
    "gather_latent_kv": _gather_latent_kv,
    "indexer_logits": _indexer_logits,
    "indexer_logits_paged": _indexer_logits_paged,
    "topk": _topk,
    "topk_to_slots": _topk_to_slots,
    "topk_reads": _topk_reads,
    "indexer_topk": _indexer_topk,
    "indexer_topk_paged": _indexer_topk_paged,
    "to_slots": _to_slots,
    "sparse_mla": _sparse_mla,
    "sparse_mla_paged": _sparse_mla_paged,
}

# Ops whose floating-point result somebody could differentiate. What the others return is integer or from integers.
_FLOAT_RESULTS = (
    "quantize_index_q",
    "quantize_index_k",
    "indexer_logits",
    "indexer_logits_paged",
    "sparse_mla",
    "sparse_mla_paged",
)


def _out_fake(name: str, fake: Callable) -> Callable:
    """The fake of the out overload: the buffers must be what the op would return."""

    def check_buffers(*args, **kwargs) -> None:
        buffers = {argument: kwargs.pop(argument) for argument in ("out", "lse") if argument in kwargs}
        results = fake(*args, **kwargs)
        check = _Check(name, args[0])
        for (argument, buffer), result in zip(buffers.items(), results if isinstance(results, tuple) else (results,)):
            check.tensor(argument, buffer, (result.dtype,), result.shape)

    return check_buffers


def _refuse_autograd(op: torch._ops.OpOverload) -> None:
    """Make ``op`` raise in the forward pass where it would have to be differentiated.

    Without a kernel of our own at the Autograd key, torch attaches a node that yields no gradient and only warns.
    Here eager calls, fake tensors, AOT tracing and functorch all pass. It costs 3 us of host time per call, and nothing
    in inference mode, which skips the key.
    """
    below_autograd = torch._C._after_autograd_keyset

    def kernel(keyset, *args, **kwargs):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args, **kwargs):
            names = [argument.name for argument in op._schema.arguments]
            values = {**dict(zip(names, args)), **kwargs}
            argument, tensor = next((n, v) for n, v in values.items() if isinstance(v, Tensor) and v.requires_grad)
            raise RuntimeError(
                f"indexcache::{op._opname}: expected {argument} not to require grad, since this op has no backward, "
                f"got {_describe(tensor)} that requires grad: pass {argument}.detach() or call under torch.no_grad()"
            )
        return op.redispatch(keyset & below_autograd, *args, **kwargs)

    _registrations.impl(op, kernel, "Autograd", with_keyset=True)


def _register() -> None:
    for name, fake in _FAKES.items():
        packet = getattr(torch.ops.indexcache, name)
        for overload in packet.overloads():
            kernel = fake if overload == "default" else _out_fake(name, fake)
            op = getattr(packet, overload)
            torch.library.register_fake(op, kernel, lib=_registrations)
            if name in _FLOAT_RESULTS:
                _refuse_autograd(op)


_register()
