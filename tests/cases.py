"""The cases of every op, written once: correctness tests, benchmarks and the support table read the same lists.

Cases with `large` need gigabytes and run on a GPU only: they pass 2^31 in some offset or 65,535 in some grid dimension.
"""

from __future__ import annotations

import torch
from case_data import INDICES, INT_MAX, INT_MIN, TOPK_VALUES, WINDOWS
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

QUANTIZE_Q = (
    QuantizeCase(heads=1),
    QuantizeCase(heads=20, dtype=torch.float32),
    QuantizeCase(heads=32, interleaved=True, hadamard=True, int_dtype=torch.int64),
    QuantizeCase(heads=64, tokens=3, ue8m0=True),
    QuantizeCase(heads=3, tokens=130, rot=0, values="powers", ue8m0=True),
    QuantizeCase(heads=3, tokens=130, rot=0, values="powers", dtype=torch.float32),
    QuantizeCase(heads=8, values="magnitudes", dtype=torch.float32, ue8m0=True),
    QuantizeCase(heads=8, values="magnitudes", rot=128),
    QuantizeCase(heads=8, values="nonfinite"),
    QuantizeCase(heads=8, values="zeros"),
    QuantizeCase(heads=8, values="outliers", hadamard=True, dtype=torch.float32),
    QuantizeCase(heads=4, positions="extreme", int_dtype=torch.int64),
    QuantizeCase(heads=4, positions="extreme", interleaved=True, dtype=torch.float32),
    QuantizeCase(heads=70, tokens=5, rot=0, hadamard=True),
    QuantizeCase(heads=5, dim=64, rot=32, interleaved=True, hadamard=True),
    QuantizeCase(heads=5, dim=64, rot=2, hadamard=True),
    QuantizeCase(heads=5, dim=7, rot=6, dtype=torch.float32),
    QuantizeCase(heads=2, dim=1, rot=0, hadamard=True),
    QuantizeCase(heads=2, dim=256, rot=64, hadamard=True, interleaved=True),
    QuantizeCase(heads=4, tokens=0),
    QuantizeCase(heads=70, tokens=2100, hadamard=True, large=True),
    QuantizeCase(heads=2, tokens=70_000, large=True),
)

QUANTIZE_K = (
    QuantizeCase(),
    QuantizeCase(norm="weight", dtype=torch.float32),
    QuantizeCase(norm="bias", interleaved=True, hadamard=True, int_dtype=torch.int64),
    QuantizeCase(norm="bias", ue8m0=True, page_extra=64),
    QuantizeCase(norm="bias", values="outliers", dtype=torch.float32, rot=128),
    QuantizeCase(norm="bias", values="nonfinite"),
    QuantizeCase(norm="weight", values="zeros"),
    QuantizeCase(norm="bias", positions="extreme", int_dtype=torch.int64),
    QuantizeCase(tokens=300, values="powers", rot=0, ue8m0=True, pages=5),
    QuantizeCase(tokens=300, values="powers", rot=0, pages=4),
    QuantizeCase(tokens=200, values="magnitudes", dtype=torch.float32, pages=4, page_extra=64),
    QuantizeCase(values="nonfinite", rot=0, hadamard=True),
    QuantizeCase(dim=64, rot=32, norm="bias", hadamard=True),
    QuantizeCase(dim=64, rot=32, interleaved=True, dtype=torch.float32),
    QuantizeCase(dim=7, rot=4, dtype=torch.float32, norm="weight", page_extra=1),
    QuantizeCase(dim=256, norm="bias", interleaved=True),
    QuantizeCase(tokens=0),
    QuantizeCase(pages=0),
    QuantizeCase(tokens=70_000, pages=1100, norm="bias", large=True),
    QuantizeCase(tokens=4096, pages=260_000, large=True),
)

LATENT = (
    LatentCase(),
    LatentCase(page_size=1, pages=60, int_dtype=torch.int64),
    LatentCase(page_size=2, pages=23, dtype=torch.float32, row_extra=1),
    LatentCase(page_size=61, pages=1, row_extra=64, page_extra=16),
    LatentCase(values="magnitudes"),
    LatentCase(values="magnitudes", dtype=torch.float32),
    LatentCase(values="nonfinite"),
    LatentCase(values="outliers", page_extra=656),
    LatentCase(page_extra=1),
    LatentCase(values="zeros"),
    LatentCase(tokens=0),
    LatentCase(pages=0),
    LatentCase(tokens=5000, page_size=64, pages=52_000, large=True),
    LatentCase(tokens=70_000, pages=1100, large=True),
)

