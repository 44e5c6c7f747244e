"""``headrace check-config``: check configurations and print them resolved."""

from __future__ import annotations

import argparse
import os

from serve_app.terminal import Subparsers, command, note, out

_EXAMPLE = """\
headrace check-config configs/prod.yaml
headrace check-config --quiet configs/*.yaml && echo fine"""


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = command(
        subparsers,
        "check-config",
        "Check configurations and print them resolved: defaults filled in, secrets masked.",
        _EXAMPLE,
    )
    parser.add_argument("files", metavar="FILE", nargs="+", help="a configs/*.yaml")
    parser.add_argument("--quiet", action="store_true", help="print problems only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print each file; the status is 2 if any has a problem."""
    from serve_app.config_file import ask_ray, load, parse_port, with_port
    from serve_app.errors import ConfigError

    port_text = os.environ.get("HEADRACE_PORT")
    port = parse_port(port_text, "HEADRACE_PORT") if port_text else None
    status = 0
    for name in args.files:
        try:
            file = load(name)
            ask_ray(file)
        except ConfigError as error:
            note(str(error))
            status = 2
            continue
        for warning in file.warnings:
            note(f"{name}: warning: {warning}")
        if not args.quiet:
            out(f"# {name}")
            out((file if port is None else with_port(file, port)).to_yaml().rstrip())
    return status
