"""The command line: `indexcache`, also `python -m indexcache_ext`.

Exit codes: 0 done, 1 it could not be done (the message on stderr says what to do), 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path


class CommandError(Exception):
    """A command cannot do what was asked; the message says why and what to do next."""


def _count(least: int):
    """An argparse type: an integer that is at least `least`."""

    def parse(word: str) -> int:
        try:
            value = int(word.replace("_", ""))
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {word!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"expected {least} or more, got {value}")
        return value

    return parse


def _info(args: argparse.Namespace) -> None:
    from . import info

    info.main(json=args.json)


def _demo(args: argparse.Namespace) -> None:
    try:
        from .demo import run
        from .demo.text import TextError
    except ImportError as error:
        needs = "pip install 'indexcache-ext[transformers]'"
        raise CommandError(f"the demo cannot start: {error}; it needs {needs}") from error
    try:
        run.main(args)
    except (TextError, run.CheckpointError) as error:
        raise CommandError(str(error)) from error


def _study(name: str):
    """The function of a command of `study`, which needs transformers and matplotlib."""

    def command(args: argparse.Namespace) -> None:
        from .search import RankError

        try:
            from . import study
        except ImportError as error:
            needs = "pip install 'indexcache-ext[search]'"
            raise CommandError(f"{name} cannot start: {error}; it needs {needs}") from error
        try:
            getattr(study, name)(args)
        except (ValueError, OSError, RankError) as error:
            raise CommandError(str(error)) from error

    return command


def _fraction(word: str) -> Fraction:
    """An argparse type: a share in (0, 1], such as 1/4 or 0.25."""
    try:
        value = Fraction(word)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected a share such as 1/4, got {word!r}") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share in (0, 1], got {word}")
    return value


def _page(word: str) -> Path:
    """An argparse type: a file for a report."""
    if Path(word).suffix not in (".html", ".md"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .html or .md, got {word!r}")
    return Path(word)


def _add_model_and_text(command: argparse.ArgumentParser, out: str) -> None:
    command.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="a GLM-MoE-DSA or DeepSeek-V3.2 model"
    )
    command.add_argument("--calibration", type=Path, required=True, nargs="+", metavar="FILE", help="text files")
    command.add_argument(
        "--context", type=_count(2), required=True, metavar="N", help="tokens per window, well above index_topk"
    )
    command.add_argument("--windows", type=_count(1), default=16, metavar="N", help="windows of text (16)")
    command.add_argument("--batch", type=_count(1), default=1, metavar="N", help="windows that run together (1)")
    command.add_argument("--out", type=Path, default=Path(out), metavar="DIR", help=f"where files go ({out})")
    command.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one"
    )
    command.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model (float32)")
    command.add_argument("--unquantised", action="store_true", help="select without FP8, which is slow")
    command.add_argument("--json", action="store_true", help="write JSON to stdout, and nothing else there")


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; a parsed command line has the function to call in `command`."""
    top = argparse.ArgumentParser(prog="indexcache", description="DeepSeek Sparse Attention with shared indexers.")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    info = commands.add_parser("info", help="versions, GPU, backends, and what is missing")
    info.add_argument("--json", action="store_true", help="write JSON")
    info.set_defaults(command=_info)

    demo = commands.add_parser(
        "demo",
        help="a small DSA language model on your text, with all of its indexers and with fewer",
        description="Runs a small GLM-MoE-DSA language model on a text, first with an indexer in every layer, then "
        "with 1/2, 1/4 and 1/8 of the indexers, the other layers sharing their selection.",
    )
    demo.add_argument("--text", type=Path, metavar="FILE", help="your text (default: Python's own library source)")
    demo.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint of indexcache_ext.demo.train")
    demo.add_argument("--tokens", type=_count(1), metavar="N", help="bytes of text to measure the loss on (16,384)")
    demo.add_argument("--context", type=_count(2), metavar="N", help="bytes per window (what the model was trained on)")
    demo.add_argument("--generate", type=_count(1), metavar="N", help="bytes to generate and to time decoding on (160)")
    demo.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    demo.add_argument("--json", action="store_true", help="write JSON to stdout, and nothing else there")
    demo.set_defaults(command=_demo)

    search = commands.add_parser(
        "search",
        help="which layers of your model can do without an indexer",
        description="Greedy search of IndexCache (arXiv 2603.12201): layers become Shared one by one, the one first "
        "that costs the least loss on your text. Stop it whenever you like: the same command goes on from "
        "OUT/trace.json. torchrun spreads it over several processes.",
    )
    _add_model_and_text(search, "indexcache-search")
    search.add_argument(
        "--keep",
        type=_fraction,
        nargs="+",
        default=[Fraction(1, 2), Fraction(1, 4), Fraction(1, 8)],
        metavar="SHARE",
        help="shares of indexers to find patterns for (1/2 1/4 1/8)",
    )
    search.add_argument(
        "--stages", type=_count(1), default=1, metavar="P", help="pipeline stages, each begins Full (1)"
    )
    search.add_argument("--report", type=_page, metavar="FILE", help="a page with pictures, .html or .md")
    search.set_defaults(command=_study("search"))

    overlap = commands.add_parser(
        "overlap",
        help="how alike the selections of your model's layers are",
        description="Pairwise overlap of selections, and how much of each layer's attention falls on what another one "
        "selects: arrays as JSON, and heat maps. A diagnostic: choose patterns with `indexcache search`.",
    )
    _add_model_and_text(overlap, "indexcache-overlap")
    overlap.add_argument("--pattern", metavar="FSSF…", help="a pattern to draw on the maps")
    overlap.set_defaults(command=_study("overlap"))
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line (default: the process's own) and returns its exit code."""
    args = parser().parse_args(arguments)
    try:
        args.command(args)
    except CommandError as error:
        print(f"indexcache: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
