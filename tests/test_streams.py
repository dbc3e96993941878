"""Every op under CUDA-graph capture, on a side stream and on a device that is not the current one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compare import assert_same_bits
from op_calls import CALLS, DIAGNOSTIC, IDS, MUTATED, arguments, buffers, has_out, outcome
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

every_call = pytest.mark.parametrize(("name", "case"), CALLS, ids=IDS)
LENGTHS = ("ends", "context_lens", "lengths")


def tensors(call: dict) -> dict[str, Tensor]:
    return {name: x for name, x in call.items() if isinstance(x, Tensor)}


def other_values(call: dict) -> dict:
    """A call of the same shapes: keys negated, the rows of everything else in reverse order, every length halved."""
    other = {}
    for name, x in call.items():
        if not isinstance(x, Tensor):
            other[name] = x
        elif name == "kv":  # rows that no query lists hold NaN, and must not change places with others
            other[name] = -x
        elif x.dtype == torch.uint8:
            other[name] = x ^ 0x80  # the sign bit of e4m3
        else:
            reversed_rows = x.view(torch.uint8).flip(0).view(x.dtype) if x.dtype == torch.float8_e4m3fn else x.flip(0)
            other[name] = reversed_rows // 2 if name in LENGTHS else reversed_rows
    return other


def overwrite(call: dict, values: dict) -> None:
    for name, x in tensors(call).items():
        x.copy_(values[name])


def expect(name: str, call: dict) -> tuple[Tensor, ...]:
    """What the op gives eagerly on the default stream, in tensors of its own."""
    own = {n: x.clone() if n == MUTATED.get(name) else x for n, x in call.items()}
    return tuple(x.clone() for x in outcome(name, own))


def assert_all_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for x, y in zip(actual, expected, strict=True):
        assert_same_bits(x, y)


def differ(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return any(not torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(one, other))


def capture(run: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def check_replays(name: str, call: dict, graph: torch.cuda.CUDAGraph, results: tuple[Tensor, ...]) -> None:
    """Replay with the captured inputs, with others, and with the first again: nothing is baked in, nothing is left."""
    first = {n: x.clone() if isinstance(x, Tensor) else x for n, x in call.items()}
    second = other_values(first)
    expected = expect(name, first), expect(name, second)
    assert name == DIAGNOSTIC or differ(*expected), "the second inputs must change the result"
    for values, wanted in ((first, expected[0]), (second, expected[1]), (first, expected[0])):
        overwrite(call, values)
        for result in results:
            if name not in MUTATED:
                result.view(torch.uint8).fill_(0x55)
        graph.replay()
        assert_all_same_bits(results, wanted)


@every_call
def test_graph_replay_follows_inputs_and_lengths(name, case):
    call = arguments(name, case, "cuda")
    expect(name, call)  # a first call loads the kernels
    graph, results = capture(lambda: outcome(name, call))
    check_replays(name, call, graph, results)


@pytest.mark.parametrize(
    ("name", "case"), [c for c in CALLS if has_out(c[0])], ids=[i for i, c in zip(IDS, CALLS) if has_out(c[0])]
)
def test_graph_replay_into_given_buffers(name, case):
    call = arguments(name, case, "cuda")
    given = buffers(expect(name, call))
    addresses = [x.data_ptr() for x in given.values()]

    def run() -> tuple[Tensor, ...]:
        getattr(torch.ops.indexcache, name).out(**call, **given)
        return tuple(given.values())

    run()
    graph, results = capture(run)
    check_replays(name, call, graph, results)
    assert [x.data_ptr() for x in results] == addresses


@every_call
def test_side_stream_is_used(name, case):
    """Inputs that only become right late on the side stream: work on any other stream would read the wrong ones."""
    right = arguments(name, case, "cuda")
    wrong = other_values(right)
    expected = expect(name, right)
    assert name == DIAGNOSTIC or differ(expected, expect(name, wrong))
    call = {n: x.clone() if isinstance(x, Tensor) else x for n, x in wrong.items()}
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # cycles: about 0.1 s
        overwrite(call, right)
        results = tuple(x.clone() for x in outcome(name, call))
        assert not side.query(), "the op waited for the device"
    side.synchronize()
    assert_all_same_bits(results, expected)


@every_call
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one(name, case):
    expected = expect(name, arguments(name, case, "cuda:0"))
    with torch.cuda.device(0):
        results = outcome(name, arguments(name, case, "cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in results)
    assert_all_same_bits(tuple(x.to("cuda:0") for x in results), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_devices_may_not_mix():
    call = arguments(*next(c for c in CALLS if c[0] == "topk"), "cuda:1")
    call["ends"] = call["ends"].to("cuda:0")
    with pytest.raises(RuntimeError, match=r"topk: expected ends to be int32 \[5\] on cuda:1, got .*cuda:0"):
        torch.ops.indexcache.topk(**call)
