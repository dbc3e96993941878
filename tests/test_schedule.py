"""LayerPattern: the rules of the schedule, its config spellings, and what it refuses."""

import re
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexcache_ext.schedule import LayerPattern

patterns = st.text("FS", max_size=90).map(lambda tail: LayerPattern("F" + tail))

# The two patterns that the IndexCache paper publishes for GLM-5 (78 layers) at 1/2 and 1/4.
GLM5_HALF = "FFSFSSSFSSFFFSSSFFFSFSSSSSSFFSFFSFFSSFFFFFFSFFFFFSFFSSSSSSFSFFFSFSSSFSFFSFFSSS"
GLM5_QUARTER = "FFSFSSSFSSFSFSSSSSSSFSSSSSSFSSSFSFSSSSFFFFFSSSFFSSSFSSSSSSSSFSSSFSSSSSSFSFSSSS"


def full_layers(pattern: LayerPattern) -> list[int]:
    return [i for i in range(len(pattern)) if pattern.is_full(i)]


@given(patterns)
def test_letters_round_trip(p):
    assert LayerPattern(str(p)) == p
    assert "".join(p) == str(p)
    assert len(p) == len(str(p))
    assert {p: 1}[LayerPattern(str(p))] == 1


@given(patterns)
def test_both_config_spellings_round_trip(p):
    config = p.to_config()
    assert set(config) == {"indexer_types", "index_topk_pattern"}
    assert len(config["indexer_types"]) == len(p)
    for part in (config, *({key: value} for key, value in config.items())):
        assert LayerPattern.from_config(part) == p
        assert LayerPattern.from_config({**part, "num_hidden_layers": len(p)}) == p
        assert LayerPattern.from_config(types.SimpleNamespace(**part, num_hidden_layers=len(p))) == p


@given(patterns)
def test_source_is_the_nearest_preceding_full_layer(p):
    latest = None
    for layer, letter in enumerate(str(p)):
        assert p.is_full(layer) == (letter == "F")
        if letter == "F":
            latest = layer
        assert p.source(layer) == latest


@given(patterns)
def test_groups_partition_the_layers(p):
    groups = p.groups()
    assert list(groups) == full_layers(p)
    assert [layer for served in groups.values() for layer in served] == list(range(len(p)))
    for full, served in groups.items():
        assert served[0] == full
        assert all(p.source(layer) == full for layer in served)
    assert p.retention == len(groups) / len(p)


@given(patterns.flatmap(lambda p: st.tuples(st.just(p), st.integers(-200, 200))))
def test_layers_outside_the_model_are_refused(case):
    p, layer = case
    if 0 <= layer < len(p):
        assert p.source(layer) <= layer
        return
    for method in (p.is_full, p.source):
        with pytest.raises(IndexError, match=rf"0…{len(p) - 1}, got {layer}$"):
            method(layer)


@given(n=st.integers(1, 120), every=st.integers(1, 12), offset=st.integers(1, 20))
def test_frequency_rule_counted_independently(n, every, offset):
    """`offset` leading Full layers, then one after every `every - 1` Shared ones: a walk, not a formula."""
    expected, since_full = "", 0
    for i in range(n):
        full = i < offset or since_full == every - 1
        since_full = 0 if full else since_full + 1
        expected += "F" if full else "S"
    assert str(LayerPattern.uniform(n, keep_every=every, offset=offset)) == expected
    config = {"num_hidden_layers": n, "index_topk_freq": every, "index_skip_topk_offset": offset}
    assert str(LayerPattern.from_config(config)) == expected


def test_defaults_of_the_frequency_rule():
    assert str(LayerPattern.uniform(12)) == "FFSSSFSSSFSS"
    assert str(LayerPattern.uniform(5, keep_every=4, offset=1)) == "FSSSF"
    assert str(LayerPattern.uniform(5, keep_every=None)) == "FFFFF"
    assert str(LayerPattern.from_config({"num_hidden_layers": 12, "index_topk_freq": 4})) == "FFSSSFSSSFSS"
    assert str(LayerPattern.from_config({"num_hidden_layers": 3})) == "FFF"
    assert str(LayerPattern.from_config({"num_hidden_layers": 3, "index_topk_freq": None})) == "FFF"


