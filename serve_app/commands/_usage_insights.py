"""``headrace usage top, economics, anomalies, savings, reconcile``: what costs what, and why."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from serve_app.commands._place import (
    Service,
    add_place_options,
    checked_options,
    cost_settings,
    place,
)
from serve_app.core.calendar import HOUR_S
from serve_app.terminal import CommandFailed, Subparsers, command, note, out, out_json, table

if TYPE_CHECKING:
    from serve_app.usage_report import UsageQuery

_NO_PRICE: Final = "no price"

_Table = tuple[Sequence[str], list[Sequence[str]]]

_SUMMARIES: Final[Mapping[str, tuple[str, str]]] = {
    "economics": ("economics", "Show what tokens and requests truly cost, and what waste does."),
    "anomalies": ("anomalies", "Show who and what cost unlike before; the last day if unsaid."),
    "savings": ("savings", "Suggest what would save money, with how much in a month."),
    "reconcile": (
        "reconciliation",
        "Compare what is attributed and idle with nodes' bills; the status is 1 on an alert.",
    ),
}


def add_insights(actions: Subparsers) -> None:
    """Register the subcommands of `headrace usage`."""
    top = command(
        actions,
        "top",
        "Show who and what costs most.",
        "headrace usage top --by user --sort cost --config configs/local.yaml",
    )
    top.add_argument("--by", default="tenant", help="as for `headrace usage`")
    top.add_argument("--sort", choices=("cost", "amount", "waste", "tokens"), default="cost")
    top.add_argument("-n", dest="rows", type=int, default=10, metavar="N", help="rows (default 10)")
    top.set_defaults(run=_top)
    plot = command(
        actions,
        "plot",
        "Draw what each day cost and what was billed, as a PNG file (extra: plots).",
        "headrace usage plot --out spend.png --config configs/local.yaml",
    )
    plot.add_argument("--out", required=True, metavar="FILE", help="the PNG file to write")
    plot.set_defaults(run=_plot)
    for name, (_, summary) in _SUMMARIES.items():
        action = command(
            actions, name, summary, f"headrace usage {name} --config configs/local.yaml"
        )
        action.set_defaults(run=_insight, insight=name)
        _add_options(action)
    for action in (top, plot):
        _add_options(action)


def _add_options(action: argparse.ArgumentParser) -> None:
    action.add_argument("--from", dest="from_", metavar="TIME", help="a whole hour, UTC")
    action.add_argument("--to", metavar="TIME", help="a whole hour, UTC; not included")
    action.add_argument("--format", choices=("table", "json"), default="table")
    add_place_options(action)


def _top(args: argparse.Namespace) -> int:
    from serve_app.usage_report import to_table

    report = usage(args)
    amounts: Mapping[str, Callable[[Mapping[str, Any]], int]] = {
        "cost": lambda row: int(row["cost_nanousd"]),
        "amount": lambda row: int(row["amount_nanousd"]),
        "waste": lambda row: int(row["wasted_tokens"]),
        "tokens": lambda row: int(row["prompt_tokens"]) + int(row["output_tokens"]),
    }
    ordered = sorted(report["data"], key=amounts[args.sort], reverse=True)
    report["data"] = ordered[: max(1, args.rows)]
    _print(args.format, report, to_table)
    if len(ordered) > len(report["data"]):
        note(f"{len(ordered) - len(report['data'])} more are in the total")
    return 0


def usage(args: argparse.Namespace) -> dict[str, Any]:
    """Return the report that the options ask for, from the database or the service.

    Raises:
        ConfigError: an option is wrong.
        CommandFailed: the service cannot be reached or refuses.
    """
    from serve_app.admin_client import HttpUsage, database_usage

    where, query = _asked(args, args.by)
    if isinstance(where, Service):
        return HttpUsage(where.url, where.admin_key).usage(args.by, args.from_, args.to)
    return database_usage(where, query, cost_settings(args.config))


def insight(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return a report on cost of usage_report.INSIGHTS, from the database or the service.

    Raises:
        ConfigError: an option is wrong.
        CommandFailed: the service cannot be reached or refuses.
    """
    from serve_app.admin_client import HttpUsage, database_insight

    where, query = _asked(args)
    if isinstance(where, Service):
        return HttpUsage(where.url, where.admin_key).insight(name, args.from_, args.to)
    return database_insight(where, name, query, cost_settings(args.config))


def _asked(args: argparse.Namespace, by: str = "") -> tuple[Service | str, UsageQuery]:
    """Return where the books are, and what is asked of them."""
    from serve_app.usage_report import usage_query

    where = place(args, "the books")
    with checked_options():
        return where, usage_query(by, args.from_, args.to)


def _plot(args: argparse.Namespace) -> int:
    from pathlib import Path

    from serve_app.commands._spend_plot import draw_spending

    report = insight(args, "spending")
    try:
        draw_spending(report, Path(args.out))
    except ModuleNotFoundError as error:
        raise CommandFailed("plots need matplotlib: pip install 'headrace[plots]'") from error
    except OSError as error:
        raise CommandFailed(f"{args.out} cannot be written: {error.strerror}") from error
    out(f"wrote {args.out}: {len(report['data'])} days")
    unpriced = [each for each in report["data"] if each["unpriced_s"] != "0"]
    if unpriced:
        hours = sum(float(each["unpriced_s"]) for each in unpriced) / HOUR_S
        days = f"{len(unpriced)} days, the first {unpriced[0]['day']}"
        note(f"{hours:.1f} replica-hours have no price and are in no bar: {days}")
    return 0


