"""Finds and loads libindexcache_ops.so, which registers ``torch.ops.indexcache.*``."""

from __future__ import annotations

import os
from pathlib import Path

import torch

NAME = "libindexcache_ops.so"
MINIMUM_TORCH = (2, 10)


def library_path() -> Path:
    """The library that ``import indexcache_ext`` loads: ``INDEXCACHE_LIBRARY``, else the one beside this file."""
    return Path(os.environ.get("INDEXCACHE_LIBRARY") or Path(__file__).parent / NAME)


def load() -> Path:
    """Loads the library once per process and returns its path.

    Raises:
        ImportError: torch is too old, the file is missing or it does not load, with what to do about it.
    """
    installed = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if installed < MINIMUM_TORCH:
        raise ImportError(f"indexcache_ext needs torch >= 2.10, found {torch.__version__}: pip install 'torch>=2.10'")
    path = library_path()
    if not path.is_file():
        raise ImportError(
            f"{path} does not exist: build it with 'pip install --no-build-isolation -e .' in the source tree "
            f"('make test' does that), or point INDEXCACHE_LIBRARY to a built {NAME}"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(f"{path} does not load under torch {torch.__version__}: {error}") from error
    return path
