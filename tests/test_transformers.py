"""Hugging Face DSA models on the ops: against the stock eager model, given the same selection."""

from __future__ import annotations

import pytest
import torch
from hf_models import FAMILIES, GREEDY, LENGTH, TOPK, impose, layer_inputs, padding, record_stock, tiny_model, tokens
from transformers import DynamicCache, StaticCache

from indexcache_ext.integrations import transformers as integration

PATTERNS = ["FFFF", "FSFS", "FFSF", "FSSS"]
CACHES = {"dynamic": lambda config: DynamicCache(config=config), "static": lambda config: StaticCache(config, 320)}
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _inference_on_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one only adds waiting to products this small
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def stock_on_same_selection(model, info, recorded, *args, **kwargs):
    """The stock model's output on recorded selections; the model is stock again afterwards."""
    integration.restore(model)
    with impose(model, info.pattern, recorded):
        return model(*args, **kwargs)


# --- Prefill ----------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("quantised", [True, False])
def test_logits_agree_with_stock_on_the_same_selection(family, pattern, quantised):
    model, ids = tiny_model(family), tokens(2, LENGTH)
    info = integration.apply(model, pattern, quantised=quantised)
    with integration.record_selections(model) as recorded:
        ours = model(ids, use_cache=False).logits
    assert sorted(recorded[0]) == [layer for layer in range(4) if info.pattern.is_full(layer)]
    stock = stock_on_same_selection(model, info, recorded, ids, use_cache=False).logits
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@families
@pytest.mark.parametrize("side", ["left", "right", "middle"])
@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padded_batches(family, side, quantised, attention):
    model, ids, mask = tiny_model(family, attn_implementation=attention), tokens(3, LENGTH), padding(3, LENGTH, side)
    info = integration.apply(model, "FFSF", quantised=quantised)
    with integration.record_selections(model) as recorded:
        ours = model(ids, attention_mask=mask, use_cache=False).logits
    # No query of the padded sequence selects padding, whichever sequence its key rows are laid behind.
    for selection in recorded[0].values():
        chosen = selection[-1][selection[-1] >= 0].long()
        assert mask[-1, chosen].all() and (selection < LENGTH).all()
    stock = stock_on_same_selection(model, info, recorded, ids, attention_mask=mask, use_cache=False).logits
    real = mask.bool()
    torch.testing.assert_close(ours[real], stock[real], rtol=1e-4, atol=1e-4)
    assert ours.isfinite().all()


def assert_rows_agree(ours, expected, share=0.98):
    """All but a few rows agree to f32 accuracy: a selection may turn over where two scores differ in the last bits."""
    agree = ((ours - expected).abs() <= 1e-4 * (1 + expected.abs())).all(-1)
    assert agree.float().mean() >= share, agree.float().mean()


@families
def test_padding_does_not_change_a_sequence(family):
    model, ids = tiny_model(family, layers=1), tokens(1, 200)
    integration.apply(model)
    alone = model(ids).logits
    padded, mask = torch.cat([torch.zeros(1, 70, dtype=torch.long), ids], -1), torch.ones(2, 270, dtype=torch.long)
    mask[0, :70] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    both = model(torch.cat([padded, tokens(1, 270, seed=9)]), attention_mask=mask, position_ids=positions).logits
    assert_rows_agree(both[0, 70:], alone[0])


@families
@pytest.mark.parametrize("side", [None, "left", "right", "middle"])
def test_unquantised_selection_is_the_stock_selection(family, side):
    model, ids = tiny_model(family), tokens(2, LENGTH)
    mask = None if side is None else padding(2, LENGTH, side)
    with record_stock(model) as stock, layer_inputs(model) as inputs:
        model(ids, attention_mask=mask, use_cache=False)
    integration.apply(model, quantised=False)
    with integration.record_selections(model) as recorded, layer_inputs(model, inputs):
        model(ids, attention_mask=mask, use_cache=False)
    real = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    assert len(stock) == 4
    for layer, (selection,) in stock.items():
        ours = recorded[0][layer].sort(-1).values  # the -1 of a short row come first, in both
        assert torch.equal(ours[real], selection.sort(-1).values[real].int()), f"layer {layer}"


