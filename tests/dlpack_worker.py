"""Runs calls of ``indexcache_ext._C`` on NumPy arrays in a process that has no torch; ``test_dlpack.py`` starts it.

The folder that is named on the command line holds ``calls.json``, a list of ``{"op", "arguments", "arrays", "padded",
"read_only"}``: plain arguments by value, arrays by their key in ``arrays.npz``, names of arrays that get unused columns
between their rows, names of arrays that must not be written. Answers: ``results.npz`` and ``answers.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.modules["torch"] = None  # as on a machine without torch: importing it fails

import numpy as np  # noqa: E402

from indexcache_ext import _C  # noqa: E402

MUTATED = ("index_k_cache", "kv_cache")


def pad(x: np.ndarray) -> np.ndarray:
    wide = np.full((*x.shape[:-1], x.shape[-1] + 3), 0x7F, x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def answer(call: dict, arrays: dict[str, np.ndarray]) -> tuple[dict, list[np.ndarray]]:
    arguments = dict(call["arguments"])
    for name, key in call["arrays"].items():
        arguments[name] = pad(arrays[key]) if name in call["padded"] else arrays[key].copy()
        arguments[name].flags.writeable = name not in call["read_only"]
    try:
        returned = getattr(_C, call["op"])(**arguments)
    except Exception as error:
        return {"error": str(error), "is_value_error": isinstance(error, ValueError)}, []
    given = [arguments[name] for name in ("out", "lse") if name in arguments]
    results = [arguments[name] for name in MUTATED if name in arguments] if returned is None else returned
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    if given and not all(x is y for x, y in zip(results, given)):
        return {"error": "the given buffers did not come back", "is_value_error": False}, []
    return {"results": len(results)}, results


def main(folder: Path) -> None:
    calls = json.loads((folder / "calls.json").read_text())
    arrays = dict(np.load(folder / "arrays.npz"))
    answers, results = [], {}
    for i, call in enumerate(calls):
        found, returned = answer(call, arrays)
        answers.append(found)
        results |= {f"{i}.{j}": x for j, x in enumerate(returned)}
    assert sys.modules["torch"] is None and not any(name.startswith("torch.") for name in sys.modules)
    np.savez(folder / "results.npz", **results)
    (folder / "answers.json").write_text(json.dumps(answers))


main(Path(sys.argv[1]))
