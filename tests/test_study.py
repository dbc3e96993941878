"""The commands `search` and `overlap`: what they find and draw, kills, ranks, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from indexcache_ext import cli
from indexcache_ext.demo import run as demo
from indexcache_ext.overlap import Overlap
from indexcache_ext.schedule import LayerPattern
from indexcache_ext.search import SearchTrace
from test_search import ink


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_bytes(Path(demo.__file__).read_bytes())
    return file


def command(name: str, text: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--context", "200", "--windows", "2", "--device", "cpu"]
    return [name, "--model", str(demo.CHECKPOINT), "--calibration", str(text), "--out", str(out), *sizes, *more]


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "indexcache_ext", *arguments]


@pytest.fixture(scope="module")
def searched(text: Path, tmp_path_factory) -> tuple[dict, Path]:
    """What the command prints as JSON, and its folder."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("search") / "new"
    report = str(out / "page.html")
    done = subprocess.run(program(*command("search", text, out, "--json", "--report", report)), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout), out


def test_search_finds_patterns_and_draws(searched: tuple[dict, Path]) -> None:
    result, out = searched
    trace = SearchTrace.load(out / "trace.json")
    assert [kept["full"] for kept in result["kept"]] == [4, 2, 1]
    for kept, keep in zip(result["kept"], (1 / 2, 1 / 4, 1 / 8), strict=True):
        assert LayerPattern.from_config({**kept, "num_hidden_layers": 8}) == trace.pattern(keep)
        assert kept["loss"] == dict(trace.curve())[kept["full"]]
        assert kept["uniform"] == str(LayerPattern.uniform(8, round(1 / keep), offset=1))
    assert result["kept"][2]["loss"] == result["kept"][2]["uniform_loss"]  # there is one pattern with one Full layer
    assert ink(out / "curve.png") > 0.01
    page = (out / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert all(kept["index_topk_pattern"] in page for kept in result["kept"])


def test_search_for_people(searched: tuple[dict, Path], text: Path, tmp_path: Path, capsys) -> None:
    shutil.copy(searched[1] / "trace.json", tmp_path)  # everything is known
    page = tmp_path / "page.md"
    assert cli.main(command("search", text, tmp_path, "--keep", "1/4", "3/8", "--report", str(page))) == 0
    shown = capsys.readouterr().out
    kept = searched[0]["kept"][1]
    assert f'"index_topk_pattern": "{kept["index_topk_pattern"]}",' in shown
    assert f'"indexer_types": {json.dumps(kept["indexer_types"])},' in shown
    assert "2 of 8" in shown and "3 of 8" in shown
    pictures = sorted(tmp_path.glob("page-*.png"))
    assert [picture.name for picture in pictures] == ["page-loss.png", "page-overlap.png", "page-recall.png"]
    assert all(ink(picture) > 0.01 and f"]({picture.name})" in page.read_text() for picture in pictures)


def test_a_killed_search_goes_on(searched: tuple[dict, Path], text: Path, tmp_path: Path) -> None:
    """SIGKILL at several moments, as a machine that fails: the same command ends with the same trace."""
    file, count = tmp_path / "trace.json", 0
    for _ in range(3):
        running = subprocess.Popen(program(*command("search", text, tmp_path)), stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while running.poll() is None and known(file) < count + 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert known(file) >= count + 3  # it went on, and kept what was there
        count = known(file)
    done = subprocess.run(program(*command("search", text, tmp_path)), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert SearchTrace.load(file) == SearchTrace.load(searched[1] / "trace.json")


def known(file: Path) -> int:
    """Losses that a trace holds."""
    if not file.exists():
        return 0
    trace = SearchTrace.load(file)
    return (trace.full_loss is not None) + sum(len(x) for x in [f.candidates for f in trace.flips]) + len(trace.partial)


@pytest.fixture(
    scope="module",
    params=[
        "cpu",  # gloo
        pytest.param(
            "cuda",  # nccl
            marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
        ),
    ],
)
def alone(request, text: Path, tmp_path_factory) -> tuple[str, SearchTrace]:
    """A device, and what one process finds there."""
    out = tmp_path_factory.mktemp("alone")
    done = subprocess.run(program(*command("search", text, out, "--device", request.param)), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return request.param, SearchTrace.load(out / "trace.json")


def test_torchrun_finds_the_same(alone: tuple[str, SearchTrace], text: Path, tmp_path: Path) -> None:
    device, trace = alone
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, "-m", "indexcache_ext", *command("search", text, tmp_path, "--json", "--device", device)],
        capture_output=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["order"] == [flip.layer for flip in trace.flips]
    assert SearchTrace.load(tmp_path / "trace.json") == trace


def test_a_rank_of_torchrun_that_is_killed(alone: tuple[str, SearchTrace], text: Path, tmp_path: Path) -> None:
    """SIGKILL of one rank: the launcher and the other rank end with an error, and the same command goes on."""
    device, trace = alone
    file = tmp_path / "trace.json"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    running = subprocess.Popen(
        [*start, "-m", "indexcache_ext", *command("search", text, tmp_path, "--device", device)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while running.poll() is None and known(file) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    ranks = {}
    for pid in Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks |= {int(entry[5:]): int(pid) for entry in environment if entry.startswith(b"RANK=")}
    os.kill(ranks[1], signal.SIGKILL)
    _, told = running.communicate(timeout=60)
    assert running.returncode != 0 and b"SIGKILL" in told
    assert not Path(f"/proc/{ranks[0]}").exists()
    found = known(file)
    assert 3 <= found < 29  # 1 + 7 * 8 / 2 losses make a whole trace
    assert cli.main(command("search", text, tmp_path, "--device", device)) == 0
    assert SearchTrace.load(file) == trace


def test_overlap_command(text: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(command("overlap", text, tmp_path, "--pattern", "FSSSFSSS")) == 0
    assert "layers apart" in capsys.readouterr().out
    found = Overlap.load(tmp_path / "overlap.json")
    assert found.topk == 64 and all(found.overlap[i][i] == 1 for i in range(8))
    assert all(ink(tmp_path / name) > 0.1 for name in ("overlap.png", "recall.png"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--context": "64"}, "not longer than index_topk, 64"),
        ({"--context": "30000"}, "fewer than one window of 29,999"),
        ({"--calibration": "missing.txt"}, "missing.txt cannot be read: No such file"),
        ({"--model": "nowhere"}, "no checkpoint in nowhere: config.json is missing"),
    ],
)
def test_bad_input(change: dict[str, str], message: str, text: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    arguments = command("search", text, tmp_path)
    for option, value in change.items():
        if option in arguments:
            arguments[arguments.index(option) + 1] = value
        else:
            arguments += [option, value]
    assert cli.main(arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "trace.json").exists()


def test_a_truncated_model_and_another_calibration_are_refused(
    searched: tuple[dict, Path], text: Path, tmp_path: Path, capsys
) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo.CHECKPOINT, model)
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    arguments = command("search", text, tmp_path)
    arguments[arguments.index("--model") + 1] = str(model)
    assert cli.main(arguments) == 1
    assert "cannot be loaded, it is damaged" in capsys.readouterr().err
    shutil.copy(searched[1] / "trace.json", tmp_path)
    arguments = command("search", text, tmp_path)
    arguments[arguments.index("--windows") + 1] = "1"
    assert cli.main(arguments) == 1
    assert "the trace was made with calibration" in capsys.readouterr().err