INDEXER = (
    *(IndexerCase(heads=heads) for heads in (1, 8, 16, 20, 32, 64, 128)),
    *(IndexerCase(tokens=33, keys=259, windows=kind) for kind in WINDOWS),
    *(IndexerCase(tokens=5, keys=keys, windows="random") for keys in (1, 3, 4, 63, 64, 65, 255, 256, 1027)),
    *(IndexerCase(tokens=tokens, keys=301, heads=16, windows="ragged") for tokens in (1, 2, 64, 67, 130)),
    *(IndexerCase(dim=dim, heads=3) for dim in (1, 7, 16, 40, 64, 96, 256)),
    *(
        IndexerCase(values=values, heads=heads, windows="full")
        for heads in (8, 20, 32, 64)
        for values in ("magnitudes", "zeros", "nan")
    ),
    IndexerCase(tokens=19, keys=900, heads=64, windows="random"),  # several tiles, and a block of too few queries
    IndexerCase(tokens=1, keys=9001, heads=32, windows="full"),  # one query for all SMs
    IndexerCase(tokens=0),
    IndexerCase(keys=0, windows="full"),
    IndexerCase(heads=0),
    IndexerCase(topk=1),
    IndexerCase(tokens=24, keys=3011, heads=32, topk=2048),  # a context longer than the selection
    IndexerCase(tokens=6, keys=2600, heads=64, topk=2051, windows="full"),
    IndexerCase(tokens=16_400, keys=131_075, heads=1, topk=2048, large=True),
    IndexerCase(tokens=70_000, keys=515, heads=8, windows="random", large=True),
)

PAGED_INDEXER = (
    PagedIndexerCase(),
    *(PagedIndexerCase(heads=heads, queries=2) for heads in (1, 16, 20, 32, 64, 128)),
    *(PagedIndexerCase(queries=queries, heads=heads) for heads in (16, 32, 64) for queries in (1, 3, 4)),
    PagedIndexerCase(lengths=(0, -7, INT_MIN, 3)),
    PagedIndexerCase(lengths=(INT_MAX, 1000, 256, 257), max_context_len=300),  # longer than table and columns
    PagedIndexerCase(lengths=(256, 255, 100), holes=True, max_context_len=256, table_pages=4),
    *(
        PagedIndexerCase(lengths=(1280, 1000), holes=True, heads=64, queries=q, max_context_len=1280, table_pages=20)
        for q in (1, 2)
    ),
    PagedIndexerCase(lengths=(256, 130), holes=True, queries=4, page_extra=64, spare_pages=1),
    PagedIndexerCase(lengths=(90, 128), max_context_len=37, page_extra=256),
    PagedIndexerCase(lengths=(90, 128), dim=64, page_extra=3),
    PagedIndexerCase(lengths=(90, 128), dim=7, page_extra=4),
    PagedIndexerCase(lengths=(90, 128), dim=40, heads=3),
    PagedIndexerCase(lengths=(3000, 2049, 2048), table_pages=47, max_context_len=3008, topk=2048, heads=32),
    PagedIndexerCase(lengths=(50,), max_context_len=0),
    PagedIndexerCase(lengths=(50,), table_pages=0, spare_pages=1),
    PagedIndexerCase(lengths=(50,), queries=0),
    PagedIndexerCase(lengths=(), table_pages=2),
    PagedIndexerCase(lengths=(9000, 70), table_pages=150, max_context_len=9000, spare_pages=260_000, large=True),
)

# Rounding to bfloat16 makes ties of neighbours, zeros of what is small and infinities of what is large.
BF16_VALUES = (
    "randn", "binade", "bits", "rounded", "relu", "late_block", "zeros", "infinities", "nan", "magnitudes", "subnormal",
    "huge", "packed", "gap_256",
)  # fmt: skip

