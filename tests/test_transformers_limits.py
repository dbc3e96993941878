"""What `apply` promises around the numbers: isolation, counters, restore, and refusals of what does not fit."""

from __future__ import annotations

import copy
import importlib.util
import sys
import threading

import pytest
import torch
import transformers
from hf_models import FAMILIES, GREEDY, LENGTH, TOPK, impose, padding, tiny_model, tokens
from transformers import DynamicCache

from indexcache_ext.integrations import transformers as integration
from indexcache_ext.integrations._transformers_forward import make_windows

families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _inference_on_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one only adds waiting to products this small
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


# --- One model, several users -----------------------------------------------------------------------------------------


def test_concurrent_forwards_do_not_mix():
    model = tiny_model("glm")
    info = integration.apply(model, "FSSS")
    inputs = [tokens(1 + i % 2, 150 + 10 * i, seed=i) for i in range(4)]
    results: list = [None] * len(inputs)
    ready = threading.Barrier(len(inputs))

    def work(i: int) -> None:
        with torch.no_grad(), integration.record_selections(model) as recorded:
            ready.wait()
            results[i] = [model(inputs[i]).logits for _ in range(5)], recorded

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert info.forwards == 20 and info.tokens == 5 * sum(ids.numel() for ids in inputs) == info.indexer_calls
    integration.restore(model)
    for ids, (logits, recorded) in zip(inputs, results, strict=True):
        assert [entry[0].shape for entry in recorded] == [(*ids.shape, TOPK)] * 5
        with impose(model, info.pattern, recorded):
            for ours in logits:
                torch.testing.assert_close(ours, model(ids).logits, rtol=1e-4, atol=1e-4)


@families
def test_counters_and_shared_layers_leave_their_indexer_alone(family):
    model, ids = tiny_model(family), tokens(2, 50)
    calls = []
    for layer, decoder in enumerate(model.model.layers):
        decoder.self_attn.indexer.wk.register_forward_hook(lambda *_, layer=layer: calls.append(layer))
    info = integration.apply(model, "FSSF")
    model.generate(ids, max_new_tokens=4, **GREEDY)
    assert calls == [0, 3] * 4
    assert (info.forwards, info.tokens, info.indexer_calls) == (4, 106, 212)
    assert info.indexer_calls_per_token == 2.0 and integration.stats(model) is info
    info.reset()
    assert (info.forwards, info.tokens, info.indexer_calls, info.indexer_calls_per_token) == (0, 0, 0, 0.0)


@families
def test_restore_gives_the_stock_model_back(family):
    model, ids = tiny_model(family), tokens(2, LENGTH)
    expected, names = model(ids).logits, set(vars(model.model.layers[0].self_attn)) | set(vars(model.model))
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    types = list(map(type, model.modules()))
    integration.apply(model, "FSSS")
    assert model.config.to_dict() == config
    assert not torch.allclose(model(ids).logits, expected, atol=1e-2)
    integration.apply(model, "FFSS", quantised=False)  # a second apply replaces the first
    with integration.record_selections(model) as recorded:
        model(ids)
    assert sorted(recorded[0]) == [0, 1]
    integration.restore(model)
    assert torch.equal(model(ids).logits, expected)
    assert list(map(type, model.modules())) == types
    assert names == set(vars(model.model.layers[0].self_attn)) | set(vars(model.model))
    assert model.config.to_dict() == config and model.generation_config.to_dict() == generation
    integration.restore(model)  # nothing left to undo
    with pytest.raises(ValueError, match="call apply"):
        integration.stats(model)


def test_a_copy_is_its_own_model_and_hidden_states_come_out():
    model, ids = tiny_model("deepseek"), tokens(1, 100)
    info = integration.apply(model, "FSFS")
    expected = model(ids, output_hidden_states=True)
    assert len(expected.hidden_states) == 5
    twin = copy.deepcopy(model)
    info.reset()
    assert torch.equal(twin(ids).logits, expected.logits)
    assert info.forwards == 0 and integration.stats(twin).pattern == info.pattern
    integration.restore(twin)
    assert torch.equal(model(ids).logits, expected.logits) and info.forwards == 1


