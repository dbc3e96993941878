"""Random rows by the hundred thousand: `topk` against a stable sort on the CPU, index for index.

A test takes one distribution through several batches: many short rows, fewer long ones, with the windows, lengths and
alignments at which kernels change their mind. A batch is made from its own fields alone, on the CPU, so what a failure
prints is enough to repeat it on any machine: `check(Batch(...), "cuda")`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from case_data import INT_MAX, INT_MIN, TOPK_HARD, TOPK_VALUES, Data, topk_values
from torch import Tensor

from indexcache_ext import reference

ops = torch.ops.indexcache

PERIODS = (8, 64, 256, 512, 4096, 32_768)
KINDS = (
    *dict.fromkeys(TOPK_HARD + TOPK_VALUES),
    *(f"periodic_{period}" for period in PERIODS if period != 64),  # "periodic" is of 64
    *(f"comb_{period}" for period in (64, 512, 4096)),
    *(f"gap_{period}" for period in (64, 4096)),
)
# Batches of one distribution: rows, and the columns that they may have.
SIZES = {
    "cpu": (
        (200, 2049, 6000), (100, 2049, 6000), (30, 6000, 36_000), (33, 6000, 36_000), (4, 60_000, 140_000),
        (3, 60_000, 140_000),
    ),
    "cuda": (
        (1700, 2049, 6000), (1000, 2049, 6000), (300, 2049, 6000), (12, 2049, 6000), (133, 6000, 20_000),
        (33, 6000, 66_000), (7, 20_000, 140_000), (1, 60_000, 140_000), (2, 1_048_000, 1_050_000),
    ),
}  # fmt: skip
ROWS = {device: sum(rows for rows, *_ in sizes) for device, sizes in SIZES.items()}  # of each distribution
LEAST_ROWS = {"cpu": 12_000, "cuda": 100_000}  # in all

KS = (2048,) * 7 + (1, 7, 512, 2047, 3000)
TILES = (32, 512, 2048, 4096, 8192, 16_384, 32_768)
SPECIAL = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45, 1e-39, 3.4e38, -3.4e38)


@dataclass(frozen=True)
class Batch:
    values: str
    rows: int
    columns: int
    k: int
    dtype: str
    offset: int  # scores from an aligned address to the first row
    extra: int  # scores between two rows
    sprinkled: bool  # a few of SPECIAL among the values
    seed: int

    def make(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Memory [rows, offset + columns + extra], the logits in it, starts and ends, on the CPU."""
        data = Data(str(self), "cpu")
        logits = topk_values(self.values, self.rows, self.columns, data) * data.uniform(0.5, 2, self.rows, 1)
        if self.sprinkled:
            logits = data.sprinkle(logits, list(SPECIAL), 0.02)
        memory = torch.full((self.rows, self.offset + self.columns + self.extra), torch.inf).to(self.torch_dtype)
        self.logits_in(memory).copy_(logits)
        return memory, self.logits_in(memory), *self.windows(data)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def logits_in(self, memory: Tensor) -> Tensor:
        return memory[:, self.offset : self.offset + self.columns]

    def windows(self, data: Data) -> tuple[Tensor, Tensor]:
        """starts and ends int32: a third the whole row, the rest with a length or a place that is an edge somewhere."""
        rows, columns = self.rows, self.columns
        tile = data.choice([n for n in TILES if n <= columns], rows)
        length = torch.stack(
            [
                data.choice([self.k - 1, self.k, self.k + 1, 4 * self.k, columns], rows),
                tile * (data.integers(0, INT_MAX, rows) % (columns // tile) + 1) + data.integers(-1, 2, rows),
                data.choice([0, 0, -1, -9, -columns, 1, 2, 63], rows),
                data.integers(-columns // 8, columns, rows),
            ]
        ).long()
        length = length[data.integers(0, len(length), rows).long(), torch.arange(rows)]
        room = (columns - length).clamp(min=0, max=columns)
        start = torch.stack(
            [
                torch.zeros_like(room),
                data.integers(1, 9, rows).long(),  # off the 16 bytes that a vector load wants
                data.integers(-9, 0, rows).long(),
                data.integers(0, INT_MAX, rows) % (room + 1),
                room,  # up to the last column
            ]
        )
        start = start[data.integers(0, len(start), rows).long(), torch.arange(rows)]
        whole = data.uniform(0, 1, rows) < 1 / 3
        starts = torch.where(whole, data.choice([0, 0, 0, -1, INT_MIN], rows), start)
        ends = torch.where(whole, data.choice([columns, columns, columns, columns + 1, INT_MAX], rows), start + length)
        return starts.int(), ends.clamp(INT_MIN, INT_MAX).int()


def batches(values: str, device: str) -> list[Batch]:
    """The same every time: one for each size."""
    result = []
    for seed, (rows, least, most) in enumerate(SIZES[device]):
        draw = random.Random(f"{values} {device} {seed}")
        columns = draw.randint(least, most)
        if draw.random() < 0.5:  # the edge of a tile
            tile = draw.choice([n for n in TILES if n < most])
            columns = min(max(columns // tile * tile, tile) + draw.choice([-1, 0, 1]), most)
        k, dtype = draw.choice(KS), draw.choice(["float32", "float32", "bfloat16"])
        offset, extra = draw.choice([(0, 0), (0, 1), (1, 0), (3, 4), (draw.randrange(16), draw.randrange(16))])
        result.append(Batch(values, rows, columns, k, dtype, offset, extra, seed % 2 == 1, seed))
    return result


def check(batch: Batch, device: str, select: Callable[..., Tensor] = ops.topk) -> int:
    """The number of rows that were compared, every one of them equal."""
    memory, logits, starts, ends = batch.make()
    selected = select(batch.logits_in(memory.to(device)), starts.to(device), ends.to(device), batch.k).cpu()
    expected = reference.topk(logits.float(), starts, ends, batch.k)  # a stable sort of each row
    assert selected.shape == expected.shape and selected.dtype == expected.dtype
    wrong = (selected != expected).any(1).nonzero().flatten().tolist()
    if wrong:
        row = wrong[0]
        wanted, got = set(expected[row].tolist()), set(selected[row].tolist())
        pytest.fail(
            f"{batch}: {len(wrong)} of {batch.rows} rows differ; row {row}, window [{starts[row]}, {ends[row]}): "
            f"misses {sorted(wanted - got)[:8]}, has {sorted(got - wanted)[:8]}; {len(got - wanted)} columns in all"
        )
    return len(selected)


@pytest.mark.parametrize("values", KINDS)
def test_random_rows_equal_a_stable_sort(device: str, values: str, record_property) -> None:
    compared = sum(check(batch, device) for batch in batches(values, device))
    record_property("rows", compared)
    assert compared == ROWS[device]


def slots_in_order(logits: Tensor, starts: Tensor, ends: Tensor, k: int) -> Tensor:
    """The columns again, by a table whose pages lie in order: the fused translation of a selection."""
    page_size = 61
    pages = torch.arange(logits.size(1) // page_size + 1, dtype=torch.int32, device=logits.device)
    return ops.topk_to_slots(logits, starts, ends, k, pages[None], torch.zeros_like(starts), page_size)


@pytest.mark.parametrize("values", TOPK_HARD)
def test_random_rows_as_slots_equal_a_stable_sort(device: str, values: str) -> None:
    for batch in batches(values, device):
        check(batch, device, slots_in_order)


@pytest.mark.parametrize("where", LEAST_ROWS)
def test_the_fuzz_is_as_large_as_it_says(where: str) -> None:
    """Rows in all, each kind of window, every k, both dtypes, aligned rows and others."""
    planned = [batch for values in KINDS for batch in batches(values, where)]
    assert sum(batch.rows for batch in planned) >= LEAST_ROWS[where]
    assert {batch.k for batch in planned} == set(KS)
    assert {batch.dtype for batch in planned} == {"float32", "bfloat16"}
    assert {(batch.offset + batch.columns + batch.extra) % 4 for batch in planned} == {0, 1, 2, 3}  # row strides
    assert {batch.columns % 32 for batch in planned} >= {31, 0, 1}


def test_a_wrong_selection_is_seen() -> None:
    """One column of one row, taken for its neighbour, fails and names the batch."""
    batch = Batch("randn", 40, 2500, 512, "float32", 1, 2, True, 7)

    def nearly(logits: Tensor, starts: Tensor, ends: Tensor, k: int) -> Tensor:
        selected = reference.topk(logits, starts, ends, k)
        row = int((selected[:, -1] >= 0).nonzero()[0])
        selected[row, -1] += 1
        return selected

    with pytest.raises(pytest.fail.Exception, match=r"Batch\(values='randn'.*seed=7\): 1 of 40 rows differ"):
        check(batch, "cpu", nearly)