TOPK = (
    *(TopkCase(values=values, columns=5003, k=512) for values in TOPK_VALUES),
    *(TopkCase(values=values, columns=777, windows="full", k=300) for values in ("zeros", "nan", "infinities", "bits")),
    *(TopkCase(rows=65, columns=777, windows=kind) for kind in WINDOWS),
    *(TopkCase(columns=n, k=64, windows="full") for n in (1, 2, 3, 4, 5, 63, 64, 65, 1023, 1024, 1025)),
    *(TopkCase(columns=n, k=2048, windows="full", rows=3) for n in (2047, 2048, 2049, 8191, 8192, 8193, 16_385)),
    *(TopkCase(k=k, columns=4099, rows=5) for k in (1, 2, 63, 64, 512, 2048, 2051, 5000)),
    *(TopkCase(row_extra=extra, columns=1001) for extra in (1, 2, 3, 7)),
    TopkCase(rows=1, columns=65_537, k=2048, windows="full"),
    TopkCase(rows=2, columns=65_537, k=2048, windows="full", values="rounded"),
    TopkCase(rows=300, columns=100, k=10),
    *(TopkCase(values=values, columns=5003, k=512, dtype=torch.bfloat16) for values in BF16_VALUES),
    *(TopkCase(columns=1001, row_extra=extra, dtype=torch.bfloat16) for extra in (0, 1, 2, 3, 7)),
    *(TopkCase(columns=n, k=64, windows="full", dtype=torch.bfloat16) for n in (1, 7, 8, 9, 63, 65, 1025)),
    *(TopkCase(columns=n, k=2048, windows="full", rows=3, dtype=torch.bfloat16) for n in (2047, 2049, 8192, 16_385)),
    *(TopkCase(k=k, columns=4099, rows=5, row_extra=1, dtype=torch.bfloat16) for k in (1, 2051, 5000)),
    TopkCase(rows=1, columns=65_537, k=2048, windows="full", dtype=torch.bfloat16),
    TopkCase(rows=0),
    TopkCase(columns=0),
    TopkCase(rows=100_000, columns=257, large=True),
    TopkCase(rows=2, columns=1 << 23, k=2048, windows="full", values="rounded", large=True),
    TopkCase(rows=8200, columns=262_147, k=512, large=True),
    # Rows that several blocks share, and rows that one block samples: every distribution that could mislead a sample.
    *(TopkCase(rows=3, columns=140_003, k=2048, values=values, large=True) for values in TOPK_VALUES),
    *(TopkCase(rows=200, columns=20_011, k=700, values=values, windows="full", large=True) for values in TOPK_VALUES),
    *(TopkCase(rows=2, columns=columns, k=2048, windows="full", large=True) for columns in (4096, 4097, 8191, 8193, 16_385)),
    *(
        TopkCase(rows=rows, columns=columns, k=k, values=values, row_extra=extra, dtype=torch.bfloat16, large=True)
        for rows, columns, k, extra in ((3, 140_003, 2048, 1), (200, 20_011, 700, 0))
        for values in BF16_VALUES
    ),
    TopkCase(rows=2, columns=1 << 23, k=2048, windows="full", dtype=torch.bfloat16, large=True),
    TopkCase(rows=17_000, columns=262_147, k=512, dtype=torch.bfloat16, large=True),
)

