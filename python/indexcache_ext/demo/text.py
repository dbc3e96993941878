"""Text for the demonstration model: the source of the Python standard library of the running interpreter.

A file is held out by the hash of its name, so the split is the same on every machine and for every Python version:
what one interpreter trains on is never what another one is tested on.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_ONE_IN = 20
# Not the library proper, or not there on every system.
SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests"}


class TextError(ValueError):
    """The text asked for cannot be had; the message says what to do about it."""


def is_held_out(name: str) -> bool:
    """Whether the file of this name (relative to the library, with forward slashes) is kept out of training."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def library_files(root: Path | None = None) -> Iterator[tuple[str, Path]]:
    """Names and paths of the library's `.py` files, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith("config-")]
        paths = [Path(folder, name) for name in files if name.endswith(".py")]
        found += [(path.relative_to(root).as_posix(), path) for path in paths]
    yield from sorted(found)


def _library_text(held_out: bool, root: Path | None) -> bytes:
    parts = []
    for name, path in library_files(root):
        if is_held_out(name) != held_out:
            continue
        try:
            parts.append(path.read_bytes())
        except OSError:  # a file that cannot be read is simply not part of the text
            continue
    text = b"\n".join(parts)
    if not text:
        where = sysconfig.get_path("stdlib") if root is None else root
        raise TextError(f"no Python source found under {where}; give a text of your own with --text FILE")
    return text


def training_text(root: Path | None = None) -> bytes:
    """The library's source without the held-out files, joined in the order of their names.

    Raises:
        TextError: no source file can be read under `root` (default: the running interpreter's library).
    """
    return _library_text(False, root)


def heldout_text(root: Path | None = None) -> bytes:
    """The source of the held-out files, about one in twenty; see `training_text`."""
    return _library_text(True, root)


def windows(text: bytes, length: int, limit: int) -> list[bytes]:
    """At most `limit` windows of `length` bytes, evenly spaced over `text` and not overlapping.

    Raises:
        TextError: `text` is shorter than one window.
    """
    if len(text) < length:
        raise TextError(f"the text has {len(text):,} bytes, fewer than one window of {length:,}")
    count = min(limit, len(text) // length)
    step = (len(text) - length) // max(count - 1, 1)
    return [text[i * step : i * step + length] for i in range(count)]
