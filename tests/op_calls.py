"""One or two small calls of every op, for tests of bindings rather than of arithmetic."""

from __future__ import annotations

import torch
from case_types import (
    AttentionCase,
    Case,
    IndexerCase,
    LatentCase,
    PagedIndexerCase,
    QuantizeCase,
    SlotsCase,
    TopkCase,
    TopkSlotsCase,
)
from torch import Tensor

from indexcache_ext import reference

_KEYS = QuantizeCase(tokens=9, dim=64, rot=32, norm="bias", interleaved=True, hadamard=True, pages=2)
_LATENT = LatentCase(tokens=7, page_size=5, pages=3)
_INDEXER = IndexerCase(tokens=6, keys=70, heads=3, dim=64, windows="ragged", topk=16)
_PAGED = PagedIndexerCase(
    lengths=(130, 65), queries=2, heads=3, dim=64, max_context_len=140, table_pages=3, spare_pages=1, topk=16
)

CALLS: tuple[tuple[str, Case], ...] = (
    ("quantize_index_q", QuantizeCase(tokens=5, heads=3, dim=64, rot=32, hadamard=True, ue8m0=True)),
    ("quantize_index_q", QuantizeCase(tokens=5, heads=3, dim=48, rot=0, dtype=torch.float32)),
    ("quantize_index_k", _KEYS),
    ("quantize_index_k", QuantizeCase(tokens=9, dim=48, rot=0, dtype=torch.float32)),
    ("store_index_k", _KEYS),
    ("gather_index_k", _KEYS),
    ("store_latent_kv", _LATENT),
    ("gather_latent_kv", _LATENT),
    ("indexer_logits", _INDEXER),
    ("indexer_logits_paged", _PAGED),
    ("topk", TopkCase(rows=5, columns=100, k=12, windows="causal", values="rounded")),
    ("topk", TopkCase(rows=5, columns=100, k=130, row_extra=3)),  # k past the window, padded rows
    ("topk", TopkCase(rows=5, columns=100, k=12, dtype=torch.bfloat16)),
    ("topk_to_slots", TopkSlotsCase(rows=5, columns=100, k=12, windows="causal", table_pages=9, page_size=11)),
    ("topk_to_slots", TopkSlotsCase(rows=5, columns=100, k=130, table_pages=2, dtype=torch.bfloat16)),
    ("topk_reads", TopkCase(rows=5, columns=100, k=12, windows="causal", values="rounded")),
    ("topk_reads", TopkCase(rows=5, columns=3000, k=12, dtype=torch.bfloat16)),
    ("indexer_topk", _INDEXER),
    ("indexer_topk_paged", _PAGED),
    ("to_slots", SlotsCase(tokens=6, k=11, requests=3)),
    ("sparse_mla", AttentionCase(tokens=4, heads=3, keys=50, k=20, d_qk=96, d_v=64, sink="randn", lengths=True)),
    ("sparse_mla", AttentionCase(tokens=4, heads=3, keys=50, k=20, d_qk=40, d_v=24, dtype=torch.float32)),
    ("sparse_mla_paged", AttentionCase(tokens=4, heads=3, keys=60, k=20, page_size=5, sink="randn", lengths=True)),
    ("sparse_mla_paged", AttentionCase(tokens=4, heads=2, keys=64, k=9, page_size=64)),
)
IDS = [f"{name}-{i}" for i, (name, _) in enumerate(CALLS)]

# Its result tells of the kernel, and may be the same for other inputs.
DIAGNOSTIC = "topk_reads"
MUTATED = {"store_index_k": "index_k_cache", "store_latent_kv": "kv_cache"}


def arguments(name: str, case: Case, device: torch.device | str) -> dict:
    """The arguments of the op by name, as the schema has them. Caches that are read hold stored rows."""
    call = case.make(device)
    if name in ("store_index_k", "gather_index_k"):
        call |= case.cache(device)
    if name == "gather_index_k":
        reference.store_index_k(**call)
    elif name == "gather_latent_kv":
        reference.store_latent_kv(**call)
    elif name in ("indexer_topk", "indexer_topk_paged"):
        call["topk"] = case.topk
    packet = getattr(torch.ops.indexcache, name)
    return {a.name: call[a.name] for a in packet.default._schema.arguments if a.name in call}


def outcome(name: str, call: dict) -> tuple[Tensor, ...]:
    """Run the op and return its results, or the cache that it wrote."""
    results = getattr(torch.ops.indexcache, name).default(**call)
    if name in MUTATED:
        return (call[MUTATED[name]],)
    return results if isinstance(results, tuple) else (results,)


def has_out(name: str) -> bool:
    return "out" in getattr(torch.ops.indexcache, name).overloads()


def buffers(results: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Buffers for the out overload, full of a value that no op leaves behind."""
    return {name: torch.full_like(result, -7) for name, result in zip(("out", "lse"), results)}