def test_glm_5_2():
    config = {
        "num_hidden_layers": 78,
        "index_topk_freq": 4,
        "index_skip_topk_offset": 3,
        "index_topk_pattern": None,
        "indexer_types": ["full" if i < 3 or i % 4 == 2 else "shared" for i in range(78)],
    }
    p = LayerPattern.from_config(config)
    assert full_layers(p) == [0, 1, *range(2, 75, 4)]
    assert len(full_layers(p)) == 21
    assert p == LayerPattern.uniform(78, keep_every=4, offset=3)
    assert p.retention == 21 / 78


def test_published_patterns_nest():
    half, quarter = LayerPattern(GLM5_HALF), LayerPattern(GLM5_QUARTER)
    assert len(half) == len(quarter) == 78
    assert (len(full_layers(half)), len(full_layers(quarter))) == (40, 22)
    assert set(full_layers(quarter)) < set(full_layers(half))


@pytest.mark.parametrize("model", ["GlmMoeDsaConfig", "DeepseekV32Config"])
def test_hugging_face_configs(model):
    transformers = pytest.importorskip("transformers")
    config_class = getattr(transformers, model)
    assert str(LayerPattern.from_config(config_class(num_hidden_layers=5))) == "FFFFF"
    p = LayerPattern("FSSFS")
    assert LayerPattern.from_config(config_class(num_hidden_layers=5, **p.to_config())) == p
    freq = config_class(num_hidden_layers=9, index_topk_freq=3)
    assert str(LayerPattern.from_config(freq)) == "FFSSFSSFS"


@pytest.mark.parametrize(
    ("letters", "error", "message"),
    [
        ("", ValueError, "got an empty string"),
        ("SFF", ValueError, "layer 0 of 'SFF' is Shared.*write F at position 0"),
        ("FSSXF", ValueError, "got 'X' at position 3 of 'FSSXF'"),
        ("FSs", ValueError, "got 's' at position 2"),
        ("FS\n", ValueError, r"got '\\n' at position 2"),
        ("F\N{CYRILLIC CAPITAL LETTER DZE}", ValueError, "at position 1"),
        (["F", "S"], TypeError, "got list"),
        (None, TypeError, "got NoneType"),
        (b"FS", TypeError, "got bytes"),
    ],
)
def test_bad_letters(letters, error, message):
    with pytest.raises(error, match=message):
        LayerPattern(letters)


@given(st.text(min_size=1, max_size=20))
def test_any_text_is_a_valid_pattern_or_refused_at_its_first_fault(text):
    fault = re.search("[^FS]", text)
    if fault:
        with pytest.raises(ValueError, match=f"at position {fault.start()} of"):
            LayerPattern(text)
    elif text[0] == "S":
        with pytest.raises(ValueError, match="layer 0 .* is Shared"):
            LayerPattern(text)
    else:
        assert str(LayerPattern(text)) == text


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({}, ValueError, "needs num_hidden_layers"),
        ({"index_topk_freq": 4}, ValueError, "needs num_hidden_layers"),
        ({"num_hidden_layers": 0}, ValueError, "num_hidden_layers to be at least 1, got 0"),
        ({"num_hidden_layers": "4"}, TypeError, "num_hidden_layers to be an int, got '4'"),
        ({"num_hidden_layers": 4, "index_topk_freq": 0}, ValueError, "index_topk_freq to be at least 1, got 0"),
        ({"num_hidden_layers": 4, "index_topk_freq": 2.0}, TypeError, "index_topk_freq to be an int, got 2.0"),
        ({"num_hidden_layers": 4, "index_topk_freq": 2, "index_skip_topk_offset": 0}, ValueError, "layer 0 Shared"),
        ({"num_hidden_layers": 4, "index_topk_pattern": "FSS"}, ValueError, "index_topk_pattern .* 3 layers.* 4"),
        ({"num_hidden_layers": 2, "indexer_types": ["full"] * 3}, ValueError, "indexer_types describes 3 layers.* 2"),
        ({"indexer_types": ["full", "shared"], "index_topk_pattern": "FSS"}, ValueError, "describes 3 layers.* 2"),
        ({"indexer_types": ["full", "Shared"]}, ValueError, "got 'Shared' at 1"),
        ({"indexer_types": ["full", None]}, ValueError, "got None at 1"),
        ({"indexer_types": ["shared", "full"]}, ValueError, "layer 0 .* is Shared"),
        ({"indexer_types": []}, ValueError, "empty"),
        ({"indexer_types": 3}, TypeError, "indexer_types to be a list or a string, got 3"),
    ],
)
def test_bad_configs(config, error, message):
    with pytest.raises(error, match=message):
        LayerPattern.from_config(config)


