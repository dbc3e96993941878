"""The command line: what goes to stdout and stderr, and with which exit code."""

import json
import subprocess
import sys

import pytest
from indexcache_ext import cli


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return caught.value.code


def test_help(capsys):
    assert exit_code("--help") == 0
    out = capsys.readouterr().out
    assert "info" in out and "demo" in out
    assert exit_code("demo", "--help") == 0
    assert "--text FILE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--tokens", "0"], "--tokens: expected 1 or more, got 0"),
        (["demo", "--tokens", "1.5"], "--tokens: expected a whole number, got '1.5'"),
        (["demo", "--context", "-3"], "--context: expected 2 or more, got -3"),
        (["demo", "--generate", "many"], "--generate: expected a whole number, got 'many'"),
        (["demo", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["demo", "--text"], "--text: expected one argument"),
        (["demo", "book.txt"], "unrecognized arguments: book.txt"),
        (["search", "--model", "m"], "required: --calibration, --context"),
        (["search", "--keep", "2"], "--keep: expected a share in (0, 1], got 2"),
        (["search", "--keep", "half"], "--keep: expected a share such as 1/4, got 'half'"),
        (["search", "--stages", "0"], "--stages: expected 1 or more, got 0"),
        (["search", "--report", "page.pdf"], "--report: expected a name that ends in .html or .md, got 'page.pdf'"),
        (["overlap", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert exit_code(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err


def test_info_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_info(capsys):
    assert cli.main(["info"]) == 0
    assert "torch" in capsys.readouterr().out


def test_module_is_the_same_program():
    run = subprocess.run([sys.executable, "-m", "indexcache_ext", "info", "--json"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert isinstance(json.loads(run.stdout), dict)
    run = subprocess.run([sys.executable, "-m", "indexcache_ext", "dance"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("usage: indexcache")


@pytest.mark.parametrize("name", ["transformers", "tqdm"])
def test_missing_extra(name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "indexcache_ext.demo.run", raising=False)
    monkeypatch.delattr("indexcache_ext.demo.run", raising=False)
    assert cli.main(["demo"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert name in captured.err and "pip install 'indexcache-ext[transformers]'" in captured.err


def test_interrupt(monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_info", interrupt)
    assert cli.main(["info"]) == 130
