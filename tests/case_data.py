"""Seeded data for the cases: what makes a kernel's life hard, by name."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
NAN_BYTE = 0xFF  # a NaN as e4m3 and, repeated, as float32 and bfloat16


class Data:
    """Seeded random tensors."""

    def __init__(self, seed: str, device: torch.device | str):
        self.device = device
        self.generator = torch.Generator(device).manual_seed(zlib.crc32(seed.encode()))

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device) * (high - low) + low

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """In [low, high)."""
        drawn = dtype if high <= INT_MAX else torch.int64  # int32 holds no bound past its last value
        return torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=drawn).to(dtype)

    def choice(self, values: list, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        table = torch.tensor(values, device=self.device, dtype=dtype)
        return table[self.integers(0, len(values), *shape)]

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator, device=self.device)

    def sprinkle(self, x: Tensor, values: list, share: float = 0.05) -> Tensor:
        """`x` with a share of its entries replaced by `values`."""
        hit = self.uniform(0, 1, *x.shape) < share
        return torch.where(hit, self.choice(values, *x.shape, dtype=x.dtype), x)

    def magnitudes(self, *shape: int, span: float = 30) -> Tensor:
        """Normal values times 10^-span ... 10^span."""
        return self.randn(*shape) * 10 ** self.uniform(-span, span, *shape)


def pad_rows(x: Tensor, extra: int, fill: float) -> Tensor:
    """The same values with `extra` entries of `fill` between the rows of the last dimension."""
    if extra == 0:
        return x
    wide = x.new_full((*x.shape[:-1], x.size(-1) + extra), fill)
    wide[..., : x.size(-1)] = x
    return wide[..., : x.size(-1)]


def empty_cache(pages: int, page_size: int, row_bytes: int, extra: int, device: torch.device | str) -> Tensor:
    """A paged cache of NaN bytes with `extra` bytes between its pages."""
    page_bytes = page_size * row_bytes
    flat = torch.full((pages, page_bytes + extra), NAN_BYTE, dtype=torch.uint8, device=device)
    return flat[:, :page_bytes].unflatten(1, (page_size, row_bytes))


# --- Windows ----------------------------------------------------------------------------------------------------------

WINDOWS = (
    "full", "causal", "sliding", "ragged", "zigzag", "empty", "inverted", "outside", "random", "extreme",
)  # fmt: skip


def windows(kind: str, rows: int, columns: int, data: Data) -> tuple[Tensor, Tensor]:
    """starts and ends int32 [rows] of one kind of query block over `columns` keys."""
    row = torch.arange(rows, device=data.device)
    zero = torch.zeros_like(row)
    last = columns - rows + row  # the position of each query of a chunk that ends with the context
    if kind == "full":
        pair = zero, zero + columns
    elif kind == "causal":
        pair = zero, last + 1
    elif kind == "sliding":
        pair = last - 32, last + 1  # the first rows start before the first key
    elif kind == "ragged":  # three requests packed in one batch, each causal over its own keys
        request = row * 3 // max(1, rows)
        begin = request * columns // 3
        pair = begin, begin + 1 + (row * columns // max(1, rows) - begin).clamp(min=0)
    elif kind == "zigzag":  # context parallel: a rank owns an early and a late chunk
        half = rows // 2
        position = torch.where(row < half, columns // 8 + row, columns - columns // 8 + row - half)
        pair = zero, position + 1
    elif kind == "empty":
        bound = data.integers(0, columns + 1, rows)
        pair = bound, bound
    elif kind == "inverted":
        bound = data.integers(1, columns + 2, rows)
        pair = bound, bound - data.integers(1, 9, rows)
    elif kind == "outside":
        pair = zero + columns, zero + columns + 8
    elif kind == "random":
        pair = data.integers(-columns // 4 - 1, columns + 1, rows), data.integers(0, columns + columns // 4 + 2, rows)
    elif kind == "extreme":
        bounds = [INT_MIN, INT_MIN + 1, -1, 0, 1, columns - 1, columns, columns + 1, INT_MAX - 1, INT_MAX]
        pair = data.choice(bounds, rows), data.choice(bounds, rows)
    else:
        raise ValueError(kind)
    return pair[0].int(), pair[1].int()


# --- Values -----------------------------------------------------------------------------------------------------------


def vectors(kind: str, shape: tuple[int, ...], data: Data) -> Tensor:
    if kind == "randn":
        return data.randn(*shape)
    if kind == "magnitudes":  # one magnitude per vector: from below the scale floor to far above e4m3
        return data.randn(*shape) * 10 ** data.uniform(-12, 12, *shape[:-1], 1)
    if kind == "zeros":
        return data.choice([0.0, -0.0], *shape)
    if kind == "outliers":
        return data.sprinkle(data.randn(*shape), [1e4, -1e4], 0.01)
    if kind == "nonfinite":
        return data.sprinkle(data.randn(*shape), [torch.nan, torch.inf, -torch.inf], 0.005)
    if kind == "powers":  # amax is 448 * 2^n, so a ue8m0 scale is exact; half of all values lie between two e4m3
        vector = data.choice([17.0, -17.0, 19.0, 1.0625, 448.0], *shape)
        vector[..., 0] = 448.0
        return vector * 2.0 ** data.integers(-8, 9, *shape[:-1], 1)
    raise ValueError(kind)


TOPK_VALUES = (
    "randn", "binade", "low_bits", "bits", "constant", "periodic", "rounded", "relu", "rare", "late_block", "ramp_up",
    "ramp_down", "zeros", "infinities", "nan", "all_nan", "all_minus_inf", "magnitudes", "subnormal", "huge",
    "relu_70", "packed", "comb_256", "gap_256",
)  # fmt: skip
# Normal data, and what slows selection down: a benchmark reports each shape on all of them.
TOPK_HARD = ("randn", "relu_70", "constant", "binade", "ramp_up", "ramp_down", "packed", "periodic")


def topk_values(kind: str, rows: int, columns: int, data: Data) -> Tensor:
    """float32 [rows, columns] of a distribution that some selection algorithm gets wrong or slow."""
    shape, column = (rows, columns), torch.arange(columns, device=data.device, dtype=torch.float32)
    if kind == "randn":
        return data.randn(*shape)
    if kind == "binade":  # all in a fraction of one binade
        return data.uniform(10.0, 10.2, *shape)
    if kind == "low_bits":  # differ in the last 10 bits only
        return (0x3F900000 | data.integers(0, 1024, *shape)).view(torch.float32)
    if kind == "bits":  # any bit pattern
        return data.integers(INT_MIN, INT_MAX + 1, *shape).view(torch.float32)
    if kind == "constant":
        return data.randn(rows, 1).expand(shape).contiguous()
    if kind == "periodic":
        return (column % 64 / 64).expand(shape).contiguous()
    if kind == "rounded":
        return (data.randn(*shape) * 4).round() / 4
    if kind == "relu":  # most are 0
        return (data.randn(*shape) - 1.28).relu()
    if kind == "rare":  # 100 winners among zeros
        return (data.uniform(0, 1, *shape) < 100 / max(1, columns)).float()
    if kind == "late_block":
        return (1.0 + (column >= columns - columns // 16)).expand(shape).contiguous()
    if kind in ("ramp_up", "ramp_down"):
        return (column / max(1, columns) * (1 if kind == "ramp_up" else -1)).expand(shape).contiguous()
    if kind == "zeros":
        return data.choice([0.0, -0.0], *shape)
    if kind == "infinities":
        return data.sprinkle(data.randn(*shape), [torch.inf, -torch.inf], 0.3)
    if kind == "nan":  # both signs and several payloads
        bits = [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -0x400000, -0x7FFFFF, -1]
        return data.sprinkle(data.randn(*shape).view(torch.int32), bits, 0.5).view(torch.float32)
    if kind == "all_nan":
        return torch.full(shape, torch.nan, device=data.device)
    if kind == "all_minus_inf":
        return torch.full(shape, -torch.inf, device=data.device)
    if kind == "magnitudes":
        return data.magnitudes(*shape, span=37)
    if kind == "subnormal":
        return data.integers(0, 1 << 23, *shape).view(torch.float32) * data.choice([1.0, -1.0], *shape)
    if kind == "huge":  # beyond half precision
        return data.randn(*shape) * 1e6
    if kind == "relu_70":  # 70 % are 0
        return (data.randn(*shape) - 0.5244).relu()
    if kind == "packed":  # the best 2048, or half of the row, lie side by side
        width = min(2048, columns // 2)
        first = data.integers(0, columns - width + 1, rows, 1)
        return data.randn(*shape).add_(((column >= first) & (column < first + width)) * 16.0)
    name, _, period = kind.partition("_")
    if name == "periodic" and period:
        return (column % int(period) / int(period)).expand(shape).contiguous()
    if name in ("comb", "gap") and period:  # samples at a stride see only the best, or none of them
        return data.randn(*shape).add_((column % int(period) < 8) * (8.0 if name == "comb" else -8.0))
    raise ValueError(kind)


def attention_values(kind: str, data: Data, *shape: int) -> Tensor:
    if kind == "randn":
        return data.randn(*shape)
    if kind == "offset":
        return data.randn(*shape) / 10 + 0.5
    if kind == "outliers":
        return data.sprinkle(data.randn(*shape), [30.0, -30.0], 0.01)
    if kind == "small":
        return data.randn(*shape) * 1e-4
    raise ValueError(kind)


def attention_indices(kind: str, tokens: int, k: int, keys: int, data: Data) -> Tensor:
    """int32 [tokens, k] entries over `keys` rows."""
    entries = data.integers(0, max(1, keys), tokens, k)
    if kind == "random":
        return entries
    if kind == "prefix":  # as top-k lists it: ascending, then -1
        count = data.integers(0, k + 1, tokens, 1)
        listed = torch.arange(k, device=data.device) < count
        return torch.where(listed, entries, INT_MAX).sort(-1).values.where(listed, -1)
    if kind == "sprinkled":
        return data.sprinkle(entries, [-1, keys, INT_MIN, INT_MAX], 0.2)
    if kind == "duplicates":
        return entries % 3
    if kind == "one_row":
        return torch.full_like(entries, max(0, keys - 1))
    if kind == "invalid":  # every other row sees nothing
        odd = torch.arange(tokens, device=data.device)[:, None] % 2 == 1
        return torch.where(odd, data.choice([-1, keys, INT_MIN, INT_MAX], tokens, k).int(), entries)
    if kind == "extreme":
        return data.choice([INT_MIN, INT_MIN + 1, -1, 0, keys - 1, keys, INT_MAX - 1, INT_MAX], tokens, k).int()
    if kind == "none":
        return torch.full_like(entries, -1)
    if kind in ("distinct", "ascending", "neighbours", "same"):
        return distinct_indices(kind, tokens, k, keys, data)
    if kind == "apart":  # eight neighbouring rows have nothing in common, if there are 8 k keys
        row, column = torch.arange(tokens, device=data.device)[:, None], torch.arange(k, device=data.device)
        return ((row % 8 + 8 * column) % max(1, keys)).int()
    raise ValueError(kind)


def distinct_indices(kind: str, tokens: int, k: int, keys: int, data: Data) -> Tensor:
    """Lists without a repeated entry, if there are k keys: entry j is one of those with remainder j by k."""
    row, column = torch.arange(tokens, device=data.device)[:, None], torch.arange(k, device=data.device)
    entries = data.integers(0, max(1, keys // max(1, k)), tokens, k) * k + column
    if kind == "distinct":  # in random order
        return entries.gather(1, data.uniform(0, 1, tokens, k).argsort(1)).int()
    share = {"ascending": 1.0, "neighbours": 0.1, "same": 0.0}[kind]  # of entries that the row before does not list
    since = torch.where(data.uniform(0, 1, tokens, k) < share, row, 0).cummax(0).values
    return entries.gather(0, since).sort(1).values.int()


INDICES = (
    "random", "prefix", "sprinkled", "duplicates", "one_row", "invalid", "extreme", "none", "distinct", "ascending",
    "neighbours", "same", "apart",
)  # fmt: skip
