"""What a case is: one frozen dataclass per family of ops, with shapes, dtype, options and the kind of data.

The `id` of a case is stable and seeds its data, so that a failure is repeated by its id alone. `make(device)` gives the
arguments of the op by name.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from case_data import (
    INT_MAX,
    INT_MIN,
    Data,
    attention_indices,
    attention_values,
    empty_cache,
    pad_rows,
    topk_values,
    vectors,
    windows,
)

from indexcache_ext import reference


@dataclass(frozen=True, kw_only=True)
class Case:
    large: bool = False

    @property
    def id(self) -> str:
        """The fields that are not at their default, in order."""
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "large":
                parts += ["large"] * value
            elif value != field.default:
                parts.append(f"{field.name}={_spell(value)}")
        return ",".join(parts) or "default"

    def data(self, device: torch.device | str) -> Data:
        """Small cases draw on the CPU, so that both devices see the same values; large ones where they are needed."""
        return Data(self.id, device if self.large else "cpu")


def _spell(value: object) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return str(value).removeprefix("torch.").replace(str(INT_MIN), "min").replace(str(INT_MAX), "max")


# --- Quantisation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class QuantizeCase(Case):
    """An index query (with heads) or key (heads 0) on its way to e4m3, with slots of the cache it may be stored in."""

    tokens: int = 37
    heads: int = 0
    dim: int = 128
    rot: int = 64  # 0: no RoPE
    dtype: torch.dtype = torch.bfloat16
    int_dtype: torch.dtype = torch.int32
    norm: str = "none"  # none, weight, bias
    interleaved: bool = False
    hadamard: bool = False
    ue8m0: bool = False
    values: str = "randn"  # randn, magnitudes, zeros, outliers, nonfinite, powers
    positions: str = "inside"  # inside, extreme
    pages: int = 3
    page_extra: int = 0

    def make(self, device: torch.device | str) -> dict:
        data = self.data(device)
        shape = (self.tokens, self.heads, self.dim) if self.heads else (self.tokens, self.dim)
        x = vectors(self.values, shape, data).to(self.dtype)
        arguments = {"q": x, "weights": data.randn(self.tokens, self.heads)} if self.heads else {"k": x}
        if not self.heads:
            weight, bias = data.randn(self.dim), data.randn(self.dim)
            arguments |= {"norm_weight": None if self.norm == "none" else weight}
            arguments |= {"norm_bias": bias if self.norm == "bias" else None}
        max_position = 4 * self.tokens + 3
        angle = data.uniform(-3.15, 3.15, max_position, self.rot // 2)
        positions = data.integers(0, max_position, self.tokens)
        if self.positions == "extreme":
            positions = data.sprinkle(positions, [INT_MIN, -1, max_position, INT_MAX], 0.4)
        rotates = self.rot > 0
        arguments |= {"cos_sin": torch.cat([angle.cos(), angle.sin()], 1) if rotates else None}
        arguments |= {"positions": positions.to(self.int_dtype) if rotates else None}
        arguments = {name: x if x is None else x.to(device) for name, x in arguments.items()}
        arguments |= {"interleaved": self.interleaved, "hadamard": self.hadamard, "ue8m0": self.ue8m0}
        return arguments | ({"scale": self.dim**-0.5} if self.heads else {})

    def cache(self, device: torch.device | str) -> dict:
        """slots and index_k_cache for `store_index_k`: distinct slots, some outside the cache."""
        data = self.data(device)
        slots = data.permutation(max(self.tokens, self.pages * 64))[: self.tokens].to(self.int_dtype)
        slots = data.sprinkle(slots, [INT_MIN, -1, self.pages * 64, INT_MAX], 0.2)
        return {
            "slots": slots.to(device),
            "index_k_cache": empty_cache(self.pages, 64, self.dim + 4, self.page_extra, device),
        }


@dataclass(frozen=True, kw_only=True)
class LatentCase(Case):
    """Latent rows into the 656-byte cache and back."""

    tokens: int = 41
    page_size: int = 64
    pages: int = 5
    dtype: torch.dtype = torch.bfloat16
    int_dtype: torch.dtype = torch.int32
    values: str = "randn"
    row_extra: int = 0
    page_extra: int = 0

    def make(self, device: torch.device | str) -> dict:
        data = self.data(device)
        room = self.pages * self.page_size
        kv = vectors(self.values, (self.tokens, 576), data).to(self.dtype)
        slots = data.permutation(max(self.tokens, room))[: self.tokens].to(self.int_dtype)
        slots = data.sprinkle(slots, [INT_MIN, -1, room, INT_MAX], 0.2)
        return {
            "kv": pad_rows(kv.to(device), self.row_extra, torch.nan),
            "slots": slots.to(device),
            "kv_cache": empty_cache(self.pages, self.page_size, 656, self.page_extra, device),
        }


# --- Indexer ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class IndexerCase(Case):
    """Index queries over a dense index-key array; `topk` is for the fused selection."""

    tokens: int = 9
    keys: int = 131
    heads: int = 8
    dim: int = 128
    windows: str = "causal"
    values: str = "randn"  # randn, magnitudes, zeros, nan
    topk: int = 64

    def make(self, device: torch.device | str) -> dict:
        data = self.data(device)
        q = data.randn(self.tokens, self.heads, self.dim).to(torch.float8_e4m3fn)
        k8, k_scale = reference.quantize(data.randn(self.keys, self.dim))
        k_scale, weights = k_scale.float(), data.randn(self.tokens, self.heads)
        if self.values == "magnitudes":
            k_scale = k_scale * data.magnitudes(self.keys, span=12).abs()
            weights = data.magnitudes(*weights.shape, span=12)
        elif self.values == "zeros":
            weights = data.choice([0.0, -0.0], *weights.shape)
        elif self.values == "nan":  # as the quantisation ops write for a vector that is not finite
            k_scale, weights = data.sprinkle(k_scale, [torch.nan]), data.sprinkle(weights, [torch.nan], 0.02)
        starts, ends = windows(self.windows, self.tokens, self.keys, data)
        arguments = {"q": q, "k": k8, "k_scale": k_scale, "weights": weights, "starts": starts, "ends": ends}
        return {name: x.to(device) for name, x in arguments.items()}


@dataclass(frozen=True, kw_only=True)
class PagedIndexerCase(Case):
    """Index queries of several requests over the paged cache; unused cache rows hold NaN bytes."""

    lengths: tuple[int, ...] = (200, 65, 64, 1)  # keys visible to the last query of each request
    queries: int = 1  # per request; an earlier query sees one key less
    heads: int = 8
    dim: int = 128
    max_context_len: int = 200
    table_pages: int = 4
    spare_pages: int = 3
    holes: bool = False  # some table entries name no page
    page_extra: int = 0
    topk: int = 64

    def make(self, device: torch.device | str) -> dict:
        data = self.data(device)
        batch = len(self.lengths)
        pages = batch * self.table_pages + self.spare_pages
        table = data.permutation(pages)[: batch * self.table_pages].view(batch, self.table_pages).int()
        length = torch.tensor(self.lengths, device=data.device)
        step = torch.arange(self.queries, device=data.device)
        lens = (length[:, None] - self.queries + 1 + step).clamp(INT_MIN, INT_MAX).int()
        cache = empty_cache(pages, 64, self.dim + 4, self.page_extra, data.device)
        position = torch.arange(self.table_pages * 64, device=data.device)
        slots = (table.long()[:, position // 64] * 64 + position % 64)[position < length[:, None]]
        reference.store_index_k(data.randn(len(slots), self.dim), None, None, None, None, slots, cache)
        if self.holes:
            table = data.sprinkle(table, [INT_MIN, -1, pages, INT_MAX], 0.3)
        device_cache = empty_cache(pages, 64, self.dim + 4, self.page_extra, device)
        device_cache.copy_(cache)
        arguments = {
            "q": data.randn(batch, self.queries, self.heads, self.dim).to(torch.float8_e4m3fn),
            "weights": data.randn(batch, self.queries, self.heads),
            "context_lens": lens,
            "block_table": table,
        }
        arguments = {name: x.to(device) for name, x in arguments.items()}
        return arguments | {"index_k_cache": device_cache, "max_context_len": self.max_context_len}


@dataclass(frozen=True, kw_only=True)
class TopkCase(Case):
    """Selection among given logits, float32 or bfloat16."""

    rows: int = 7
    columns: int = 1003
    k: int = 64
    windows: str = "random"
    values: str = "randn"
    row_extra: int = 0
    dtype: torch.dtype = torch.float32

    def make(self, device: torch.device | str) -> dict:
        data = self.data(device)
        logits = topk_values(self.values, self.rows, self.columns, data).to(device).to(self.dtype)
        starts, ends = windows(self.windows, self.rows, self.columns, data)
        return {
            "logits": pad_rows(logits, self.row_extra, 1e9),  # what lies between two rows must not be selected
            "starts": starts.to(device),
            "ends": ends.to(device),
            "k": self.k,
        }


def slot_table(
    data: Data, rows: int, requests: int, table_pages: int, page_size: int, pages: int, device: torch.device | str
) -> dict:
    """The arguments of a translation but the positions: a table that names [-2, pages), rows of no request."""
    request = data.integers(0, max(1, requests), rows)
    request = data.sprinkle(request, [INT_MIN, -1, requests, INT_MAX], 0.2)
    table = data.integers(-2, pages, requests, table_pages)
    return {"block_table": table.to(device), "requests": request.to(device), "page_size": page_size}


@dataclass(frozen=True, kw_only=True)
class TopkSlotsCase(TopkCase):
    """Selection among given logits, as slots of a cache."""

    requests: int = 3
    table_pages: int = 20
    page_size: int = 64
    pages: int = 100  # the table names [-2, pages)

    def make(self, device: torch.device | str) -> dict:
        table = (self.rows, self.requests, self.table_pages, self.page_size, self.pages)
        return super().make(device) | slot_table(self.data(device), *table, device)


@dataclass(frozen=True, kw_only=True)
class SlotsCase(Case):
    """Positions inside requests to slots of a cache."""

    tokens: int = 13
    k: int = 67
    requests: int = 4
    table_pages: int = 5
    page_size: int = 64
    pages: int = 100  # the table names [-2, pages)

    def make(self, device: torch.device | str) -> dict:
        data = self.data(device)
        room = min(max(1, self.table_pages * self.page_size), INT_MAX - 1)
        indices = data.integers(-1, room, self.tokens, self.k)
        indices = data.sprinkle(indices, [INT_MIN, -2, -1, room, room + 1, INT_MAX], 0.2)
        table = (self.tokens, self.requests, self.table_pages, self.page_size, self.pages)
        return {"indices": indices.to(device)} | slot_table(data, *table, device)


# --- Attention --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """Sparse attention over a dense kv (page_size 0) or over the paged 656-byte cache."""

    tokens: int = 5
    heads: int = 8
    keys: int = 300
    k: int = 64
    d_qk: int = 576
    d_v: int = 512
    page_size: int = 0
    dtype: torch.dtype = torch.bfloat16
    indices: str = "sprinkled"
    values: str = "randn"  # randn, offset, outliers, small
    sm_scale: float = 0.05
    sink: str = ""  # "", randn, extreme
    lengths: bool = False
    q_extra: int = 0
    row_extra: int = 0
    page_extra: int = 0

    def make(self, device: torch.device | str) -> dict:
        data = self.data(device)
        paged = self.page_size > 0
        keys = self.keys // self.page_size * self.page_size if paged else self.keys
        entries = attention_indices(self.indices, self.tokens, self.k, keys, data)
        q = attention_values(self.values, data, self.tokens, self.heads, self.d_qk).to(self.dtype)
        kv = attention_values(self.values, data, keys, self.d_qk).to(self.dtype)
        used = torch.zeros(keys + 1, dtype=torch.bool, device=data.device)
        used[torch.where((entries >= 0) & (entries < keys), entries, keys).long().flatten()] = True
        used = used[:keys]
        arguments = {"q": pad_rows(q.to(device), self.q_extra, torch.nan)}
        if paged:
            cache = empty_cache(keys // self.page_size, self.page_size, 656, self.page_extra, device)
            rows = used.nonzero().squeeze(1).to(device)  # the others keep their NaN bytes
            reference.store_latent_kv(kv.to(device)[rows], rows, cache)
            arguments |= {"kv_cache": cache, "slots": entries.to(device)}
        else:
            kv = kv.masked_fill(~used[:, None], torch.nan)
            arguments |= {"kv": pad_rows(kv.to(device), self.row_extra, torch.nan), "indices": entries.to(device)}
            arguments |= {"d_v": self.d_v}
        arguments |= {"sm_scale": self.sm_scale}
        if self.sink:
            sink = data.randn(self.heads) * 3
            if self.sink == "extreme":
                sink = data.sprinkle(sink, [torch.inf, -torch.inf, 200.0, -200.0], 0.7)
            arguments["sink"] = sink.to(device)
        if self.lengths:
            lengths = data.choice([INT_MIN, -1, 0, 1, self.k // 2, self.k - 1, self.k, INT_MAX], self.tokens)
            arguments["lengths"] = lengths.int().to(device)
        return arguments