TOPK_TO_SLOTS = (
    *(TopkSlotsCase(page_size=page_size, table_pages=1003 // page_size + 1) for page_size in (1, 2, 61, 64, 1003)),
    *(TopkSlotsCase(table_pages=pages) for pages in (1, 8)),  # shorter than the row
    *(TopkSlotsCase(rows=33, windows=kind) for kind in ("empty", "inverted", "extreme", "full", "causal")),
    *(TopkSlotsCase(values=values) for values in ("constant", "nan", "all_nan", "infinities")),
    *(TopkSlotsCase(k=k, columns=4099, table_pages=70) for k in (1, 2048, 2051, 5000)),
    *(TopkSlotsCase(dtype=torch.bfloat16, row_extra=extra, page_size=61) for extra in (0, 1)),
    TopkSlotsCase(pages=INT_MAX),  # slots past 2^31 - 1
    TopkSlotsCase(page_size=1 << 30, pages=3, table_pages=2),
    TopkSlotsCase(page_size=1 << 62),
    TopkSlotsCase(rows=0),
    TopkSlotsCase(columns=0),
    TopkSlotsCase(requests=0),
    TopkSlotsCase(table_pages=0),
    TopkSlotsCase(rows=2, columns=65_537, k=2048, windows="full", table_pages=1025),
    TopkSlotsCase(rows=2, columns=65_537, k=2048, windows="full", table_pages=1025, dtype=torch.bfloat16),
    TopkSlotsCase(rows=3, columns=140_003, k=2048, table_pages=2188, large=True),
    TopkSlotsCase(rows=200, columns=20_011, k=700, table_pages=300, values="rounded", dtype=torch.bfloat16, large=True),
    TopkSlotsCase(rows=2, columns=1 << 23, k=2048, windows="full", page_size=1, table_pages=1 << 23, large=True),
    TopkSlotsCase(rows=100_000, columns=257, large=True),
)

TO_SLOTS = (
    *(SlotsCase(page_size=page_size) for page_size in (1, 2, 61, 64)),
    *(SlotsCase(k=k, tokens=40) for k in (0, 1, 63, 64, 2048, 2051)),
    SlotsCase(page_size=64, pages=INT_MAX),  # slots past 2^31 - 1
    SlotsCase(page_size=1 << 30, pages=3, table_pages=2),
    SlotsCase(page_size=1 << 62),
    SlotsCase(tokens=0),
    SlotsCase(requests=0),
    SlotsCase(table_pages=0),
    SlotsCase(tokens=70_000, k=31_000, large=True),
)

_SMALL_DIMS = ((512, 512), (576, 576), (64, 64), (40, 24), (7, 3), (1, 1), (192, 128))

SPARSE_MLA = (
    *(AttentionCase(heads=heads) for heads in (1, 8, 16, 20, 32, 40, 64, 96, 128)),
    *(AttentionCase(k=k, keys=777, tokens=3) for k in (0, 1, 63, 65, 2048, 2051, 2176)),
    *(AttentionCase(indices=kind, tokens=7) for kind in INDICES),
    *(AttentionCase(d_qk=d_qk, d_v=d_v, dtype=torch.float32, heads=3) for d_qk, d_v in _SMALL_DIMS),
    *(AttentionCase(d_qk=d_qk, d_v=d_v, heads=5) for d_qk, d_v in _SMALL_DIMS),
    *(AttentionCase(values=values, sm_scale=0.5) for values in ("randn", "offset", "outliers", "small")),
    AttentionCase(values="outliers", dtype=torch.float32),
    AttentionCase(sink="randn", lengths=True, tokens=17),
    AttentionCase(sink="extreme", indices="invalid", heads=20),
    AttentionCase(lengths=True, indices="invalid", dtype=torch.float32, tokens=17),
    AttentionCase(q_extra=8, row_extra=8, sink="randn"),
    AttentionCase(q_extra=1, row_extra=3, d_qk=40, d_v=33),
    AttentionCase(tokens=3, heads=64, keys=4099, k=2048, indices="prefix"),
    AttentionCase(keys=0),
    AttentionCase(keys=1, k=2051),
    AttentionCase(tokens=0),
    AttentionCase(heads=0),
    AttentionCase(tokens=70_000, heads=2, keys=4096, large=True),
    AttentionCase(tokens=16, heads=16, keys=3_730_000, k=512, large=True),
)

SPARSE_MLA_PAGED = (
    *(AttentionCase(page_size=page_size) for page_size in (1, 2, 61, 64)),
    *(AttentionCase(page_size=64, heads=heads) for heads in (1, 16, 20, 32, 64, 128)),
    *(AttentionCase(page_size=64, k=k, tokens=3, keys=832) for k in (0, 1, 63, 2048, 2051)),
    *(AttentionCase(page_size=61, indices=kind, tokens=7) for kind in INDICES),
    AttentionCase(page_size=64, dtype=torch.float32, sm_scale=0.5),
    AttentionCase(page_size=64, values="outliers"),
    AttentionCase(page_size=64, values="small"),
    AttentionCase(page_size=64, sink="extreme", lengths=True, tokens=17),
    AttentionCase(page_size=61, sink="randn", page_extra=64, q_extra=8),
    AttentionCase(page_size=2, page_extra=1),
    AttentionCase(page_size=64, keys=0),
    AttentionCase(page_size=64, tokens=0),
    AttentionCase(page_size=64, tokens=3, heads=64, keys=4096, k=2048, indices="prefix"),
    AttentionCase(page_size=64, tokens=70_000, heads=1, keys=4096, large=True),
    AttentionCase(page_size=64, tokens=16, heads=16, keys=3_300_032, k=512, large=True),
)

CASES: dict[str, tuple[Case, ...]] = {
    "quantize_index_q": QUANTIZE_Q,
    "quantize_index_k": QUANTIZE_K,
    "store_index_k": QUANTIZE_K,
    "gather_index_k": QUANTIZE_K,
    "store_latent_kv": LATENT,
    "gather_latent_kv": LATENT,
    "indexer_logits": INDEXER,
    "indexer_logits_paged": PAGED_INDEXER,
    "topk": TOPK,
    "topk_to_slots": TOPK_TO_SLOTS,
    "topk_reads": TOPK,
    "indexer_topk": INDEXER,
    "indexer_topk_paged": PAGED_INDEXER,
    "to_slots": TO_SLOTS,
    "sparse_mla": SPARSE_MLA,
    "sparse_mla_paged": SPARSE_MLA_PAGED,
}
