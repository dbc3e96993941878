"""`pip install .` into a fresh virtual environment, from a copy of the sources, without nvcc: what a user does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "include", "csrc", "python")
BUILD_TOOLS = ("cmake", "ninja", "pybind11", "setuptools")

SMOKE = """
import json, torch, indexcache_ext
from indexcache_ext import _C
logits = torch.tensor([[0.5, 2.0, -1.0, 2.0]])
window = torch.tensor([0], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
print(json.dumps({
    "file": indexcache_ext.__file__,
    "topk": torch.ops.indexcache.topk(logits, *window, 2).tolist(),
    "cuda": _C.build_info()["cuda"],
    "version": indexcache_ext.__version__,
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that sees this one's torch and build tools, with the package installed."""
    missing = [tool for tool in BUILD_TOOLS if subprocess.run([sys.executable, "-c", f"import {tool}"]).returncode]
    if missing and not Path(sysconfig.get_path("scripts"), "ninja").exists():
        pytest.skip(f"build tools are not installed: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv/bin/python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True, text=True
    ).stdout.strip()
    Path(site, "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", str(source)],
        check=True,
        env=os.environ
        | {
            "INDEXCACHE_CMAKE_ARGS": "-DINDEXCACHE_CUDA=OFF",
            "INDEXCACHE_BUILD_DIR": str(folder / "build"),
            "PATH": sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"],
        },
    )
    return python


def run(python: Path, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("INDEXCACHE_", "PYTHONPATH"))}
    result = subprocess.run([python, *arguments], capture_output=True, text=True, env=environment, cwd=python.parent)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_installed_package_runs_without_nvcc(installed: Path) -> None:
    found = json.loads(run(installed, "-c", SMOKE))
    assert Path(found["file"]).is_relative_to(installed.parent.parent)
    assert found["topk"] == [[1, 3]] and found["cuda"] == ""
    assert f"project(indexcache VERSION {found['version']}" in (ROOT / "CMakeLists.txt").read_text()


def test_installed_package_brings_its_data(installed: Path) -> None:
    package = Path(json.loads(run(installed, "-c", SMOKE))["file"]).parent
    source = ROOT / "python/indexcache_ext"
    wanted = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file() and p.suffix in (".py", ".pyi", ".typed")}
    wanted |= {str(p.relative_to(source)) for p in (source / "demo/checkpoint").iterdir()}
    assert {name for name in wanted if not (package / name).is_file()} == set()


def test_command_line_is_installed(installed: Path) -> None:
    info = json.loads(run(Path(installed.parent / "indexcache").resolve(), "info", "--json"))
    assert info["capabilities"] and any("CUDA kernels" in item for item in info["missing"])


def test_second_make_rebuilds_nothing() -> None:
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        pytest.skip("not run by make")
    assert subprocess.run(["make", "--question", ".venv/.built"], cwd=ROOT).returncode == 0