@families
def test_where_the_selections_differ_the_scores_tie(family):
    # With 2 heads a quarter of the keys scores exactly 0, so the 32nd best is often one of many equals.
    model, ids = tiny_model(family, layers=1, index_n_heads=2), tokens(1, LENGTH)
    inputs = {}
    attention = model.model.layers[0].self_attn
    attention.indexer.register_forward_pre_hook(
        lambda _, args: inputs.update(hidden=args[0], latent=args[1], rope=args[2])
    )
    with record_stock(model) as stock:
        model(ids, use_cache=False)
    integration.apply(model, quantised=False)
    with integration.record_selections(model) as recorded:
        model(ids, use_cache=False)
    ours, theirs = recorded[0][0][0], stock[0][0][0]

    indexer, (cos, sin) = attention.indexer.double(), (part[0].double() for part in inputs["rope"])
    q = indexer.wq_b(inputs["latent"].double())[0].view(LENGTH, 2, -1)
    k = indexer.k_norm(indexer.wk(inputs["hidden"].double()))[0]
    q, k = _rotate(q, cos[:, None], sin[:, None], family), _rotate(k, cos, sin, family)
    weights = indexer.weights_proj(inputs["hidden"].double())[0]
    scores = torch.einsum("th,thn->tn", weights, torch.einsum("thd,nd->thn", q, k).relu())
    swapped = 0
    for query in range(LENGTH):
        mine, stocks = set(ours[query].tolist()) - {-1}, set(theirs[query].tolist()) - {-1}
        assert len(mine) == len(stocks) == min(TOPK, query + 1)
        values = scores[query, sorted(mine ^ stocks)]
        assert (values == 0).all(), f"query {query}"
        assert not mine - stocks or max(mine - stocks) < min(stocks - mine)  # the lowest position wins the tie
        swapped += len(mine - stocks)
    assert swapped > 0


def _rotate(x, cos, sin, family):
    rot = cos.shape[-1]
    cos, sin = cos[..., : rot // 2], sin[..., : rot // 2]
    first, second = (x[..., 0:rot:2], x[..., 1:rot:2]) if family == "glm" else x[..., :rot].chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., rot:]], dim=-1)


@families
def test_fp8_keeps_most_picks(family):
    model, ids = tiny_model(family), tokens(2, LENGTH)
    integration.apply(model, "FFSF")
    shares = integration.selection_agreement(model, ids, padding(2, LENGTH, "left"))
    assert sorted(shares) == [0, 1, 3]
    assert all(0.95 < share < 1.0 for share in shares.values()), shares
    integration.apply(model, "FFSF", hadamard=True, ue8m0=True)
    assert integration.selection_agreement(model, ids) != shares
    integration.apply(model, "FFSF", quantised=False)
    assert set(integration.selection_agreement(model, ids).values()) == {1.0}
    assert integration.selection_agreement(model, ids[:, :TOPK]) == {}


@families
def test_bfloat16(family):
    model, ids = tiny_model(family, dtype=torch.bfloat16), tokens(2, LENGTH)
    info = integration.apply(model, "FSFS")
    with integration.record_selections(model) as recorded:
        ours = model(ids, use_cache=False).logits
    assert ours.dtype == torch.bfloat16
    stock = stock_on_same_selection(model, info, recorded, ids, use_cache=False).logits
    exact = stock_on_same_selection(model.float(), info, recorded, ids, use_cache=False).logits
    # Absorbed and expanded form round at different places: ours may be as far from the f32 model as the stock is.
    assert (ours - exact).abs().mean() < 1.3 * (stock - exact).abs().mean()


@families
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_sequences(family, use_cache):
    # The stock model reads restarting positions as packed sequences, but not where it makes a cache.
    model, ids = tiny_model(family), tokens(1, 270)
    info = integration.apply(model, "FSFS")
    call = dict(input_ids=ids, position_ids=torch.cat([torch.arange(150), torch.arange(120)])[None], use_cache=use_cache)
    with integration.record_selections(model) as recorded:
        ours = model(**call).logits
    visible = torch.arange(270) + 1 if use_cache else call["position_ids"][0] + 1
    assert torch.equal((recorded[0][2][0] >= 0).sum(-1), visible.clamp(max=TOPK))
    torch.testing.assert_close(ours, stock_on_same_selection(model, info, recorded, **call).logits, rtol=1e-4, atol=1e-4)


def test_4d_masks_and_positional_arguments():
    model, ids, mask = tiny_model("glm"), tokens(2, 100), padding(2, 100, "left", 30)
    integration.apply(model, "FSFS")
    expected = model(ids, attention_mask=mask).logits
    shown = torch.ones(100, 100, dtype=torch.bool).tril() & mask[:, None, None].bool()
    additive = torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)
    for full in (shown, additive, additive.masked_fill(~shown, -torch.inf)):
        assert torch.equal(model(ids, attention_mask=full).logits, expected)
    assert torch.equal(model(ids, mask).logits, expected)
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(ids), attention_mask=mask).logits, expected)


