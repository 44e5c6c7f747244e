"""What the command line prints, and how: results on stdout, everything else on stderr."""

from __future__ import annotations

import argparse
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import TypeAlias

# The class is generic for type checkers only.
Subparsers: TypeAlias = "argparse._SubParsersAction[ArgumentParser]"


class CommandFailed(Exception):
    """A command that cannot go on; the message is one line for the user, the status 1."""


def out(text: str) -> None:
    """Print a result."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def out_json(value: object) -> None:
    """Print a result as JSON, indented."""
    import orjson

    out(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def note(text: str) -> None:
    """Print what is not a result: progress, warnings, errors."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under a header, columns aligned by spaces."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def command(subparsers: Subparsers, name: str, summary: str, example: str) -> ArgumentParser:
    """Add a subcommand whose help ends with an example."""
    return subparsers.add_parser(
        name,
        help=summary[:1].lower() + summary[1:].rstrip("."),
        description=summary,
        epilog="example:\n" + "\n".join(f"  {line}" for line in example.splitlines()),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
