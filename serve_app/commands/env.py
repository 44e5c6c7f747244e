"""``headrace env``: print the environment Ray's processes need, for a shell to evaluate."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from serve_app import ray_env
from serve_app.terminal import CommandFailed, Subparsers, command, out


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = command(
        subparsers,
        "env",
        "Print the environment Ray's processes need, for a shell to evaluate.",
        'eval "$(headrace env)"\nserve run configs/local.yaml',
    )
    parser.add_argument(
        "file",
        type=Path,
        nargs="?",
        default=Path("configs") / ray_env.FILE_NAME,
        metavar="FILE",
        help="a file of NAME=VALUE lines (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print an `export` line per setting that is not set yet.

    Raises:
        CommandFailed: there is no such file.
    """
    if not args.file.is_file():
        raise CommandFailed(f"there is no file {args.file}; name one, such as configs/ray.env")
    for name, value in ray_env.missing(args.file, os.environ).items():
        out(f"export {name}={shlex.quote(value)}")
    return 0