def _insight(args: argparse.Namespace) -> int:
    name = _SUMMARIES[args.insight][0]
    report = insight(args, name)
    tables: Mapping[str, Callable[[Mapping[str, Any]], _Table]] = {
        "economics": _economics,
        "anomalies": _anomalies,
        "savings": _savings,
        "reconciliation": _reconciliation,
    }
    _print(args.format, report, tables[name])
    if name == "reconciliation":
        return _say_reconciled(report)
    if not report["data"] and args.format == "table":
        note({"savings": "nothing to save was found"}.get(name, "nothing was found"))
    return 0


def _print(form: str, report: dict[str, Any], to_table: Callable[[Any], _Table]) -> None:
    if form == "json":
        out_json(report)
    else:
        out(table(*to_table(report)))


def _economics(report: Mapping[str, Any]) -> _Table:
    header = [*("POOL", "REPLICA H", "BUSY", "COST", "$/M IN", "$/M OUT", "$/M TOTAL")]
    header += [
        "NEVER IDLE",
        "AT SLO",
        "IN TIME",
        "$/1000 REQ",
        "IDLE",
        "CANCELLED",
        "PREEMPTED",
        "FAILED",
    ]
    header += ["START, DRAIN", "BILLED", "PROVISIONAL"]
    rows: list[Sequence[str]] = []
    for pool in report["data"]:
        uses = pool["cost_by_use_usd"]
        unknown = pool["requests"] and pool["usd_per_thousand_requests"] is None
        per_unit = partial(_usd, none=_NO_PRICE if unknown else "-")
        starting = float(uses["start_up"]) + float(uses["drain"])
        rows.append(
            (
                pool["pool"] or "-",
                f"{pool['replica_hours']:.1f}",
                f"{pool['busy_ratio']:.1%}",
                _pool_cost(pool),
                *(
                    per_unit(pool[f"usd_per_million_{kind}"])
                    for kind in ("input", "output", "total", "total_never_idle", "total_at_slo")
                ),
                "-" if pool["slo_ratio"] is None else f"{pool['slo_ratio']:.1%}",
                per_unit(pool["usd_per_thousand_requests"]),
                *(_usd(uses[use]) for use in ("idle", "cancelled", "preempted", "failed")),
                _usd(starting),
                _usd(pool["amount_usd"]),
                f"{pool['provisional_ratio']:.1%}",
            )
        )
    return header, rows


def _anomalies(report: Mapping[str, Any]) -> _Table:
    header = ("WHAT", "WHO", "SINCE", "WORST", "TIMES", "VALUE", "USUAL", "UNIT", "RATIO", "SCORE")
    return header, [
        (
            each["kind"],
            each["subject"],
            each["first_at"],
            each["at"],
            str(each["times"]),
            f"{each['value']:.6g}",
            f"{each['usual']:.6g}",
            each["unit"],
            f"{each['ratio']:.1f}x",
            f"{each['score']:.0f}",
        )
        for each in report["data"]
    ]


def _savings(report: Mapping[str, Any]) -> _Table:
    return ("USD A MONTH", "WHAT", "OF", "WHY"), [
        (_usd(each["saving_usd_per_month"]), each["kind"], each["subject"], each["why"])
        for each in report["data"]
    ]


def _reconciliation(report: Mapping[str, Any]) -> _Table:
    header = ("NODE", "FINDING", "ATTRIBUTED", "IDLE", "BILLED", "GAP", "GAP %")
    return header, [
        (
            each["node"] or "-",
            each["finding"],
            _usd(each["attributed_usd"]),
            _usd(each["idle_usd"]),
            _usd(each["billed_usd"]),
            _usd(each["gap_usd"]),
            "-" if each["gap_ratio"] is None else f"{each['gap_ratio']:.2%}",
        )
        for each in report["nodes"]
    ]


def _say_reconciled(report: Mapping[str, Any]) -> int:
    for hour in report["alerts"]:
        for each in hour["nodes"]:
            gap = "" if each["gap_ratio"] is None else f" {each['gap_ratio']:.2%}"
            note(f"{hour['hour']}: {each['node']}: {each['finding']}{gap}")
    if report["alerts_unshown"]:
        note(f"{report['alerts_unshown']} hours before these are not shown")
    ratio = report["gap_ratio"]
    whole = "no node could be compared" if ratio is None else f"the gap is {ratio:.2%}"
    note(f"{report['hours']} hours: {whole}; alert above {report['alert_gap_ratio']:.2%}")
    return 1 if report["alert"] else 0


def _pool_cost(pool: Mapping[str, Any]) -> str:
    if pool["unpriced_ratio"] == 1:
        return _NO_PRICE
    return _usd(pool["cost_usd"]) + ("+" if pool["unpriced_ratio"] else "")


def _usd(amount: str | float | None, none: str = "-") -> str:
    return none if amount is None else f"{float(amount):.4f}"
