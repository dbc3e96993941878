"""How every figure is measured: against roofs and a baseline of the same run, checked in the same run.

An absolute time moves with the machine, so a figure is a ratio. Half of the baseline's calls run before those of the op
and half after them, on the same cores or GPU, so that a change of clocks or load meets both. On a GPU each call starts
with a cold L2 and queues behind a sleeping kernel, so that neither the caches nor the host's launch time count. Nothing
else precedes it: another op would push the code of this one out of the caches, which costs a short call up to 0.3 us.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from case_types import Case
from torch import Tensor

L2_FLUSH_BYTES = 256 << 20
SLEEP_CYCLES = 200_000  # about 0.1 ms: longer than the host needs to launch one call
WARMUP_ROUNDS = 2
GRAPH_CALLS = 10
SMALL = {"tokens": 8, "keys": 512, "rows": 8, "columns": 2000, "k": 64, "topk": 64, "pages": 8, "max_context_len": 500}


class CudaTime:
    """A moment on the current stream. The difference of two waits for the later one and is in seconds."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, start: CudaTime) -> float:
        self.event.synchronize()
        return start.event.elapsed_time(self.event) / 1e3


def cuda_clock() -> CudaTime:
    return CudaTime()


def cpu(*cases: Any) -> list:
    return [pytest.param("cpu", case, id=f"cpu-{case.id}") for case in cases]


def gpu(*cases: Any) -> list:
    """Nothing where there is no GPU."""
    timer = pytest.mark.benchmark(timer=cuda_clock)
    present = torch.cuda.is_available()
    return [pytest.param("cuda", case, id=f"cuda-{case.id}", marks=timer) for case in cases if present]


def shrunk(case: Case) -> Case:
    """The case cut down to a smoke test, its options kept."""
    small = {name: min(bound, getattr(case, name)) for name, bound in SMALL.items() if hasattr(case, name)}
    if hasattr(case, "lengths") and isinstance(case.lengths, tuple):
        small |= {"lengths": tuple(min(n, 500) for n in case.lengths[:3]), "table_pages": min(8, case.table_pages)}
    return dataclasses.replace(case, **small, large=False)


@dataclass(frozen=True)
class Baseline:
    """What the op is compared with. `flops` None: it does the op's own work, so the ratio is a plain speed-up."""

    name: str
    run: Callable[[], Any]
    flops: float | None = None


class Stopwatch:
    """Times single calls on one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.clock = cuda_clock if device == "cuda" else time.perf_counter
        self.scratch = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None

    def settle(self) -> None:
        """To be called right before a timed call."""
        if self.scratch is not None:
            self.scratch.zero_()
            torch.cuda._sleep(SLEEP_CYCLES)

    def once(self, call: Callable[[], Any]) -> float:
        self.settle()
        start = self.clock()
        call()
        return self.clock() - start

    def times(self, call: Callable[[], Any], rounds: int) -> list[float]:
        return [self.once(call) for _ in range(WARMUP_ROUNDS + rounds)][WARMUP_ROUNDS:]

    def median(self, call: Callable[[], Any], rounds: int) -> float:
        return statistics.median(self.times(call, rounds))

    def rounds(self, seconds: float) -> int:
        """How often to repeat a call of this length."""
        for limit, rounds in ((0.5, 5), (0.05, 7), (0.001, 15)):
            if seconds > limit:
                return rounds
        return 30


def cpu_roofs(watch: Stopwatch) -> dict[str, float]:
    """F32: FLOP/s of torch.mm. BW: bytes/s, read and written, of a copy that no cache holds."""
    return {"F32": f32_rate(watch), "BW": copy_rate(watch, 128 << 20)}


def gpu_roofs(watch: Stopwatch) -> dict[str, float]:
    """R16 and R8: FLOP/s of bf16 and e4m3 matrix products of 8192 x 8192. BW: bytes/s of a copy; READ: of a sum."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    roofs = {"R16": 2 * n**3 / watch.median(lambda: torch.mm(a, b), 15)}
    roofs |= {"BW": copy_rate(watch, 1 << 30), "READ": read_rate(watch, 1 << 30)}
    if torch.cuda.get_device_capability() >= (8, 9):
        product, flops = e4m3_product()
        roofs["R8"] = flops / watch.median(product, 15)
    return roofs


