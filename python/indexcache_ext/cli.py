"""The command line: `indexcache`, also `python -m indexcache_ext`.

Exit codes: 0 done, 1 it could not be done (the message on stderr says what to do), 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
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
