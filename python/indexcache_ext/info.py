"""``indexcache info``: versions, GPU, backends, the support table, and what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import json as json_module
import platform
from importlib.util import find_spec

import torch

from . import __version__
from ._library import library_path

OPTIONAL = {
    "transformers": "Hugging Face models and the demo: pip install 'indexcache-ext[transformers]'",
    "numpy": "NumPy arrays through indexcache_ext._C: pip install numpy",
}


def collect() -> dict:
    """Everything that ``indexcache info`` prints, as one dict of JSON values."""
    found = {
        "indexcache_ext": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "library": str(library_path()),
        "build": {},
        "gpus": _gpus(),
        "capabilities": [],
        "optional": {name: _version(name) for name in OPTIONAL},
    }
    if find_spec("indexcache_ext._C") is not None:
        from . import _C

        found["build"] = _C.build_info()
        found["capabilities"] = _C.capabilities()
    found["missing"] = _missing(found)
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict]:
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return gpus


def _missing(found: dict) -> list[str]:
    missing = []
    if not found["build"]:
        missing.append("indexcache_ext._C was not built: reinstall without -DINDEXCACHE_PYBIND=OFF for the support table")
    elif not found["build"]["cuda"]:
        missing.append("CUDA kernels: put nvcc (CUDA >= 12.8) on PATH and reinstall")
    if found["torch_cuda"] is None:
        missing.append("CUDA tensors: this torch is a CPU build; install one with CUDA to use a GPU")
    elif not found["gpus"]:
        missing.append("GPU: none is visible to torch (driver, CUDA_VISIBLE_DEVICES)")
    for gpu in found["gpus"]:
        if float(gpu["compute_capability"]) < 8.0:
            missing.append(f"{gpu['name']}: the CUDA kernels need compute capability 8.0 or later")
    missing += [f"{name}: {use}" for name, use in OPTIONAL.items() if found["optional"][name] is None]
    return missing


def _table(rows: list[dict]) -> list[str]:
    limits: dict[str, dict[str, str]] = {}
    for row in rows:
        limits.setdefault(row["op"], {})[row["backend"]] = row["limits"]
    lines = []
    for op, by_backend in limits.items():
        shared = set(by_backend.values())
        if len(shared) == 1:
            lines.append(f"  {op:22} {', '.join(by_backend):14} {shared.pop()}")
        else:
            lines += [f"  {op:22} {backend:14} {text}" for backend, text in by_backend.items()]
    return lines


def main(json: bool = False) -> int:
    """Prints the report, as a table or as JSON; returns the exit code."""
    found = collect()
    if json:
        print(json_module.dumps(found, indent=2))
        return 0
    build = found["build"]
    lines = [
        f"indexcache_ext {found['indexcache_ext']}, Python {found['python']}, torch {found['torch']} "
        f"(CUDA {found['torch_cuda'] or 'none'})",
        f"library        {found['library']}",
    ]
    if build:
        cuda = f"CUDA {build['cuda']} for {build['cuda_archs']}" if build["cuda"] else "CPU only"
        cutlass = f", CUTLASS {build['cutlass']}" if build["cutlass"] else ""
        lines.append(f"built with     {build['cxx']}, {cuda}{cutlass}; CPU kernels: {build['cpu_isa']}")
    for i, gpu in enumerate(found["gpus"]):
        lines.append(f"GPU {i}          {gpu['name']}, sm_{gpu['compute_capability'].replace('.', '')}, {gpu['memory_gib']} GiB")
    lines += ["optional       " + ", ".join(f"{k} {v or 'not installed'}" for k, v in found["optional"].items())]
    if found["capabilities"]:
        lines += ["", f"  {'op':22} {'backends':14} limits", *_table(found["capabilities"])]
    if found["missing"]:
        lines += ["", "missing:", *(f"  - {item}" for item in found["missing"])]
    print("\n".join(lines))
    return 0
