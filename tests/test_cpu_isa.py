"""The CPU kernels give the values of float64 on every instruction set below the one that all other tests run on.

A process chooses its instruction set once, so each level is a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")
VALUE_TESTS = "test_logits_are_those_of_float64 or test_selection_is_exact or test_attention_is_that_of_float64"

_C = pytest.importorskip("indexcache_ext._C", reason="only _C tells which instruction set is in use")


def isa_in_use() -> str:
    return _C.build_info()["cpu_isa"]


@pytest.mark.parametrize("level", LEVELS[: LEVELS.index(isa_in_use())])
def test_values_of_an_instruction_set(level: str) -> None:
    code = f"import test_cpu_isa as t, pytest; assert t.isa_in_use() == {level!r}; raise SystemExit(pytest.main())"
    options = f"-q -p no:cacheprovider -k '{VALUE_TESTS}' test_indexer.py test_topk.py test_sparse_mla.py"
    environment = os.environ | {"INDEXCACHE_CPU_ISA": level, "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": options}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=TESTS)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and " skipped" not in result.stdout