def e4m3_product() -> tuple[Callable[[], Tensor], float]:
    """torch._scaled_mm of 8192 x 8192 e4m3 matrices on a GPU, and its FLOPs."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16), 2 * n**3


def f32_product() -> tuple[Callable[[], Tensor], float]:
    """torch.mm in f32 at a size where it is at its best, and its FLOPs."""
    n = 2048
    a, b = torch.randn(n, n), torch.randn(n, n)
    return lambda: torch.mm(a, b), 2 * n**3


def f32_rate(watch: Stopwatch) -> float:
    product, flops = f32_product()
    return flops / watch.median(product, 9)


def copy_rate(watch: Stopwatch, size: int) -> float:
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=watch.device)
    target = torch.empty_like(source)
    return 2 * size / watch.median(lambda: target.copy_(source), 9)


def read_rate(watch: Stopwatch, size: int) -> float:
    source = torch.ones(size // 4, device=watch.device)
    return size / watch.median(source.sum, 9)


class Measurement:
    """What the `measure` fixture gives a benchmark; one call of it times, checks and records one case."""

    def __init__(self, benchmark: Any, roofs: Callable[[str], dict[str, float]], full_size: bool) -> None:
        self.benchmark = benchmark
        self.roofs = roofs
        self.full_size = full_size  # a mark is for the shape that it names

    def __call__(
        self,
        op: Callable[[], Any],
        *,
        device: str,
        check: Callable[[Any], None],
        roof: str | None = None,
        flops: float = 0,
        nbytes: float = 0,
        memory: str = "BW",
        baseline: Baseline | None = None,
        mark: float | None = None,
        mark_us: float | None = None,
    ) -> dict[str, Any]:
        """Time `op` after `check` accepted its result, and return what is recorded: nothing where nothing is timed.

        `flops` counts valid work only and `roof` names the rate that bounds it (F32, R8, R16); `nbytes` counts what
        must be read and written, and `memory` names its rate (READ for an op that does little but read). `mark` is the
        ratio to the baseline, `mark_us` the time, that the project set out to reach.
        """
        expected = op()
        check(expected)
        if self.benchmark.disabled:
            self.benchmark.pedantic(op)
            return {}
        watch = Stopwatch(device)
        rates = self.roofs(device)
        rounds = watch.rounds(watch.once(op))
        baseline_times = watch.times(baseline.run, (rounds + 1) // 2) if baseline is not None else []
        result = self.benchmark.pedantic(op, setup=watch.settle, rounds=rounds, warmup_rounds=WARMUP_ROUNDS)
        self.benchmark.has_error = not same_bits(result, expected)
        assert not self.benchmark.has_error, "the timed result differs from the one that was checked"

        seconds = self.benchmark.stats.stats.median
        info = {"device": device, "seconds": seconds, "flops": flops, "bytes": nbytes}
        info |= roofline(seconds, flops, nbytes, roof, memory, rates)
        if mark_us is not None and self.full_size:
            info["mark_seconds"] = mark_us * 1e-6
        if baseline is not None:
            baseline_seconds = statistics.median(baseline_times + watch.times(baseline.run, (rounds + 1) // 2))
            work = 1 if baseline.flops is None else flops / baseline.flops
            info |= {"baseline": baseline.name, "baseline_seconds": baseline_seconds}
            info |= {"baseline_ratio": work * baseline_seconds / seconds, "mark": mark if self.full_size else None}
        if device == "cuda":
            info |= gpu_extras(op, seconds)
        self.benchmark.extra_info |= info
        return info


def roofline(
    seconds: float, flops: float, nbytes: float, roof: str | None, memory: str, rates: dict[str, float]
) -> dict[str, Any]:
    """The roof that the op meets first, and the share of it that it reaches."""
    least = {memory: nbytes / rates[memory]}
    if roof in rates:
        least[roof] = flops / rates[roof]
    nearest = max(least, key=least.__getitem__)
    return {"roof": nearest, "roof_per_second": rates[nearest], "roof_ratio": least[nearest] / seconds}


def gpu_extras(op: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Host time of an eager call; for short ops also the time per call of a replayed graph, L2 warm."""
    torch.cuda.synchronize()
    host = []
    for _ in range(30):
        start = time.perf_counter()
        op()
        host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    extras = {"host_seconds": statistics.median(host)}
    if seconds < 100e-6:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(GRAPH_CALLS):
                op()
        times = []
        for _ in range(30):
            torch.cuda._sleep(SLEEP_CYCLES)
            start = cuda_clock()
            graph.replay()
            times.append((cuda_clock() - start) / GRAPH_CALLS)
        extras["graph_seconds"] = statistics.median(times)
    return extras


def tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def same_bits(a: Any, b: Any) -> bool:
    pairs = zip(tensors(a), tensors(b), strict=True)
    return all(torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)) for x, y in pairs)


def size_of(*results: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in results)


def sampled_rows(rows: int, count: int = 8) -> Tensor:
    """A few row numbers, first and last among them: what a slow fp64 reference is asked for."""
    return torch.linspace(0, rows - 1, min(rows, count)).long().unique()


def visible(starts: Tensor, ends: Tensor, keys: int) -> int:
    """The (query, key) pairs inside the windows."""
    return int((ends.clamp(max=keys).long() - starts.clamp(min=0).long()).clamp(min=0).sum())


def best_columns(scores: Tensor, k: int) -> Tensor:
    """int32 [R, k]: the k best columns of each row, the first among equals, ascending. No NaN, no fewer than k."""
    worst = scores.topk(k, dim=-1).values.amin(-1, keepdim=True)
    above, equal = scores > worst, scores == worst
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
    return chosen.nonzero()[:, 1].view(len(scores), k).int()


def assert_selection(got: Tensor, scores: Tensor, tolerance: Tensor) -> None:
    """`got` int32 [R, k] lists ascending columns whose scores [R, L] are the k best, up to `tolerance` [R, 1]."""
    k = min(got.size(1), scores.size(1))
    best = scores.topk(k, dim=-1).values
    valid = best > -torch.inf
    assert (got[:, :k] >= 0).equal(valid), "another number of columns than the window holds"
    assert (got[:, k:] == -1).all()
    assert ((got[:, 1:k] > got[:, : k - 1]) | ~valid[:, 1:]).all(), "columns are not strictly ascending"
    worst = torch.where(valid, best, torch.inf).amin(-1, keepdim=True)
    chosen = scores.gather(1, got[:, :k].long().clamp(min=0))
    assert (~valid | (chosen >= worst - tolerance)).all(), "a selected column is not among the best"
