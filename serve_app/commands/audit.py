"""``headrace audit``: who changed keys, budgets, prices and limits, and what they were before."""

from __future__ import annotations

import argparse

from serve_app.commands._place import Service, add_place_options, checked_options, place
from serve_app.terminal import Subparsers, command, out, out_json, table

_EXAMPLE = """\
headrace audit --config configs/local.yaml
headrace audit --subject "budget tenant acme" --limit 20 --config configs/local.yaml
headrace audit --before 1234 --json --config configs/local.yaml
HEADRACE_URL=http://127.0.0.1:8000 HEADRACE_ADMIN_KEY=hr-... headrace audit --subject key"""


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = command(
        subparsers, "audit", "Show who changed keys, budgets, prices and limits.", _EXAMPLE
    )
    parser.add_argument("--limit", metavar="N", help="so many, the latest first (default: 100)")
    parser.add_argument("--before", metavar="NUMBER", help="go on from there, to older ones")
    parser.add_argument(
        "--subject",
        help='of these: "key", "key k7f3m2qa", "budget tenant acme", "prices", "limits"',
    )
    parser.add_argument("--actor", help='by this one: "key k7f3m2qa", "user@host"')
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_place_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the trail, the latest change first."""
    from serve_app.admin_client import HttpAudit, database_changes
    from serve_app.changes import PARAMETERS, change_query, difference

    where = place(args, "the changes")
    given = {name: getattr(args, name) for name in PARAMETERS}
    with checked_options():
        query = change_query({name: value for name, value in given.items() if value is not None})
    if isinstance(where, Service):
        changes = HttpAudit(where.url, where.admin_key).changes(query)
    else:
        changes = database_changes(where, query)
    if args.json:
        out_json(changes)
        return 0
    rows = [
        (
            *(str(each["number"]), each["at"], each["actor"], each["via"], each["action"]),
            *(each["subject"], difference(each) + (f" ({each['note']})" if each["note"] else "")),
        )
        for each in changes
    ]
    out(table(("NUMBER", "AT", "BY", "VIA", "ACTION", "OF", "WHAT"), rows))
    return 0