def test_config_keys_that_disagree_are_refused():
    types_ = ["full", "shared", "full", "full"]
    with pytest.raises(ValueError, match="indexer_types and index_topk_pattern disagree: layer 2 is full .* shared"):
        LayerPattern.from_config({"indexer_types": types_, "index_topk_pattern": "FSSF"})
    with pytest.raises(ValueError, match="indexer_types and index_topk_freq disagree: layer 1 is shared .* full"):
        LayerPattern.from_config({"num_hidden_layers": 4, "indexer_types": types_, "index_topk_freq": 2})
    with pytest.raises(ValueError, match="index_topk_pattern and index_topk_freq disagree"):
        LayerPattern.from_config({"num_hidden_layers": 4, "index_topk_pattern": "FSFS", "index_topk_freq": 2})
    # A frequency of 1 is the engines' default, not a statement.
    assert str(LayerPattern.from_config({"index_topk_pattern": "FSFS", "index_topk_freq": 1})) == "FSFS"


@pytest.mark.parametrize("arguments", [(0,), (-1,), (4, 0), (4, -2), (4, 4, 0), (4, 3, -1)])
def test_bad_uniform(arguments):
    with pytest.raises(ValueError, match="LayerPattern.uniform"):
        LayerPattern.uniform(*arguments)


def test_patterns_are_immutable_values():
    p = LayerPattern("FS")
    with pytest.raises(AttributeError):
        p.letters = "FF"
    assert p != LayerPattern("FF")
    assert p != "FS"


def test_stages():
    p = LayerPattern("FFSSFSSSFS")
    p.check_stages(4)  # starts 0, 4, 8; the last stage has what remains
    p.check_stages([4, 4, 2])
    p.check_stages([1, 9])
    with pytest.raises(ValueError, match=r"stage 1 starts at layer 5, which reuses the selection of layer 4\. Make"):
        p.check_stages(5)
    with pytest.raises(ValueError, match="stage 1 starts at layer 3,.* stage 2 .* layer 6,.* stage 3 .* layer 9,"):
        p.check_stages(3)
    with pytest.raises(ValueError, match="hold 9 layers, the pattern has 10"):
        p.check_stages([4, 5])
    with pytest.raises(ValueError, match=r"layers_per_stage\[1\] to be at least 1, got 0"):
        p.check_stages([4, 0, 6])
    with pytest.raises(ValueError, match="layers_per_stage to be at least 1"):
        p.check_stages(0)


@given(st.tuples(patterns, st.sets(st.integers(1, 90), max_size=6)))
def test_stages_accepted_exactly_when_each_starts_full(case):
    p, cuts = case
    starts = [0, *sorted(cut for cut in cuts if cut < len(p))]
    sizes = [end - start for start, end in zip(starts, [*starts[1:], len(p)], strict=True)]
    shared = [start for start in starts if str(p)[start] == "S"]
    if shared:
        with pytest.raises(ValueError) as error:
            p.check_stages(sizes)
        assert [int(start) for start in re.findall(r"starts at layer (\d+)", str(error.value))] == shared
    else:
        p.check_stages(sizes)
