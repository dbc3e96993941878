"""The loss of a model under any pattern, restarts in the middle, and overlap."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
from hf_models import TOPK, VOCAB, tiny_model
from indexcache_ext.integrations import calibration, checkpoints
from indexcache_ext.integrations.calibration import CalibrationLoss, measure_overlap
from indexcache_ext.integrations.transformers import apply, record_selections, restore
from indexcache_ext.overlap import Overlap, OverlapMeter
from indexcache_ext.schedule import LayerPattern
from indexcache_ext.search import ALL_FULL, greedy_search
from test_search import ink

CONTEXT = 120  # far more than TOPK


def tokens(windows: int = 3, context: int = CONTEXT) -> torch.Tensor:
    return torch.randint(1, VOCAB, (windows, context), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=["glm", "deepseek"])
def loss(request) -> CalibrationLoss:
    return CalibrationLoss(tiny_model(request.param, layers=6), tokens(), batch_size=2)


@pytest.mark.parametrize("pattern", ["FFFFFF", "FFSFSF", "FSFFFF"])
def test_a_trial_has_the_bits_of_a_whole_run(loss: CalibrationLoss, pattern: str) -> None:
    pattern = LayerPattern(pattern)
    candidates = [layer for layer in range(1, 6) if pattern.is_full(layer)]
    found = [dict(loss.trials(pattern, [*candidates, ALL_FULL], batch)) for batch in range(2)]
    for layer in (*candidates, ALL_FULL):
        whole = loss(pattern if layer == ALL_FULL else pattern.share(layer))
        assert (2 * found[0][layer] + found[1][layer]) / 3 == whole
    assert len({*found[0].values()}) == len(found[0])  # the flips matter


def test_a_run_starts_from_the_one_before() -> None:
    """With one batch, a pattern that differs from the last one runs from the first layer that does. The same bits."""
    loss = CalibrationLoss(tiny_model("glm", layers=6), tokens(), batch_size=3)
    patterns = [LayerPattern(p) for p in ("FFFFFF", "FFFFSF", "FFSFSF", "FFSFSF", "FSFFFS", "FFFFFF")]
    asked = [(p, [layer for layer in range(1, 6) if p.is_full(layer)] + [ALL_FULL]) for p in patterns]
    whole = [[loss(p if layer == ALL_FULL else p.share(layer)) for layer in layers] for p, layers in asked]
    starts = []
    with loss.stack.layers[0].register_forward_pre_hook(lambda *_: starts.append(0)):
        found = [[value for _, value in loss.trials(p, layers, 0)] for p, layers in asked]
    assert found == whole and len(starts) == 1


def test_a_search_takes_the_best_of_all_patterns_at_each_step(loss: CalibrationLoss) -> None:
    losses = {p: loss(LayerPattern(p)) for p in ("F" + "".join(rest) for rest in itertools.product("FS", repeat=5))}
    trace, pattern = greedy_search(loss, 6), "F" * 6
    assert trace.full_loss == losses[pattern]
    for flip in trace.flips:
        near = {i: losses[f"{pattern[:i]}S{pattern[i + 1 :]}"] for i in range(1, 6) if pattern[i] == "F"}
        assert flip.candidates == near
        assert flip.layer == min(near, key=lambda i: (near[i], i))
        pattern = f"{pattern[: flip.layer]}S{pattern[flip.layer + 1 :]}"


@pytest.mark.parametrize("family", ["glm", "deepseek"])
def test_the_loss_is_the_stock_models(family: str) -> None:
    model, text = tiny_model(family), tokens()
    unquantised = CalibrationLoss(model, text, quantised=False)(LayerPattern("FFFF"))
    restore(model)
    with torch.no_grad():
        logits = model(input_ids=text, use_cache=False).logits.double()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    assert unquantised == pytest.approx(expected.item(), abs=2e-4)


def test_the_identity_tells_models_and_texts_apart() -> None:
    first = CalibrationLoss(tiny_model("glm"), tokens()).identity
    assert CalibrationLoss(tiny_model("glm"), tokens(), batch_size=2).identity == first
    others = [
        CalibrationLoss(tiny_model("glm", seed=1), tokens()).identity,
        CalibrationLoss(tiny_model("glm"), tokens().roll(1)).identity,
        CalibrationLoss(tiny_model("glm"), tokens(), quantised=False).identity,
    ]
    assert [[key for key in first if other[key] != first[key]] for other in others] == [
        ["model"],
        ["calibration"],
        ["selection"],
    ]


def test_a_loss_whose_model_was_taken_over_is_refused() -> None:
    model = tiny_model("glm")
    first, second = CalibrationLoss(model, tokens()), CalibrationLoss(model, tokens().roll(1))
    with pytest.raises(ValueError, match="the model was applied again since; make a new CalibrationLoss"):
        first(LayerPattern("FSFS"))
    second(LayerPattern("FSFS"))
    restore(model)
    with pytest.raises(ValueError, match="the model runs its stock attention"):
        second(LayerPattern("FSFS"))


def test_a_context_that_selects_everything_is_refused() -> None:
    with pytest.raises(checkpoints.CalibrationError, match=f"of {TOPK} tokens is not longer than index_topk, {TOPK}"):
        CalibrationLoss(tiny_model("glm"), tokens(context=TOPK))


def dense_attention(attention: torch.nn.Module, hidden: torch.Tensor, rope: tuple) -> torch.Tensor:
    """Mean over the heads of the causal attention [length, length], from keys that are expanded, in float64."""
    heads, nope = attention.kv_b_proj.out_features // (attention.qk_nope_head_dim + attention.v_head_dim), None
    nope, rot, length = attention.qk_nope_head_dim, attention.qk_rope_head_dim, hidden.shape[1]
    q = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(hidden))).view(length, heads, -1).double()
    latent, k_rope = attention.kv_a_proj_with_mqa(hidden)[0].split([attention.kv_lora_rank, rot], -1)
    k = attention.kv_b_proj(attention.kv_a_layernorm(latent)).view(length, heads, -1)[..., :nope].double()
    cos, sin = (x[0, :, : rot // 2].double()[:, None] for x in rope)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        even, odd = x.double()[..., ::2], x.double()[..., 1::2]
        return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1)

    scores = torch.einsum("shd,thd->hst", q[..., :nope], k)
    scores += torch.einsum("shd,td->hst", rotated(q[..., nope:]), rotated(k_rope[:, None])[:, 0])
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    return (scores * attention.scaling).masked_fill(~seen, -torch.inf).softmax(-1).mean(0)


@pytest.mark.parametrize("family", ["glm", "deepseek"])
@torch.no_grad()
def test_overlap_and_recall_are_those_of_sets_and_dense_attention(family: str) -> None:
    model, text = tiny_model(family), tokens(2)
    loss = CalibrationLoss(model, text)
    found = measure_overlap(loss, queries=10_000)  # all that see more than TOPK keys
    inputs: list[list[torch.Tensor]] = []
    overlap, recall, count = torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.float64), 0
    for window in text:
        inputs.clear()
        hooks = [
            layer.register_forward_pre_hook(
                lambda module, args, kwargs: inputs.append(
                    dense_attention(module, kwargs["hidden_states"], kwargs["position_embeddings"])
                ),
                with_kwargs=True,
            )
            for layer in (decoder.self_attn for decoder in model.base_model.layers)
        ]
        apply(model, "FFFF")
        with record_selections(model) as recorded:
            model(input_ids=window[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        for query in range(TOPK, CONTEXT):
            sets = [set(recorded[0][layer][0, query].tolist()) for layer in range(4)]
            count += 1
            for i, j in itertools.product(range(4), repeat=2):
                overlap[i, j] += len(sets[i] & sets[j]) / TOPK
                recall[i, j] += inputs[i][query, sorted(sets[j])].sum()
    assert found.queries == count == 2 * (CONTEXT - TOPK)
    torch.testing.assert_close(torch.tensor(found.overlap), overlap / count, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found.recall).double(), recall / count, rtol=1e-4, atol=1e-5)


def test_overlap_of_a_sample_saves_and_draws(loss: CalibrationLoss, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = measure_overlap(loss, queries=7)
    assert found.queries == 7 * 3
    (tmp_path / "overlap.json").write_text(json.dumps(found.to_json()))
    assert Overlap.load(tmp_path / "overlap.json") == found
    found.plot(tmp_path / "map.png", LayerPattern("FSFSSF"))
    assert ink(tmp_path / "map.png") > 0.1
    (tmp_path / "overlap.json").write_text("{}")
    with pytest.raises(ValueError, match="is not an overlap, or it is damaged"):
        Overlap.load(tmp_path / "overlap.json")


def test_an_empty_overlap_is_refused() -> None:
    with pytest.raises(ValueError, match="no query sees more keys than topk"):
        OverlapMeter(3, 8).result()


def test_a_model_with_a_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 1, "b": 2, "?": 0}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tiny_model("glm").config.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("a b b a x " * 9)
    with pytest.raises(checkpoints.CheckpointError, match="has no tokenizer that can be loaded"):
        checkpoints.read_calibration(tmp_path, [tmp_path / "text.txt"], 20, 4)
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    found = checkpoints.read_calibration(tmp_path, [tmp_path / "text.txt"], 20, 4)
    assert found.tolist() == [[1, 2, 2, 1, 0] * 4] * 2


def test_the_hooks_are_gone_after_an_error(monkeypatch) -> None:
    loss = CalibrationLoss(tiny_model("glm"), tokens())
    monkeypatch.setattr(loss, "_loss", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss(LayerPattern("FFFF"))
    assert all(not layer._forward_pre_hooks for layer in loss.stack.layers)
    assert calibration.observer.get() is None
