"""``headrace prices``: check, import, list and show price books."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from serve_app.commands._place import actor, database_url
from serve_app.terminal import CommandFailed, Subparsers, command, note, out, table

if TYPE_CHECKING:
    from serve_app.ledger.prices import PriceStore

_EXAMPLE = """\
headrace prices check prices.yaml
headrace prices import prices.yaml --note "from January" --config configs/local.yaml
headrace prices show --config configs/local.yaml > prices.yaml"""
_FILE_HELP = """\
a price book in YAML, dollars per million tokens:
  currency: USD
  cards:
    everyone: {input: 0.10, cached_input: 0.01, output: 0.40}
    acme:     {tenant: acme, from: 2026-01-01, input: 0.08, output: 0.30, request: 0.0001}
A card may name tenant, model, class and batch; the most specific one in force holds."""


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = command(subparsers, "prices", "Check, import, list and show price books.", _EXAMPLE)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = command(actions, "check", "Check a price book.", "headrace prices check prices.yaml")
    check.set_defaults(run=_check)
    load = command(
        actions,
        "import",
        "Put a price book in force from the next request on; what was billed stays as it is.",
        "headrace prices import prices.yaml --config configs/local.yaml",
    )
    load.add_argument("--note", default="", help="why, for the list")
    load.set_defaults(run=_import)
    for action in (check, load):
        action.add_argument("file", metavar="FILE", help=_FILE_HELP)
    listing = command(
        actions, "list", "List the versions.", "headrace prices list --config configs/local.yaml"
    )
    listing.set_defaults(run=_list)
    show = command(
        actions,
        "show",
        "Print a version as a file that can be imported.",
        "headrace prices show 3 --config configs/local.yaml",
    )
    show.add_argument("version", metavar="VERSION", nargs="?", type=int, help="default: in force")
    show.set_defaults(run=_show)
    for action in (load, listing, show):
        action.add_argument(
            "--config", metavar="FILE", required=True, help="use the database that FILE names"
        )


def _check(args: argparse.Namespace) -> int:
    from serve_app.price_file import load_prices

    out(f"{args.file}: {len(load_prices(args.file))} cards, no problem")
    return 0


def _import(args: argparse.Namespace) -> int:
    from serve_app.price_file import load_prices

    cards = load_prices(args.file)
    with _store(args.config) as store:
        before = store.version()
        version = store.replace(cards, args.note, actor())
    if version == before:
        out(f"version {version} has these {len(cards)} cards already")
    else:
        out(f"version {version} is in force: {len(cards)} cards")
    return 0


def _list(args: argparse.Namespace) -> int:
    from serve_app.usage_report import iso_time

    with _store(args.config) as store:
        books, current = store.books(), store.version()
    if not books:
        note("there is no price book: everything is free")
    rows = [
        (
            f"{book.version}{'*' if book.version == current else ''}",
            iso_time(book.created_at_s),
            str(book.cards),
            book.note,
        )
        for book in books
    ]
    out(table(("VERSION", "SINCE", "CARDS", "NOTE"), rows))
    return 0


def _show(args: argparse.Namespace) -> int:
    from serve_app.price_file import to_yaml

    with _store(args.config) as store:
        version = store.version() if args.version is None else args.version
        book = store.book(version)
    if book is None:
        raise CommandFailed(f"there is no version {version}; see `headrace prices list`")
    out(f"# version {version}")
    out(to_yaml(book.cards).rstrip())
    return 0


@contextmanager
def _store(config: str) -> Iterator[PriceStore]:
    from serve_app.ledger.database import Database
    from serve_app.ledger.prices import PriceStore

    with closing(Database(database_url(config))) as database:
        yield PriceStore(database)
