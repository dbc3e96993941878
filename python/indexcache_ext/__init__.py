"""IndexCache for DeepSeek Sparse Attention: FP8 indexer, exact top-k and sparse MLA as ``torch.ops.indexcache.*``.

Importing the package loads the operator library. The modules ``schedule``, ``cache``, ``reference``, ``integrations``
and ``cli`` hold the Python layer; ``_C`` has the same ops for NumPy and DLPack arrays without torch.
"""

from __future__ import annotations

from importlib.util import find_spec

__version__ = "0.1.0"

if find_spec("torch") is not None:  # without torch, `indexcache_ext._C` still serves NumPy and DLPack arrays
    from . import _library

    _library.load()

    from . import _fakes as _fakes
    from . import ops as ops
    from .cache import IndexCache as IndexCache
    from .schedule import LayerPattern as LayerPattern


def capabilities() -> list[dict[str, str]]:
    """The support table that the dispatcher reads: one dict of op, backend and limits per row, preferred first.

    Raises:
        ImportError: the optional module ``_C`` was left out of this build.
    """
    from ._C import capabilities as table

    return table()
