"""What "the same" means: bit for bit where the contract promises bits, else bounds in the terms of the field."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from indexcache_ext import reference

# The float32 kernels differ from float64 by rounding only. Tensor cores keep about 13 bits of an FP8 sum.
LOGIT_ROUNDING = {"cpu": 8e-6, "cuda": 2.5e-4}
UNDERFLOW = 1e-37  # float32 may lose what is smaller


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8) if x.numel() and x.dim() else x.reshape(-1)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert torch.equal(_bytes(actual), _bytes(expected))


def results(returned: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (returned,) if isinstance(returned, Tensor) else tuple(returned)


def squared_difference(actual: Tensor, expected: Tensor) -> float:
    """``1 - 2 sum(xy) / sum(x^2 + y^2)``: a squared relative error over all entries."""
    x, y = actual.double(), expected.double()
    norm = (x * x + y * y).sum()
    return 0.0 if norm == 0 else float(((x - y) ** 2).sum() / norm)  # the same value without its cancellation


def assert_logits(actual: Tensor, arguments: dict, op: Callable = reference.indexer_logits) -> None:
    """f32 logits against float64: equal -inf and NaN patterns, squared difference < 5e-6, rounding of every entry.

    ``op`` is the reference that takes ``arguments``. An entry may be off by rounding relative to the sum of the
    absolute values of its terms, which the same op gives for absolute inputs.
    """
    expected = op(**arguments)
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    assert torch.equal(actual == -torch.inf, expected == -torch.inf)
    assert torch.equal(actual.isnan(), expected.isnan())
    finite = expected.isfinite()
    terms = op(**{name: _absolute(name, x) for name, x in arguments.items()})
    error = (actual.double() - expected)[finite].abs()
    assert (error <= LOGIT_ROUNDING[actual.device.type] * terms[finite] + UNDERFLOW).all()
    assert squared_difference(actual[finite], expected[finite]) < 5e-6


def _absolute(name: str, x: object) -> object:
    if name in ("q", "k"):
        return (x.view(torch.uint8) & 0x7F).view(torch.float8_e4m3fn)
    if name == "weights":
        return x.abs()
    if name == "index_k_cache":
        values = x.clone()
        reference.index_page_parts(values)[0].bitwise_and_(0x7F)
        return values
    return x


# The error of one output entry, relative to the sum of the absolute values of its terms: bf16 rounds the weights and
# the result to 2^-8 each; float32 scores of a wide head are known to 1e-5 or so.
ATTENTION_ROUNDING = {torch.bfloat16: 2**-7, torch.float32: 1e-4}


def assert_attention(actual: tuple[Tensor, Tensor], q: Tensor, rows: reference.Rows, *arguments: object) -> None:
    """out and lse of ``reference.attend(q, rows, *arguments)`` against float64: bounds for every entry and for all."""
    out, lse = actual
    out64, lse64 = reference.attend(q, rows, *arguments)
    assert out.dtype == q.dtype and out.shape == out64.shape
    assert lse.dtype == torch.float32 and lse.shape == lse64.shape
    assert not out.isnan().any() and not lse.isnan().any()
    empty = lse64 == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert (out[empty] == 0).all()
    _assert_near(lse, lse64, absolute=1e-6, relative=2.01 / 65536)
    terms = _attention_terms(q, rows, *arguments)
    error = (out.double() - out64).abs()
    worst = float((error / terms).nan_to_num().max()) if error.numel() else 0.0
    assert (error <= ATTENTION_ROUNDING[q.dtype] * terms + UNDERFLOW).all(), f"off by {worst} of the terms"
    assert squared_difference(out, out64) < (7e-6 if q.dtype == torch.bfloat16 else 1e-10)


def _attention_terms(q: Tensor, rows: reference.Rows, keys: int, indices: Tensor, sm_scale: float, d_v: int, *rest):
    """``sum p |v|``: the same attention over rows that begin with the absolute values, which the scores do not see."""

    def absolute_first(entries: Tensor) -> Tensor:
        row = rows(entries)
        return torch.cat([row[..., :d_v].abs(), row], -1)

    q = torch.cat([q.new_zeros(*q.shape[:2], d_v), q], -1)
    return reference.attend(q, absolute_first, keys, indices, sm_scale, d_v, *rest)[0]


def _assert_near(actual: Tensor, expected: Tensor, *, absolute: float, relative: float) -> None:
    finite = expected.isfinite()
    actual, expected = actual.double()[finite], expected[finite]
    error = (actual - expected).abs()
    bad = (error > absolute) & (error > relative * expected.abs())
    assert not bad.any(), f"{int(bad.sum())} of {bad.numel()} differ: {actual[bad][:4]} for {expected[bad][:4]}"


def assert_quantized(
    values: Tensor, scale: Tensor, vector: Tensor, *, ue8m0: bool = False, exact: bool = False
) -> None:
    """e4m3 ``values`` and f32 ``scale`` against the float64 ``vector`` they stand for.

    A value must be as near to its quotient as the nearest e4m3 number, but for float32 rounding of what came before;
    with ``exact`` (nothing came before, the scale is a power of two) it must be that number, ties to even.
    """
    nearest, scale64 = reference.quantize(vector, ue8m0=ue8m0)
    assert values.dtype == torch.float8_e4m3fn and values.shape == vector.shape
    assert scale.shape == scale64.shape
    assert_scales(scale, scale64, exact=exact or ue8m0)
    finite = scale64.isfinite()
    assert (values.contiguous().view(torch.uint8)[~finite] == 0x7F).all()
    values, nearest = values[finite].double(), nearest[finite].double()
    if exact:
        assert torch.equal(values, nearest)
    quotient = vector.double()[finite] / scale64[finite][..., None]
    error, least = (values - quotient).abs(), (nearest - quotient).abs()
    assert (error <= least + 4e-6 * reference.E4M3_MAX).all()


def assert_scales(scale: Tensor, expected: Tensor, *, exact: bool = False) -> None:
    """f32 scales, or weights that hold them, against float64; NaN where a vector was not finite."""
    assert scale.dtype == torch.float32
    torch.testing.assert_close(
        scale.double(), expected.float().double(), rtol=0.0 if exact else 4e-6, atol=0.0, equal_nan=True
    )


class Guarded:
    """A result buffer of poison between two guards, so that a store outside it and a missing store are both seen."""

    POISON, GUARD = 0xA5, 256

    def __init__(self, like: Tensor):
        size = like.numel() * like.element_size()
        self._buffer = torch.full((size + 2 * self.GUARD,), self.POISON, dtype=torch.uint8, device=like.device)
        self.tensor = self._buffer[self.GUARD : self.GUARD + size].view(like.dtype).view(like.shape)

    def assert_intact(self) -> None:
        assert (self._buffer[: self.GUARD] == self.POISON).all()
        assert (self._buffer[-self.GUARD :] == self.POISON).all()


def run(op: str, arguments: dict, *, changes: str = "") -> Tensor | tuple[Tensor, ...]:
    """Calls an op by name and asserts that it left every argument but ``changes`` untouched."""
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor) and name != changes}
    returned = getattr(torch.ops.indexcache, op)(**arguments)
    for name, x in before.items():
        assert_same_bits(arguments[name], x)
    return returned


def assert_repeats(op: str, arguments: dict, expected: Tensor | tuple[Tensor, ...], times: int = 4) -> None:
    """The same bits from run to run."""
    for _ in range(times):
        for actual, first in zip(results(getattr(torch.ops.indexcache, op)(**arguments)), results(expected)):
            assert_same_bits(actual, first)


def take_rows(arguments: dict, names: str, rows: slice | Tensor) -> dict:
    """The arguments of a call with some of its rows; ``names`` lists the arguments that have them."""
    return {name: x[rows] if name in names.split() and x is not None else x for name, x in arguments.items()}


def assert_rows_do_not_mix(op: str, arguments: dict, names: str, expected: Tensor | tuple[Tensor, ...]) -> None:
    """A row has the same bits in the batch reversed and shuffled, and in a batch of nothing but that row."""
    rows = len(results(expected)[0])
    device = results(expected)[0].device
    orders = [torch.arange(rows - 1, -1, -1, device=device), torch.randperm(rows, device=device)]
    orders += [torch.full((rows,), row, device=device) for row in {0, rows // 2, rows - 1}]
    for order in orders:
        returned = getattr(torch.ops.indexcache, op)(**take_rows(arguments, names, order))
        for actual, whole in zip(results(returned), results(expected)):
            assert_same_bits(actual, whole[order])


def assert_rows_stand_alone(op: str, arguments: dict, names: str, expected: Tensor | tuple[Tensor, ...]) -> None:
    """A row has the same bits alone, in a part of the batch, and in the batch reversed."""
    rows = len(results(expected)[0])
    middle = slice(rows // 3, rows // 3 + 1)
    for part in (slice(0, 1), middle, slice(rows - 1, rows), slice(rows // 4, rows), torch.arange(rows - 1, -1, -1)):
        part = part.to(results(expected)[0].device) if isinstance(part, Tensor) else part
        returned = getattr(torch.ops.indexcache, op)(**take_rows(arguments, names, part))
        for actual, whole in zip(results(returned), results(expected)):
            assert_same_bits(actual, whole[part])


def assert_out_variant(op: str, arguments: dict, expected: Tensor | tuple[Tensor, ...]) -> None:
    """The out overload returns nothing and writes the same bits, all of them and no others."""
    names = ("out", "lse")[: len(results(expected))]
    buffers = {name: Guarded(result) for name, result in zip(names, results(expected))}
    outs = {name: buffer.tensor for name, buffer in buffers.items()}
    assert getattr(torch.ops.indexcache, op).out(**arguments, **outs) is None
    for name, result in zip(names, results(expected)):
        assert_same_bits(outs[name], result)
        buffers[name].assert_intact()


def some_rows(count: int, limit: int = 48) -> slice:
    """All rows, or about `limit` of them spread from the first to the last."""
    return slice(None) if count <= limit else slice((count - 1) % (count // limit), None, count // limit)