def test_the_checkpoints_own_pattern_is_the_default():
    model, ids = tiny_model("glm", pattern="FFSS"), tokens(2, LENGTH)
    info = integration.apply(model)
    assert str(info.pattern) == "FFSS"
    with integration.record_selections(model) as recorded:
        ours = model(ids).logits
    integration.restore(model)
    with impose(model, info.pattern, recorded):
        torch.testing.assert_close(ours, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert str(integration.apply(model, "FSSS").pattern) == "FSSS"
    assert str(integration.apply(tiny_model("deepseek")).pattern) == "FFFF"
    assert integration.apply(model.model, "FSSS").indexer_calls == 0  # the stack without its head
    assert model.model(ids).last_hidden_state.shape == (2, LENGTH, 48)


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("FFF", ValueError, "'FFF' has 3 layers, the model has 4"),
        ("SFFF", ValueError, "layer 0 of 'SFFF' is Shared"),
        ("FFXF", ValueError, "got 'X'"),
        (["full"] * 4, TypeError, "LayerPattern or a string, got list"),
        ("FFFS", ValueError, "layer 2 cannot be Full: the model has no indexer weights"),
    ],
)
def test_patterns_that_do_not_fit_are_refused_and_change_nothing(pattern, error, message):
    model, ids = tiny_model("glm", pattern="FFSS"), tokens(1, 60)
    expected = model(ids).logits
    with pytest.raises(error, match=message):
        integration.apply(model, pattern)
    assert torch.equal(model(ids).logits, expected)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="GlmMoeDsaForCausalLM.*got Linear"):
        integration.apply(torch.nn.Linear(2, 2), "F")
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    llama = transformers.LlamaConfig(**sizes)
    with pytest.raises(TypeError, match="got LlamaForCausalLM"):
        integration.apply(transformers.LlamaForCausalLM(llama), "F")
    with pytest.raises(ValueError, match="layer 0: expected kv_b_proj .* or bfloat16, got Linear in float16"):
        integration.apply(tiny_model("glm", dtype=torch.float16))
    with pytest.raises(ValueError, match=r"on one device, got \['meta'\]"):
        integration.apply(tiny_model("glm").to("meta"))
    model = tiny_model("glm")
    model.model.layers[2].self_attn.forward = model.model.layers[2].self_attn.forward
    with pytest.raises(ValueError, match="forward of layer 2 is already replaced"):
        integration.apply(model)
    model = tiny_model("glm")
    integration.apply(model)
    model.model.layers[1].self_attn.kv_b_proj = torch.nn.Sequential(model.model.layers[1].self_attn.kv_b_proj)
    with pytest.raises(TypeError, match="layer 1: expected kv_b_proj to be a plain nn.Linear, .* got Sequential"):
        model(tokens(1, 8))


def test_calls_that_do_not_fit_are_refused():
    model, ids = tiny_model("glm"), tokens(2, 40)
    stock_cache = model(ids).past_key_values
    integration.apply(model, "FSFS")
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="layer 0 of the DynamicCache has no room for index keys"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="filled by the stock model"):
        model(ids, past_key_values=stock_cache)
    cache = model(ids).past_key_values
    integration.apply(model, "FFFF")
    with pytest.raises(ValueError, match="under another pattern"):
        model(ids, past_key_values=cache)
    with pytest.raises(RuntimeError, match="call the model, not a single layer"):
        model.model.layers[0](torch.zeros(1, 1, 48), position_embeddings=(torch.ones(1, 1, 8), torch.zeros(1, 1, 8)))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()


def test_other_versions_of_transformers_are_refused(monkeypatch):
    spec = importlib.util.spec_from_file_location("indexcache_ext.integrations.copy", integration.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.18.0")
    with pytest.raises(ImportError, match="supports transformers 5.17, .* found 5.18.0"):
        spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="needs transformers 5.17: pip install"):
        spec.loader.exec_module(module)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 8), r"expected attention_mask \[2, tokens\] or 4D, got \[3, 8\]"),
        (torch.ones(2, 8, 8), r"got \[2, 8, 8\]"),
        (torch.ones(2, 1, 8, 9, dtype=torch.bool), r"4D attention_mask \[2, 1, 8, 8\], got \[2, 1, 8, 9\]"),
        (torch.ones(2, 4, 8, 8, dtype=torch.bool), r"got \[2, 4, 8, 8\]"),
        (torch.full((2, 1, 8, 8), 0.5), "neither show nor hide"),
        (~torch.eye(8, dtype=torch.bool).expand(2, 1, 8, 8), "hides a key from a query that sees keys on both sides"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, message):
    model = tiny_model("glm", layers=1)
    integration.apply(model)
    with pytest.raises(ValueError, match=message):
        model(tokens(2, 8), attention_mask=mask)


# --- Windows against the mask they stand for --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_windows_show_exactly_what_the_mask_shows(seed):
    generator = torch.Generator().manual_seed(seed)
    batch, length, past, spare = (int(torch.randint(low, 6, (), generator=generator)) for low in (1, 1, 0, 0))
    keys, seen = past + length + spare, past + length
    density = (0.0, 0.4, 0.9, 1.0)[seed % 4]
    mask = (torch.rand(batch, seen, generator=generator) < density).long()
    expected = torch.zeros(batch, length, batch, keys, dtype=torch.bool)
    for b in range(batch):
        for s in range(length):
            expected[b, s, b, : past + s + 1] = mask[b, : past + s + 1].bool()
    own = torch.stack([expected[b, :, b] for b in range(batch)])[:, None]
    for form in (mask, own):
        windows = make_windows(batch, length, past, keys, form, None, "cpu")
        rows = torch.arange(batch * keys) if windows.rows is None else windows.rows
        shown = torch.zeros(batch * length, batch * keys, dtype=torch.bool)
        for query, (start, stop) in enumerate(zip(windows.starts.tolist(), windows.ends.tolist(), strict=True)):
            shown[query, rows[start:stop].long()] = True
        assert torch.equal(shown, expected.view_as(shown))
        assert windows.bounds[-1] == len(rows)
