"""Devices and cases for the tests.

A test that takes `device` runs on the CPU and, where there is one, on a GPU. A test marked `cases(op)` also takes
`case`, from the list of `cases.CASES`; the large cases exist on a GPU only, and only for tests that ask for them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch

import indexcache_ext.ops  # noqa: F401  (registers the ops)
from cases import CASES

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cases(op, large=False): run with every case of an op")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is None:
        return metafunc.parametrize("device", DEVICES)
    large = marker.kwargs.get("large", False)
    pairs = [
        pytest.param(device, case, id=f"{device}-{case.id}")
        for device in DEVICES
        for case in CASES[marker.args[0]]
        if not case.large or (large and device == "cuda")
    ]
    metafunc.parametrize("device,case", pairs)


@pytest.fixture(autouse=True)
def _free_device_memory() -> Iterator[None]:
    """Large cases take most of a GPU: none of it stays cached for the next test."""
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 4 << 30:
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Forces a backend for the rest of the test."""
    return lambda name: monkeypatch.setenv("INDEXCACHE_BACKEND", name)
