"""``headrace budgets``: set, top up, list and remove budgets."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from serve_app.commands._place import actor, database_url
from serve_app.errors import ConfigError
from serve_app.terminal import CommandFailed, Subparsers, command, note, out, table

if TYPE_CHECKING:
    from serve_app.core.budget import Budget, BudgetKey
    from serve_app.ledger.budgets import BudgetStore

_EXAMPLE = """\
headrace budgets set tenant acme 500 --window month --alerts 0.5,0.8 --config configs/local.yaml
headrace budgets set key k7f3m2qa 20 --config configs/local.yaml
headrace budgets add key k7f3m2qa 10 --config configs/local.yaml
headrace budgets list --config configs/local.yaml"""
_SCOPES = ("key", "user", "tenant", "tag")
_WINDOWS = ("none", "day", "week", "month")
_ROLLING = re.compile(r"rolling:([0-9]{1,5})h")


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = command(subparsers, "budgets", "Set, top up, list and remove budgets.", _EXAMPLE)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    put = command(
        actions,
        "set",
        "Set a budget, new or in place of another; routers follow within two seconds.",
        "headrace budgets set tenant acme 500 --window month --config configs/local.yaml",
    )
    add = command(
        actions,
        "add",
        "Add to a budget's amount: prepaid credits that were bought.",
        "headrace budgets add key k7f3m2qa 10 --config configs/local.yaml",
    )
    listing = command(
        actions,
        "list",
        "List budgets and how they stand.",
        "headrace budgets list --config configs/local.yaml",
    )
    remove = command(
        actions,
        "remove",
        "Remove a budget; what was spent stays in the ledger.",
        "headrace budgets remove tenant acme --config configs/local.yaml",
    )
    for action, run in ((put, _set), (add, _add), (listing, _list), (remove, _remove)):
        action.set_defaults(run=run)
        action.add_argument(
            "--config", metavar="FILE", required=True, help="use the database that FILE names"
        )
    for action in (put, add, remove):
        action.add_argument("scope", choices=_SCOPES, help="whose money it is")
        action.add_argument("id", metavar="ID", help="key id, tenant, tenant/user, or tenant/tag")
    for action in (put, add):
        action.add_argument("amount", metavar="DOLLARS", help="such as 500 or 0.25")
    put.add_argument(
        "--window",
        default="none",
        help="none (prepaid), day, week, month (UTC), or rolling:HOURSh (default: none)",
    )
    put.add_argument("--alerts", metavar="A,B", help="parts of it whose spending is logged: 0.5,1")
    put.add_argument("--soft", action="store_true", help="alerts only, nobody is stopped")


def _set(args: argparse.Namespace) -> int:
    from serve_app.core.budget import Budget, Window

    rolling = _ROLLING.fullmatch(args.window)
    if args.window not in _WINDOWS and not (rolling and int(rolling.group(1))):
        raise ConfigError("--window must be none, day, week, month or rolling:HOURSh")
    budget = Budget(
        _key(args),
        _amount(args.amount),
        Window.ROLLING if rolling else Window(args.window),
        3600 * int(rolling.group(1)) if rolling else 0,
        _alerts(args.alerts),
        not args.soft,
    )
    with _store(args.config) as store:
        store.put(budget, actor())
        spent = next(each for each in store.balances() if each.budget.key == budget.key)
    out(f"{_words(budget)} is set")
    if spent.spent_nanousd > budget.amount_nanousd:
        note("more than that is spent already: nothing is served on it until it begins anew")
    return 0


def _add(args: argparse.Namespace) -> int:
    from serve_app.core.pricing import AmountTooLarge

    with _store(args.config) as store:
        try:
            budget = store.add(_key(args), _amount(args.amount), actor())
        except AmountTooLarge as error:
            raise CommandFailed(str(error)) from error
    if budget is None:
        raise CommandFailed(f"there is no budget of {args.scope} {args.id!r}; set one first")
    out(_words(budget))
    return 0


def _remove(args: argparse.Namespace) -> int:
    with _store(args.config) as store:
        if not store.remove(_key(args), actor()):
            raise CommandFailed(f"there is no budget of {args.scope} {args.id!r}")
    out(f"the budget of {args.scope} {args.id} is removed")
    return 0


def _list(args: argparse.Namespace) -> int:
    from serve_app.core.pricing import dollars

    with _store(args.config) as store:
        balances = store.balances()
    rows = [
        (
            each.budget.key.scope.value,
            each.budget.key.id,
            dollars(each.budget.amount_nanousd),
            _window(each.budget),
            dollars(each.spent_nanousd),
            dollars(each.outstanding_nanousd),
            "hard" if each.budget.hard else "soft",
            ",".join(f"{ratio:g}" for ratio in each.budget.alert_ratios) or "-",
        )
        for each in balances
    ]
    header = ("SCOPE", "ID", "DOLLARS", "WINDOW", "SPENT", "AT ROUTERS", "STOP", "ALERTS")
    out(table(header, rows))
    return 0


def _key(args: argparse.Namespace) -> BudgetKey:
    from serve_app.core.budget import BudgetKey, BudgetScope

    if args.scope in {"user", "tag"} and "/" not in args.id:
        shape = f"TENANT/{args.scope.upper()}"
        raise ConfigError(f"a {args.scope} is named with its tenant: {shape}")
    if not 0 < len(args.id) <= 400:
        raise ConfigError("an id has 1 to 400 characters")
    return BudgetKey(BudgetScope(args.scope), args.id)


def _amount(text: str) -> int:
    from serve_app.core.pricing import amount_nanousd

    try:
        return amount_nanousd(text)
    except ValueError as error:
        raise ConfigError(f"the amount {error}") from error


def _alerts(text: str | None) -> tuple[float, ...]:
    try:
        ratios = tuple(float(each) for each in text.split(",")) if text else ()
    except ValueError as error:
        raise ConfigError(f"--alerts: {error}") from error
    if any(not 0 < ratio <= 10 for ratio in ratios):
        raise ConfigError("--alerts must be parts above 0 and up to 10, such as 0.5,0.8,1")
    return ratios


def _window(budget: Budget) -> str:
    return f"rolling:{budget.rolling_s // 3600}h" if budget.rolling_s else budget.window.value


def _words(budget: Budget) -> str:
    from serve_app.core.pricing import dollars

    whose = f"{budget.key.scope.value} {budget.key.id}"
    return f"the budget of {whose}, {dollars(budget.amount_nanousd)} dollars"


@contextmanager
def _store(config: str) -> Iterator[BudgetStore]:
    from serve_app.ledger.budgets import BudgetStore
    from serve_app.ledger.database import Database

    with closing(Database(database_url(config))) as database:
        yield BudgetStore(database)
