"""``headrace models``: prepare, check and list model folders."""

from __future__ import annotations

import argparse
from pathlib import Path

from serve_app.terminal import Subparsers, command, note, out, table

_EXAMPLE = """\
headrace models prepare smollm2      about 25 s, once
headrace models verify smollm2       reads every byte
headrace models list"""


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = command(subparsers, "models", "Prepare, check and list model folders.", _EXAMPLE)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    prepare = command(
        actions,
        "prepare",
        "Turn a built-in model into the folder that engines load, unless it is there.",
        "headrace models prepare smollm2",
    )
    prepare.add_argument("name", metavar="NAME", nargs="?", help="a built-in model (smollm2)")
    prepare.set_defaults(run=_prepare)
    verify = command(
        actions,
        "verify",
        "Compare a prepared model with its checksums; exit 1 if anything differs.",
        "headrace models verify smollm2",
    )
    verify.add_argument("name", metavar="NAME", nargs="?", help="a built-in model or a folder")
    verify.set_defaults(run=_verify)
    listing = command(
        actions, "list", "List the built-in models and where they are.", "headrace models list"
    )
    listing.set_defaults(run=_list)
    for action in (prepare, verify, listing):
        action.add_argument(
            "--cache-dir",
            type=Path,
            metavar="DIR",
            help="where prepared models are kept (default: HEADRACE_HOME or ~/.cache/headrace)",
        )


def _prepare(args: argparse.Namespace) -> int:
    from serve_app import models

    folder = models.prepare(args.name or models.DEFAULT_MODEL, _cache_dir(args), note)
    out(str(folder))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from serve_app import models

    folder = models.resolve(args.name or models.DEFAULT_MODEL, _cache_dir(args))
    problems = models.verify(folder)
    for problem in problems:
        note(problem)
    out(f"{folder}: {'damaged' if problems else 'intact'}")
    return 1 if problems else 0


def _list(args: argparse.Namespace) -> int:
    from serve_app import models
    from serve_app.errors import ConfigError

    rows = []
    for model in models.BUILT_IN:
        try:
            place = str(models.resolve(model.name, _cache_dir(args)))
        except ConfigError:
            place = f"not prepared: headrace models prepare {model.name}"
        rows.append((model.name, model.licence, place))
    out(table(("MODEL", "LICENCE", "FOLDER"), rows))
    return 0


def _cache_dir(args: argparse.Namespace) -> Path:
    from serve_app import models

    return args.cache_dir.expanduser() if args.cache_dir else models.default_cache_dir()
