"""The ``headrace`` command: one parser, one module per subcommand, one line per error."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from serve_app import commands
from serve_app.errors import ConfigError, StoreUnavailable
from serve_app.terminal import CommandFailed, note

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_DESCRIPTION = "Serve language models from your own GPUs behind one OpenAI-compatible endpoint."
_EPILOG = """\
examples:
  headrace up configs/local.yaml          serve a small real model on this machine
  headrace check-config configs/prod.yaml print the resolved configuration, or what is wrong
  headrace keys create --name laptop --config configs/local.yaml

environment:
  HEADRACE_URL            endpoint that `headrace keys` administers, such as http://127.0.0.1:8000
  HEADRACE_ADMIN_KEY      admin key for it
  HEADRACE_PORT           HTTP port, instead of the one in the configuration
  HEADRACE_BOOTSTRAP_KEY  an admin key that exists from the start
  HEADRACE_HOME           where prepared models are kept (~/.cache/headrace)

`headrace COMMAND --help` explains a command. Exit status: 0 done, 1 failed, 2 wrong usage or
configuration."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    try:
        words = sys.argv[1:] if argv is None else argv
        args = build_parser(words[0] if words else None).parse_args(words)
        return int(args.run(args))
    except ConfigError as error:
        note(f"headrace: {error}")
        return EXIT_USAGE
    except (CommandFailed, StoreUnavailable) as error:
        note(f"headrace: {error}")
        return EXIT_FAILED
    except KeyboardInterrupt:
        note("headrace: interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left, as `| head` does. Python would complain again
        # when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser; only the module of ``command`` is imported.

    The others stand in it with their names and the first line of their docstrings, so
    that no command pays for what another one needs.
    """
    parser = argparse.ArgumentParser(
        prog="headrace",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary in command_summaries().items():
        if name == command:
            module = f"{commands.__name__}.{name.replace('-', '_')}"
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def command_summaries() -> dict[str, str]:
    """Return what each command does in a line, by its name, without importing it."""
    summaries = {}
    for folder in commands.__path__:
        for file in sorted(Path(folder).glob("[a-z]*.py")):
            docstring = ast.get_docstring(ast.parse(file.read_bytes())) or ""
            first_line = docstring.partition("\n")[0]
            summary = first_line.partition(": ")[2] or first_line
            summaries[file.stem.replace("_", "-")] = summary.rstrip(".")
    return summaries


if __name__ == "__main__":
    sys.exit(main())
