"""The demonstration: its text, the training script, the shipped checkpoint, and what `indexcache demo` answers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from indexcache_ext.cli import main
from indexcache_ext.demo import dsa, run, text, train
from indexcache_ext.search import SearchTrace
from safetensors.torch import load_file, save_file
from transformers import GlmMoeDsaForCausalLM

SMALL = ["--tokens", "1024", "--context", "512", "--generate", "8", "--device", "cpu"]


@pytest.fixture
def library(tmp_path) -> Path:
    """A small library of Python source with some of everything in it."""
    root = tmp_path / "library"
    for i in range(60):
        file = root / ("package" if i % 2 else ".") / f"module{i}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"def function{i}(value):\n    return value + {i}\n" * 8)
    for name in ("test/test_x.py", "site-packages/other.py", "__pycache__/cached.py", "notes.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("not part of the text")
    return root


# --- text


def test_split_depends_on_names_only(library, tmp_path):
    names = [name for name, _ in text.library_files(library)]
    assert len(names) == 60 and names == sorted(names)
    held_out = {name for name in names if text.is_held_out(name)}
    assert 0 < len(held_out) < 15
    copy = shutil.copytree(library, tmp_path / "copy")
    assert text.heldout_text(copy) == text.heldout_text(library)
    assert text.training_text(copy) == text.training_text(library)
    for name, path in text.library_files(library):
        mark = path.read_bytes()
        assert (mark in text.heldout_text(library)) == (name in held_out)
        assert (mark in text.training_text(library)) == (name not in held_out)
    assert b"not part" not in text.training_text(library) + text.heldout_text(library)


def test_split_never_changes():
    """Another split would test the shipped checkpoint on what it was trained on."""
    names = [f"module{i}.py" for i in range(1000)]
    held_out = [i for i, name in enumerate(names) if text.is_held_out(name)]
    assert held_out[:6] == [5, 19, 87, 90, 110, 118]
    assert not text.is_held_out("argparse.py")


def test_library_of_this_interpreter():
    training, held_out = text.training_text(), text.heldout_text()
    assert len(training) > 10 * len(held_out) > 10 * 4096
    assert b"class ArgumentParser" in training


def test_unreadable_files_are_left_out(library):
    whole = text.training_text(library)
    (library / "gone.py").symlink_to(library / "missing.py")
    assert text.training_text(library) == whole


def test_no_source(tmp_path):
    with pytest.raises(text.TextError, match=r"no Python source found under .*--text FILE"):
        text.training_text(tmp_path)


def test_windows_cover_the_text():
    source = bytes(range(100))
    assert text.windows(source, 10, 3) == [source[0:10], source[45:55], source[90:100]]
    assert b"".join(text.windows(source, 10, 50)) == source
    assert text.windows(source, 100, 5) == [source]
    with pytest.raises(text.TextError, match="100 bytes, fewer than one window of 101"):
        text.windows(source, 101, 5)


# --- training


def tiny_model(**overrides) -> GlmMoeDsaForCausalLM:
    torch.manual_seed(0)
    config = train.demo_config(
        num_hidden_layers=3, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, index_topk=16, **overrides
    )
    return GlmMoeDsaForCausalLM(config)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(256, (2, 90), generator=torch.Generator().manual_seed(1))


def test_kl_against_fp64():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 7, 7, generator=generator)
    visible = torch.ones(7, 7, dtype=torch.bool).tril()
    p = torch.randn(3, 7, 7, generator=generator).masked_fill(~visible, -torch.inf).softmax(-1)
    expected = 0.0
    for b in range(3):
        for row in range(7):
            q = scores[b, row, : row + 1].double().softmax(-1)
            expected += (p[b, row, : row + 1].double() * (p[b, row, : row + 1].double() / q).log()).sum() / 21
    assert dsa.kl_per_row(p, scores, visible).item() == pytest.approx(expected.item(), rel=1e-5)


def test_training_attention_agrees_with_stock_code(tokens):
    """Sparse and dense, with scores far apart: three layers of 90 tokens of which 16 are selected."""
    model = tiny_model(initializer_range=0.3).eval()
    with torch.no_grad():
        sparse = model(input_ids=tokens, use_cache=False).logits
        for layer in model.model.layers:
            layer.self_attn.indexer.index_topk = tokens.shape[1]
        dense = model(input_ids=tokens, use_cache=False).logits
        assert (sparse - dense).abs().max() > 0.1
        for stage, stock in ("sparse", sparse), ("language", dense), ("warm-up", dense):
            with dsa.TrainableDsa(model, stage):
                ours = model(input_ids=tokens, use_cache=False).logits
            torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(model(input_ids=tokens, use_cache=False).logits, dense)  # stock code again


def test_losses_stay_apart(tokens):
    """KL trains the indexers only, and the next-byte loss everything else only."""
    model = tiny_model().train()
    with dsa.TrainableDsa(model, "warm-up"), torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".indexer." in name), name
    model.zero_grad()
    with dsa.TrainableDsa(model, "language"):
        logits = model(input_ids=tokens, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (".indexer." in name), name


def test_every_expert_is_the_stock_mixture():
    experts = tiny_model().model.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(20, 64, generator=generator)
    picks = torch.rand(20, 4, generator=generator).topk(2)
    stock = experts(hidden, picks.indices, picks.values)
    torch.testing.assert_close(dsa.all_experts(experts, hidden, picks.indices, picks.values), stock)


def test_learning_rate_rises_and_falls():
    rates = [dsa.rate(step, 2000) for step in range(2000)]
    assert rates[:100] == sorted(rates[:100]) and rates[100:] == sorted(rates[100:], reverse=True)
    assert max(rates) == 1.0 and rates[-1] == pytest.approx(0.02, abs=1e-3)
    assert rates[:30] == [dsa.rate(step, None) for step in range(30)]  # while the pace is being measured


def test_training(library, tmp_path):
    """All stages on a small model: both losses fall, and the checkpoint scores what its log says under stock code."""
    out = tmp_path / "out"
    log = train.train(
        out, steps=[40, 30, 10], context=96, device="cpu", limit=4, config=tiny_model().config, library=library
    )
    assert log == json.loads((out / "training.json").read_text())
    stages = {entry["stage"]: entry for entry in log["stages"]}
    assert [entry["steps"] for entry in log["stages"]] == [40, 30, 10]
    language, warm_up = stages["language"]["history"], stages["warm-up"]["history"]
    assert language[0]["loss"] == pytest.approx(5.55, abs=0.3)  # ln 257: nothing known yet
    assert language[-1]["loss"] < language[0]["loss"] - 1.5
    assert warm_up[-1]["kl"] < 0.7 * warm_up[0]["kl"]
    model = run.load_model(out, torch.device("cpu"))
    loss = train.heldout_loss(model, text.heldout_text(library), 96, limit=4)
    assert loss == pytest.approx(log["held_out_nats_per_byte"]["sparse"], abs=2e-3)
    assert model.model.layers[0].self_attn.indexer.index_topk == 16
    with torch.no_grad():  # the file holds bf16
        assert all(tensor.dtype != torch.float32 for name, tensor in load_file(out / "model.safetensors").items()
                   if "e_score_correction_bias" not in name and "weights_proj" not in name)  # fmt: skip


def test_training_repeats(library, tmp_path):
    logs = []
    for name in "ab":
        out = tmp_path / name
        config = tiny_model().config
        train.train(out, steps=[3, 2, 2], context=64, device="cpu", limit=1, config=config, library=library)
        logs.append((out / "model.safetensors").read_bytes())
    assert logs[0] == logs[1]


@pytest.mark.parametrize("steps", ["3,2", "1,2,x", "1,0,1", ""])
def test_training_refuses_steps(steps, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_code:
        train.main(["--out", str(tmp_path), "--steps", steps])
    assert exit_code.value.code == 2
    assert "expected three positive numbers" in capsys.readouterr().err


# --- the demo on the shipped checkpoint


def test_shipped_checkpoint():
    model = run.load_model(run.CHECKPOINT, torch.device("cpu"))
    log = json.loads((run.CHECKPOINT / "training.json").read_text())
    config = model.config
    assert sum(p.numel() for p in model.parameters()) == log["parameters"]
    assert 1e6 <= log["parameters"] <= 3e6 and config.num_hidden_layers >= 8
    assert config.index_topk == 64 and log["context"] >= 1024
    assert sum(file.stat().st_size for file in run.CHECKPOINT.iterdir()) < 6.5e6
    assert {"command", "seed", "stages", "torch", "transformers"} <= log.keys()


def test_demo_json(capsys, device):
    assert main(["demo", "--json", *SMALL, "--device", device]) == 0
    out = capsys.readouterr().out
    result = json.loads(out)
    rows = result["patterns"]
    trace = SearchTrace.load(run.CHECKPOINT / "trace.json")
    half, quarter = str(trace.pattern(1 / 2)), str(trace.pattern(1 / 4))
    assert [row["pattern"] for row in rows] == ["FFFFFFFF", "FSFSFSFS", half, "FSSSFSSS", quarter, "FSSSSSSS"]
    assert [row["chosen"] for row in rows] == ["all", "uniform", "searched", "uniform", "searched", "uniform"]
    assert [row["indexer_calls_per_token"] for row in rows] == [8, 4, 4, 2, 2, 1]
    config = run.load_model(run.CHECKPOINT, torch.device("cpu")).config
    key = config.index_head_dim + 4  # e4m3 bytes and an f32 scale
    assert [row["index_key_bytes_per_token"] for row in rows] == [n * key for n in (8, 4, 4, 2, 2, 1)]
    assert all(row["prefill_ms"] > 0 and row["decode_ms"] > 0 and row["generated"] for row in rows)
    assert all(row["loss"] < 2 for row in rows)
    assert rows[4]["loss"] < rows[3]["loss"] - 0.05  # a quarter of the indexers: searched, and uniform
    assert result["text"]["bytes"] == 1024 and result["text"]["context"] == 512


def test_demo_without_a_trace_and_with_a_wrong_one(checkpoint, capsys):
    (checkpoint / "trace.json").unlink()
    assert list(run.choose_patterns(checkpoint, 8).values()) == ["all", "uniform", "uniform", "uniform"]
    shutil.copy(run.CHECKPOINT / "trace.json", checkpoint)
    with pytest.raises(run.CheckpointError, match="is of a model of 8 layers, not 9"):
        run.choose_patterns(checkpoint, 9)
    (checkpoint / "trace.json").write_text("{}")
    assert "is not a trace of a search" in refusal(capsys, "--model", str(checkpoint))


def test_demo_loss_is_the_stock_models(capsys, device):
    """All layers Full is the model as trained; only the FP8 of the indexer is ours."""
    assert main(["demo", "--json", *SMALL, "--device", device]) == 0
    row = json.loads(capsys.readouterr().out)["patterns"][0]
    model = run.load_model(run.CHECKPOINT, torch.device("cpu"))
    stock = train.heldout_loss(model, text.heldout_text(), 512, limit=2)
    assert row["loss"] == pytest.approx(stock, abs=0.01)


def test_demo_table(capsys, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("def add(a, b):\n    return a + b\n\n\n" * 40)
    threads = torch.get_num_threads()
    assert main(["demo", "--text", str(file), *SMALL]) == 0
    assert torch.get_num_threads() == threads
    captured = capsys.readouterr()
    for words in ("nats/byte", "8 of 8", "4 of 8", "2 of 8", "1 of 8", str(file), "1 of 8 indexers (FSSSSSSS) write:"):
        assert words in captured.out


def test_demo_takes_any_bytes(capsys, tmp_path):
    file = tmp_path / "bytes"
    file.write_bytes(bytes(range(256)) * 3)
    assert main(["demo", "--json", "--text", str(file), *SMALL]) == 0
    assert all(0 < row["loss"] < 50 for row in json.loads(capsys.readouterr().out)["patterns"])


def test_printable():
    assert run.printable("a\tb\n\x1b[31m\x00", "utf-8") == "a\tb\n?[31m?"
    assert run.printable("größe \ufffd", "utf-8") == "größe \ufffd"
    assert run.printable("größe", "ascii") == run.printable("größe", None) == "gr??e"


def refusal(capsys, *arguments: str) -> str:
    assert main(["demo", *SMALL, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_bad_text(capsys, tmp_path):
    empty, short = tmp_path / "empty", tmp_path / "short"
    empty.touch()
    short.write_bytes(b"x" * 511)
    assert "missing cannot be read: No such file" in refusal(capsys, "--text", str(tmp_path / "missing"))
    assert "cannot be read: Is a directory" in refusal(capsys, "--text", str(tmp_path))
    assert "empty is empty; give a file with some text" in refusal(capsys, "--text", str(empty))
    message = refusal(capsys, "--text", str(short))
    assert "the text has 511 bytes, the model reads windows of 512" in message and "--context N" in message


def test_bad_sizes(capsys):
    assert "--context: expected 65 to 4096 bytes" in refusal(capsys, "--context", "64")
    assert "--context: expected 65 to 4096 bytes" in refusal(capsys, "--context", "5000")
    assert "--generate: expected fewer bytes than the context of 512" in refusal(capsys, "--generate", "512")


def test_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no GPU here; leave --device out" in refusal(capsys, "--device", "cuda")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return shutil.copytree(run.CHECKPOINT, tmp_path / "checkpoint")


def test_another_checkpoint(capsys, checkpoint):
    assert main(["demo", "--json", "--model", str(checkpoint), *SMALL]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["path"] == str(checkpoint)


def test_missing_checkpoint(capsys, checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert "model.safetensors is missing; name another folder" in refusal(capsys, "--model", str(checkpoint))
    assert "config.json is missing" in refusal(capsys, "--model", str(checkpoint / "nowhere"))


@pytest.mark.parametrize("size", [0, 5, 1000, 1_000_000])
def test_truncated_checkpoint(capsys, checkpoint, size):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "cannot be loaded, it is damaged" in refusal(capsys, "--model", str(checkpoint))


def test_bad_config(capsys, checkpoint):
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"model_type": "llama"}))
    assert "expected model_type 'glm_moe_dsa' with vocab_size 257 (bytes), got 'llama'" in refusal(
        capsys, "--model", str(checkpoint)
    )
    file.write_text(json.dumps(config | {"vocab_size": 154880}))
    assert "got 'glm_moe_dsa' with 154880" in refusal(capsys, "--model", str(checkpoint))
    file.write_text(json.dumps(config | {"hidden_size": 128}))
    assert "cannot be loaded, it is damaged" in refusal(capsys, "--model", str(checkpoint))
    file.write_text("[1, 2]")
    assert "holds no config, but list" in refusal(capsys, "--model", str(checkpoint))
    file.write_text("{")
    assert "config.json cannot be read" in refusal(capsys, "--model", str(checkpoint))


def test_incomplete_checkpoint(capsys, checkpoint):
    """A missing tensor would be initialised at random by transformers: refused instead."""
    tensors = load_file(checkpoint / "model.safetensors")
    gone = tensors.pop("model.layers.3.self_attn.indexer.wk.weight")
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    assert "lacks 1 weights, model.layers.3.self_attn.indexer.wk.weight" in refusal(capsys, "--model", str(checkpoint))
    tensors["model.layers.3.self_attn.indexer.wk.weight"] = gone.fill_(float("nan"))
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    assert "indexer.wk.weight holds NaN" in refusal(capsys, "--model", str(checkpoint))
