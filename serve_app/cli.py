"""The ``headrace`` command: one parser, one module per subcommand, one line per error."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence

from serve_app import commands
from serve_app.errors import ConfigError
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
        args = build_parser().parse_args(argv)
        return int(args.run(args))
    except ConfigError as error:
        note(f"headrace: {error}")
        return EXIT_USAGE
    except CommandFailed as error:
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


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every module of serve_app.commands registered."""
    parser = argparse.ArgumentParser(
        prog="headrace",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in pkgutil.iter_modules(commands.__path__):
        importlib.import_module(f"{commands.__name__}.{module.name}").add_parser(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
