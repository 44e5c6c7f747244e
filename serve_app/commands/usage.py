"""``headrace usage``: show what was used and what it cost, and check the books."""

from __future__ import annotations

import argparse
from contextlib import closing

from serve_app.commands._place import Service, actor, add_place_options, checked_options, place
from serve_app.commands._usage_insights import add_insights, insight, usage
from serve_app.errors import ConfigError
from serve_app.terminal import Subparsers, command, note, out, out_json, table

_EXAMPLE = """\
headrace usage --by tenant,model --from 2026-01-01 --to 2026-02-01 --config configs/local.yaml
headrace usage --by key --format csv --config configs/local.yaml
headrace usage top --by user --config configs/local.yaml
headrace usage economics --from 2026-01-01 --config configs/local.yaml
headrace usage --verify --config configs/local.yaml
headrace usage reverse req_0199... --reason "goodwill" --config configs/local.yaml
HEADRACE_URL=http://127.0.0.1:8000 HEADRACE_ADMIN_KEY=hr-... headrace usage --by user"""

_FORMATS = ("table", "csv", "json", "focus", "focus-allocation")


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = command(
        subparsers, "usage", "Show what was used and what it cost, and check the books.", _EXAMPLE
    )
    parser.add_argument(
        "--by", default="tenant", help="tenant, model, user, key, class, tag, hour (commas between)"
    )
    parser.add_argument("--from", dest="from_", metavar="TIME", help="a whole hour, UTC")
    parser.add_argument("--to", metavar="TIME", help="a whole hour, UTC; not included")
    parser.add_argument("--format", choices=_FORMATS, default="table")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="recompute bills and sums from the events; the status is 1 if any differs",
    )
    add_place_options(parser)
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    add_insights(actions)
    _add_reverse(actions)


def _add_reverse(actions: Subparsers) -> None:
    reverse = command(
        actions,
        "reverse",
        "Take back what a request was billed, by a row of its own; settled rows never change.",
        'headrace usage reverse req_0199... --reason "goodwill" --config configs/local.yaml',
    )
    reverse.add_argument(
        "request_id", metavar="REQUEST_ID", help="as x-headrace-request-id and the ledger have it"
    )
    reverse.add_argument("--reason", required=True, help="why, for the ledger and the audit trail")
    add_place_options(reverse)
    reverse.set_defaults(run=_reverse)


def _reverse(args: argparse.Namespace) -> int:
    """Take a bill back; once, however often it is asked for."""
    from serve_app.admin_client import HttpUsage, database_reversal
    from serve_app.changes import reason_of

    where = place(args, "the books")
    with checked_options():
        reason = reason_of(args.reason)
    if isinstance(where, Service):
        done = HttpUsage(where.url, where.admin_key).reverse(args.request_id, reason)
    else:
        done = database_reversal(where, args.request_id, reason, actor())
    if done["new"]:
        out(f"took back {done['taken_back_usd']} USD of request {done['request_id']}")
    else:
        out(f"nothing is left to take back of request {done['request_id']}")
    return 0


def run(args: argparse.Namespace) -> int:
    """Print the report, or what does not add up."""
    from serve_app.usage_report import FOCUS_FORMATS, focus_csv, to_csv, to_table

    if args.verify:
        where = place(args, "the books")
        if isinstance(where, Service):
            raise ConfigError("--verify reads every event: it needs the database, --config FILE")
        return _verify(where)
    if args.format in FOCUS_FORMATS:
        out(focus_csv(insight(args, FOCUS_FORMATS[args.format])).rstrip("\n"))
        return 0
    report = usage(args)
    if args.format == "json":
        out_json(report)
    elif args.format == "csv":
        out(to_csv(report).rstrip("\n"))
    else:
        out(table(*to_table(report)))
    return 0


def _verify(url: str) -> int:
    from serve_app.core.pricing import dollars
    from serve_app.ledger.database import Database
    from serve_app.ledger.verify import verify

    with closing(Database(url)) as database:
        findings = verify(database)
    for line in findings.lines:
        out(line)
    unsaid = findings.differences - len(findings.lines)
    if unsaid:
        note(f"{unsaid} more differences")
    note(
        f"{findings.events} events of {findings.requests} requests, {findings.rollups} rollups, "
        f"{dollars(findings.amount_nanousd)} USD: {findings.differences or 'no'} differences"
    )
    return 1 if findings.differences else 0
