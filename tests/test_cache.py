"""IndexCache: every sequence of calls gives the selection of this forward's source layer, or an error."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from indexcache_ext.cache import IndexCache
from indexcache_ext.schedule import LayerPattern

TOPK = 3


class Selector:
    """A stand-in for the indexer: every call selects tokens that no other call selects, and it counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, out):
        self.calls += 1
        out.copy_(self.expected(out.shape[0]))

    def expected(self, num_tokens):
        return (torch.arange(num_tokens * TOPK, dtype=torch.int32) + 1000 * self.calls).view(num_tokens, TOPK)


def not_called(out):
    raise AssertionError("a Shared layer ran an indexer")


class Pipeline(RuleBasedStateMachine):
    """Pipeline stages of one model against a model of the contract: the selections are kept as plain lists."""

    @initialize(
        tail=st.text("FSS", max_size=9),
        cuts=st.sets(st.integers(1, 9), max_size=3),
        max_tokens=st.integers(0, 5),
    )
    def build(self, tail, cuts, max_tokens):
        self.letters = "F" + tail
        self.max_tokens = max_tokens
        self.starts = [0, *sorted(cut for cut in cuts if cut < len(self.letters))]
        self.ends = [*self.starts[1:], len(self.letters)]
        self.stages = [
            IndexCache(LayerPattern(self.letters), max_tokens, TOPK, first_layer=start, num_layers=end - start)
            for start, end in zip(self.starts, self.ends, strict=True)
        ]
        self.addresses = [None] * len(self.stages)
        self.select_token = Selector()
        self.rows = [None] * len(self.stages)  # num_tokens of each stage's forward, None before begin()
        self.next = list(self.starts)
        self.held = [None] * len(self.stages)  # the selection that a Shared layer must see, None if nobody's

    stage = st.integers(0, 3)

    def pick(self, stage):
        return stage % len(self.stages)

    @rule(stage=stage, num_tokens=st.integers(0, 5))
    def begin(self, stage, num_tokens):
        s = self.pick(stage)
        if num_tokens > self.max_tokens:
            self.rows[s] = None
            with pytest.raises(ValueError, match=f"num_tokens in 0…{self.max_tokens}, got {num_tokens}"):
                self.stages[s].begin(num_tokens)
            return
        self.stages[s].begin(num_tokens)
        self.rows[s], self.next[s], self.held[s] = num_tokens, self.starts[s], None

    @rule(stage=stage, count=st.integers(1, 4))
    def select_next(self, stage, count):
        s = self.pick(stage)
        for _ in range(count):
            self.select(s, self.next[s])

    @rule(stage=stage, layer=st.integers(-1, 10))
    def select_any(self, stage, layer):
        self.select(self.pick(stage), layer)

    def select(self, s, layer):
        cache, letters = self.stages[s], self.letters
        if self.rows[s] is None:
            with pytest.raises(RuntimeError, match="no forward is open"):
                cache.select(layer, not_called)
        elif self.next[s] == self.ends[s]:
            with pytest.raises(RuntimeError, match=rf"expected begin\(\) of a new forward, got layer {layer};"):
                cache.select(layer, not_called)
        elif layer != self.next[s]:
            with pytest.raises(RuntimeError, match=f"expected layer {self.next[s]}, got layer {layer};"):
                cache.select(layer, not_called)
        elif letters[layer] == "S" and self.held[s] is None:
            with pytest.raises(RuntimeError, match=f"layer {layer} is Shared and reuses layer .* has not run"):
                cache.select(layer, not_called)
        else:
            if letters[layer] == "F":
                view = cache.select(layer, self.select_token)
                self.held[s] = self.select_token.expected(self.rows[s]).tolist()
            else:
                view = cache.select(layer, not_called)
            self.next[s] += 1
            self.check(s, view)

    @rule(stage=stage)
    def failing_indexer(self, stage):
        """An indexer that raises after it wrote half its rows: nobody may read them, and the layer may be retried."""
        s = self.pick(stage)
        layer = self.next[s]
        if self.rows[s] is None or layer == self.ends[s] or self.letters[layer] == "S":
            return

        def fail(out):
            out[: (out.shape[0] + 1) // 2] = -7
            raise OSError("device lost")

        with pytest.raises(OSError, match="device lost"):
            self.stages[s].select(layer, fail)

    @rule(stage=stage)
    def hand_over(self, stage):
        """export() of a stage and load() into the next, each accepted or refused by the state it is in."""
        s = self.pick(stage)
        if self.rows[s] is None or self.next[s] != self.ends[s]:
            with pytest.raises(RuntimeError, match="no forward is open|export after layer"):
                self.stages[s].export()
            return
        exported = self.stages[s].export()
        self.check(s, exported)
        if s + 1 < len(self.stages):
            self.load(s + 1, exported, self.held[s])

    def load(self, s, indices, selection):
        cache = self.stages[s]
        if self.rows[s] is None:
            with pytest.raises(RuntimeError, match="no forward is open"):
                cache.load(indices)
        elif self.next[s] != self.starts[s]:
            with pytest.raises(RuntimeError, match=r"load right after begin\(\)"):
                cache.load(indices)
        elif indices.shape[0] != self.rows[s]:
            with pytest.raises(ValueError, match=rf"int32 \[{self.rows[s]}, {TOPK}\], got int32 \[{len(indices)}, "):
                cache.load(indices)
        else:
            cache.load(indices)
            self.held[s] = selection

    @precondition(lambda self: len(self.stages) > 1)
    @rule(data=st.data())
    def whole_forward(self, data):
        """All stages one after another, as an engine runs them."""
        num_tokens = data.draw(st.integers(0, self.max_tokens))
        for s in range(len(self.stages)):
            self.begin(s, num_tokens)
            if s:
                self.hand_over(s - 1)
            for layer in range(self.starts[s], self.ends[s]):
                self.select(s, layer)

    def check(self, s, view):
        assert view.dtype == torch.int32
        assert view.shape == (self.rows[s], TOPK)
        assert view.is_contiguous()
        assert view.tolist() == self.held[s]
        if self.rows[s]:
            self.addresses[s] = self.addresses[s] or view.data_ptr()
            assert view.data_ptr() == self.addresses[s]


Pipeline.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPipeline = Pipeline.TestCase


def test_prefill_then_decode_steps(device):
    pattern = LayerPattern.uniform(9, keep_every=3)
    cache = IndexCache(pattern, 16, TOPK, device)
    addresses = set()
    for step, num_tokens in enumerate((16, 1, 1, 0, 5)):
        cache.begin(num_tokens)
        for layer in range(len(pattern)):
            view = cache.select(layer, lambda out: out.fill_(100 * step + layer))  # noqa: B023
            assert view.device.type == device
            assert view.shape == (num_tokens, TOPK)
            assert (view == 100 * step + pattern.source(layer)).all()
            if num_tokens:
                addresses.add(view.data_ptr())
    assert len(addresses) == 1


def test_a_stage_in_the_middle_uses_global_layer_numbers():
    pattern = LayerPattern("FFSSSFSS")
    first = IndexCache(pattern, 4, TOPK, num_layers=3)
    second = IndexCache(pattern, 4, TOPK, first_layer=3)
    assert (second.first_layer, second.end_layer) == (3, 8)
    for fill, num_tokens in ((7, 4), (9, 2)):
        first.begin(num_tokens)
        for layer in range(3):
            first.select(layer, lambda out: out.fill_(fill))  # noqa: B023
        second.begin(num_tokens)
        with pytest.raises(RuntimeError, match="layer 3 is Shared and reuses layer 1.* earlier pipeline stage"):
            second.select(3, not_called)
        second.load(first.export())
        assert second.select(3, not_called).tolist() == [[fill] * TOPK] * num_tokens
        assert second.select(4, not_called).tolist() == [[fill] * TOPK] * num_tokens
        assert second.select(5, lambda out: out.fill_(1)).unique().tolist() == [1]
        assert second.select(6, not_called).unique().tolist() == [1]


def test_the_loaded_indices_are_copied():
    pattern = LayerPattern("FSS")
    stage = IndexCache(pattern, 2, TOPK, first_layer=1)
    stage.begin(2)
    received = torch.full((2, TOPK), 5, dtype=torch.int32)
    stage.load(received)
    received.fill_(6)
    assert stage.select(1, not_called).unique().tolist() == [5]


def test_micro_batches_do_not_share():
    pattern = LayerPattern("FS")
    caches = [IndexCache(pattern, 2, TOPK) for _ in range(2)]
    for i, cache in enumerate(caches):
        cache.begin(2)
        cache.select(0, lambda out: out.fill_(i))  # noqa: B023
    for i, cache in enumerate(caches):
        assert cache.select(1, not_called).unique().tolist() == [i]


def test_compute_must_write_into_out():
    cache = IndexCache(LayerPattern("FS"), 2, TOPK)
    cache.begin(2)
    with pytest.raises(RuntimeError, match="compute of layer 0 returned another tensor than out"):
        cache.select(0, lambda out: torch.zeros(2, TOPK, dtype=torch.int32))
    assert cache.select(0, lambda out: out.fill_(3)).unique().tolist() == [3]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("FS", 4, 3), TypeError, "pattern to be a LayerPattern, got str"),
        ((LayerPattern("FS"), -1, 3), ValueError, "max_tokens at least 0, got -1"),
        ((LayerPattern("FS"), 4, 0), ValueError, "topk at least 1, got 0"),
        ((LayerPattern("FS"), 4.0, 3), TypeError, "max_tokens to be an int, got 4.0"),
        ((LayerPattern("FS"), 4, True), TypeError, "topk to be an int, got True"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        IndexCache(*arguments)


def test_bad_stage():
    pattern = LayerPattern("FSFS")
    with pytest.raises(ValueError, match="first_layer in 0…3, got 4"):
        IndexCache(pattern, 4, TOPK, first_layer=4)
    with pytest.raises(ValueError, match="num_layers in 1…2, got 3"):
        IndexCache(pattern, 4, TOPK, first_layer=2, num_layers=3)
    with pytest.raises(ValueError, match="num_layers in 1…4, got 0"):
        IndexCache(pattern, 4, TOPK, num_layers=0)


def test_bad_begin_leaves_no_forward_open():
    cache = IndexCache(LayerPattern("FS"), 4, TOPK)
    cache.begin(4)
    cache.select(0, lambda out: out.fill_(1))
    for bad, error in ((5, ValueError), (-1, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="num_tokens"):
            cache.begin(bad)
        with pytest.raises(RuntimeError, match="no forward is open"):
            cache.select(1, not_called)


def test_bad_load():
    first = IndexCache(LayerPattern("FS"), 4, TOPK)
    first.begin(2)
    with pytest.raises(RuntimeError, match="holds layer 0"):
        first.load(torch.zeros(2, TOPK, dtype=torch.int32))
    second = IndexCache(LayerPattern("FS"), 4, TOPK, first_layer=1)
    second.begin(2)
    for bad in (
        torch.zeros(2, TOPK, dtype=torch.int64),
        torch.zeros(3, TOPK, dtype=torch.int32),
        torch.zeros(1, TOPK, dtype=torch.int32),  # would broadcast
        torch.zeros(2, TOPK + 1, dtype=torch.int32),
    ):
        with pytest.raises(ValueError, match=r"expected indices to be int32 \[2, 3\], got "):
            second.load(bad)
    with pytest.raises(RuntimeError, match="layer 1 is Shared"):
        second.select(1, not_called)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_captured_graph_replays_on_the_same_buffer():
    pattern = LayerPattern("FSSF")
    cache = IndexCache(pattern, 8, TOPK, "cuda")
    selection = torch.zeros(4, TOPK, dtype=torch.int32, device="cuda")
    seen = torch.zeros(4, 4, TOPK, dtype=torch.int32, device="cuda")

    def forward():
        cache.begin(4)
        for layer in range(len(pattern)):
            seen[layer].copy_(cache.select(layer, lambda out: out.copy_(selection + layer)))  # noqa: B023

    forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    cache.begin(8)  # an eager forward of another size in between
    cache.select(0, lambda out: out.fill_(-5))
    selection.fill_(40)
    graph.replay()
    assert seen[:, 0, 0].tolist() == [40, 40, 40, 43]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_no_call_waits_for_the_gpu():
    pattern = LayerPattern("FSSF")
    first = IndexCache(pattern, 8, TOPK, "cuda", num_layers=2)
    second = IndexCache(pattern, 8, TOPK, "cuda", first_layer=2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        first.begin(8)
        for layer in range(2):
            first.select(layer, lambda out: out.fill_(layer))  # noqa: B023
        second.begin(8)
        second.load(first.export())
        second.select(2, not_called)
    finally:
        torch.cuda.set_sync_debug_mode("default")