# --- Caches and generation --------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_chunks_give_what_one_prefill_gives(family, make_cache, side):
    model, ids = tiny_model(family), tokens(2, LENGTH)
    mask = padding(2, LENGTH, side) if side else torch.ones(2, LENGTH, dtype=torch.long)
    info = integration.apply(model, "FSFS")
    with integration.record_selections(model) as whole:
        model(ids, attention_mask=mask)
    cache, parts = make_cache(model.config), []
    with integration.record_selections(model) as chunks:
        for start, stop in [(0, 120), (120, 121), (121, 299), (299, LENGTH)]:
            shown = mask[:, :stop] if side else None
            parts.append(model(ids[:, start:stop], attention_mask=shown, past_key_values=cache).logits)
    real = mask.bool()
    joined = {layer: torch.cat([chunk[layer] for chunk in chunks], 1) for layer in (0, 2)}
    # Layer 0 selects the same from its cached keys, but for picks that turn over with the shapes of the products.
    assert (joined[0] == whole[0][0])[real].all(-1).float().mean() > 0.98
    stock = stock_on_same_selection(model, info, [joined], ids, attention_mask=mask).logits
    torch.testing.assert_close(torch.cat(parts, 1)[real], stock[real], rtol=1e-4, atol=1e-4)
    held = integration.cache_bytes(cache)
    assert held.latent == 2 * held.tokens * info.latent_bytes_per_token == 2 * held.tokens * 4 * (24 + 8) * 4
    assert held.index_keys == 2 * held.tokens * info.index_key_bytes_per_token == 2 * held.tokens * 2 * (32 + 4)
    assert [layer.is_indexer_initialized for layer in cache.layers] == [True, False, True, False]


@families
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("pattern", ["FFFF", "FSSF"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_equals_stock_on_the_same_selections(family, cache, quantised, pattern, side):
    model, ids, mask = tiny_model(family), tokens(2, 80), padding(2, 80, side, 30)
    settings = dict(attention_mask=mask, max_new_tokens=8, cache_implementation=cache, **GREEDY)
    info = integration.apply(model, pattern, quantised=quantised)
    with integration.record_selections(model) as recorded:
        ours = model.generate(ids, **settings)
    assert len(recorded) == 8 and recorded[-1][0].shape == (2, 1, TOPK)
    integration.restore(model)
    with impose(model, info.pattern, recorded):
        assert torch.equal(model.generate(ids, **settings), ours)
    assert len(set(ours[0, 80:].tolist())) > 1


@families
@pytest.mark.parametrize("quantised", [True, False])
def test_beams_reorder_latents_and_index_keys(family, quantised):
    model, ids = tiny_model(family), tokens(2, 60)
    settings = dict(max_new_tokens=8, num_beams=3, return_dict_in_generate=True, **GREEDY)
    info = integration.apply(model, "FSFS", quantised=quantised)
    with integration.record_selections(model) as recorded:
        ours = model.generate(ids, **settings)
    assert len(set(ours.beam_indices.flatten().tolist())) > 2  # beams did change places
    # The index keys moved along with the beams: the last step selects what a prefill of the same tokens selects.
    with integration.record_selections(model) as again:
        model(ours.sequences[:, :-1])
    first_beams = [recorded[-1][0][int(beam)] for beam in ours.beam_indices[:, -1]]
    picks = zip(torch.stack(first_beams)[:, 0], again[0][0][:, -1], strict=True)
    assert all(len(set(a.tolist()) & set(b.tolist())) >= TOPK - 2 for a, b in picks)
    integration.restore(model)
    with impose(model, info.pattern, recorded):
        assert torch.equal(model.generate(ids, **settings).sequences, ours.sequences)


@families
def test_crop_forgets_the_last_tokens(family):
    model, ids = tiny_model(family, layers=1), tokens(1, 100)
    integration.apply(model)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    cache.crop(-40)
    again = model(ids[:, 60:], past_key_values=cache).logits
    assert_rows_agree(again, model(ids).logits[:, 60:], share=0.95)


# --- Training ---------------------------------------------------------------------------------------------------------


@families
@torch.enable_grad()
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_gradients_equal_stock_on_the_same_selection(family, checkpointing):
    model, ids, mask = tiny_model(family).train(), tokens(2, 120), padding(2, 120, "left", 40)
    info = integration.apply(model, "FSFS")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    # The last padding token predicts the first real one, but what it attends to, seeing nothing, is nobody's business.
    scored = mask.bool() & mask.roll(1, dims=-1).bool()
    call = dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(~scored, -100), use_cache=False)
    with integration.record_selections(model) as recorded:
        loss = model(**call).loss
    loss.backward()
    assert info.indexer_calls == 2 * ids.numel()  # a replayed layer keeps its selection
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_disable()
    stock_loss = stock_on_same_selection(model, info, recorded, **call).loss
    stock_loss.backward()
    torch.testing.assert_close(loss, stock_loss, rtol=1e-5, atol=1e-5)
    trained = 0
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            assert ours[name] is None and parameter.grad is None
            continue
        assert (ours[name] is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-4 * max(scale, 1e-3), msg=name)
            trained += scale > 0
    assert trained > 30


@torch.enable_grad()
def test_a_training_step_lowers_the_loss_and_evaluation_stays_on_the_ops():
    model, ids = tiny_model("glm", attention_dropout=0.1).train(), tokens(2, 100)
    integration.apply(model, "FSSS")  # one selection, before anything that the two attention paths round differently
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(model(ids).logits, model(ids).logits)  # dropout is on
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    with_graph = model(ids).logits  # plain torch
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, with_graph, rtol=1e-4, atol=1e-4)
