"""Fixtures and reports of the benchmarks; `pytest bench` finds them although they are not called test_*."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SETTINGS = ("INDEXCACHE_BACKEND", "INDEXCACHE_CPU_ISA", "OMP_NUM_THREADS")  # what may change a figure
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]  # the harness, and the cases that the tests read too

import harness  # noqa: E402
import roofline  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--small", action="store_true", help="cut every shape down to a smoke test of the benchmarks")


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


@pytest.fixture(scope="session")
def roofs():
    """roofs(device): the rates of this machine in this run, measured once."""
    measured = {}

    def of(device: str) -> dict[str, float]:
        if device not in measured:
            watch = harness.Stopwatch(device)
            measured[device] = harness.gpu_roofs(watch) if device == "cuda" else harness.cpu_roofs(watch)
        return measured[device]

    return of


@pytest.fixture
def measure(request, benchmark, roofs):
    return harness.Measurement(benchmark, roofs, full_size=not request.config.getoption("--small"))


@pytest.fixture
def sized(request):
    """sized(case): the case, or its smoke test under --small."""
    return harness.shrunk if request.config.getoption("--small") else lambda case: case


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)  # the host's name says nothing about its speed
    machine_info["git"] = git_hash()
    machine_info["torch"] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    machine_info["build"] = build_info()
    machine_info["settings"] = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        machine_info["gpu"] = {"name": gpu.name, "sms": gpu.multi_processor_count, "l2_bytes": gpu.L2_cache_size}
        machine_info["gpu"] |= nvidia_smi("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")


def build_info() -> dict[str, str]:
    """Compilers and CPU instruction set; empty where the optional module `_C` was left out."""
    try:
        from indexcache_ext import _C
    except ImportError:
        return {}
    return _C.build_info()


def git_hash() -> str:
    """The commit that is measured, "+" if files differ from it; INDEXCACHE_GIT_HASH where there is no checkout."""
    hash_ = run("git", "-C", str(HERE), "rev-parse", "HEAD")
    if not hash_:
        return os.environ.get("INDEXCACHE_GIT_HASH", "unknown")
    return hash_ + ("+" if run("git", "-C", str(HERE), "status", "--porcelain", "--untracked-files=no") else "")


def nvidia_smi(*fields: str) -> dict[str, str]:
    row = run("nvidia-smi", "--id=0", "--format=csv,noheader", f"--query-gpu={','.join(fields)}")
    return dict(zip(fields, row.split(", "))) if row else {}


def run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    measured = [b for b in session.benchmarks if b.extra_info.get("seconds")] if session else []
    if measured:
        rows = roofline.rows({"benchmarks": [{"name": b.name, "extra_info": b.extra_info} for b in measured]})
        terminalreporter.section("ratios within this run")
        terminalreporter.write_line(roofline.text(rows))
