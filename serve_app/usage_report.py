"""What may be asked of the ledger, and how its answer is written: command line and HTTP alike.

A report covers whole hours, UTC, from one on and before another. Amounts are dollars,
written exactly.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from serve_app.core.calendar import HOUR_S
from serve_app.core.pricing import dollars

BY: Final = ("tenant", "model", "user", "key", "class", "tag", "hour")
FIELDS: Final = (
    *("requests", "billed_requests", "prompt_tokens", "cached_prompt_tokens", "output_tokens"),
    *("delivered_tokens", "generated_tokens", "wasted_tokens", "wasted_usd", "amount_usd"),
    *("engine_s", "cost_usd", "wasted_cost_usd", "unpriced_s", "provisional_s", "kv_block_s"),
)

# Idle time is a pool's in an hour, and tenants bear it.
_BEAR_IDLE: Final = frozenset({"tenant", "model", "hour"})
_IDLE_FIELDS: Final = ("idle_cost_usd", "full_cost_usd")

# Reports on cost that have a name: `headrace usage NAME`, /admin/usage/NAME.
INSIGHTS: Final = (
    *("economics", "anomalies", "savings", "reconciliation", "spending"),
    *("focus", "focus_allocation"),
)
# Rows of the FinOps specification, as CSV: what was billed, and how true cost is allocated.
FOCUS_FORMATS: Final = {"focus": "focus", "focus-allocation": "focus_allocation"}


class BadQuery(ValueError):
    """A report that cannot be made; ``field`` is by, from or to."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Sums by some of BY, of the hours that begin at ``from_s`` or later and before ``to_s``."""

    by: tuple[str, ...] = ()
    from_s: int | None = None
    to_s: int | None = None

    def window(self) -> dict[str, str | None]:
        """Return ``from`` and ``to`` as reports show them; None where it is open."""
        return {
            "from": None if self.from_s is None else iso_time(self.from_s),
            "to": None if self.to_s is None else iso_time(self.to_s),
        }


def usage_query(by: str, from_: str | None, to: str | None) -> UsageQuery:
    """Return the query that a user wrote: names with commas, and ISO 8601 dates or times.

    Raises:
        BadQuery: a name is unknown, or a time is none, not a whole hour, or out of order.
    """
    names = tuple(name.strip() for name in by.split(",") if name.strip())
    for name in names:
        if name not in BY:
            raise BadQuery("by", f"{name!r:.40} is not one of {', '.join(BY)}")
    if len(set(names)) < len(names):
        raise BadQuery("by", "a name stands twice")
    from_s, to_s = _hour("from", from_), _hour("to", to)
    if from_s is not None and to_s is not None and to_s <= from_s:
        raise BadQuery("to", "must be later than from")
    return UsageQuery(names, from_s, to_s)


def iso_time(at_s: float) -> str:
    """Return wall seconds as 2026-01-31T05:00:00Z."""
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def shows_idle(by: Sequence[str]) -> bool:
    """Return whether a report by these columns can say who bears idle time.

    A rule divides a pool's idle hours over tenants; of users, keys, classes and tags it
    says nothing, and there idle time stays a row of its own.
    """
    return bool(by) and set(by) <= _BEAR_IDLE


def to_csv(report: Mapping[str, Any]) -> str:
    """Return a report's rows as CSV with a header; lines end in a line feed.

    What replicas' time went to beside requests follows in rows of its own, named in the
    column ``overhead``. So ``cost_usd`` sums to what the replicas cost, and ``full_cost_usd``
    in its place where idle time is a column: there ``cost_usd`` has none of it, and the row
    of ``idle`` only what nobody bears.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [*report["by"], *FIELDS, *(_IDLE_FIELDS if _idle_shown(report) else ())]
    writer.writerow([*columns, "overhead"])
    rows = report["data"] if report["by"] else [report["total"]]
    writer.writerows([*(row[column] for column in columns), ""] for row in rows)
    for row in _overheads(report):
        told = row | {"engine_s": row["time_s"]}
        cells = [told.get(column, "" if column in report["by"] else "0") for column in columns]
        writer.writerow([*cells, row["what"]])
    return text.getvalue()


def focus_csv(report: Mapping[str, Any]) -> str:
    """Return FOCUS rows as CSV with a header; a null is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, report["columns"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(report["data"])
    return text.getvalue()


def to_table(report: Mapping[str, Any]) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Return a report's header and rows for people: whose, the rest, and the total last.

    True cost stands there where engines measured any; it is cut to a millionth of a dollar.
    Where the columns can carry idle time it is a column of its own, and FULL USD has both:
    its total is what the replicas cost. Elsewhere idle time is a row, and the total of COST
    USD is that. What requests held of the KV cache is a second figure, in no cost, and a
    column where engines say it; so is what of the time default coefficients split where
    there is any.
    """
    shown = ("requests", "prompt_tokens", "output_tokens", "wasted_tokens", "amount_usd")
    header = [*(name.upper() for name in report["by"]), "REQUESTS", "INPUT", "OUTPUT"]
    header += ["WASTED", "USD"]
    costs = _Costs(report)
    header += costs.header()
    rows: list[Sequence[str]] = []
    for row in report["data"]:
        cells = [str(row[column]) or "-" for column in (*report["by"], *shown)]
        rows.append([*cells, *costs.cells(row, "engine_s")])
    named = bool(report["by"])
    gap = [""] * (len(report["by"]) - 1)
    if named and costs.measured:
        for row in _overheads(report):
            cells = [f"({row['what']})", *gap, *[""] * len(shown)]
            rows.append([*cells, *costs.cells(row, "time_s")])
    total = ["TOTAL", *gap] if named else []
    cells = [*total, *(str(report["total"][column]) for column in shown)]
    rows.append([*cells, *costs.cells(costs.whole(), "time_s")])
    return header, rows


class _Costs:
    """The columns of a report's table that are about true cost."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        self._report = report
        self.measured = report["fleet"]["time_s"] != "0"
        self._idle = self.measured and _idle_shown(report)
        self._held = self.measured and report["total"]["kv_block_s"] != "0"
        self._provisional = report["fleet"]["provisional_s"] != "0"

    def header(self) -> list[str]:
        return [
            *(("ENGINE S", "COST USD") if self.measured else ()),
            *(("IDLE USD", "FULL USD") if self._idle else ()),
            *(("KV BLOCK S",) if self._held else ()),
            *(("PROVISIONAL S",) if self._provisional else ()),
        ]

    def cells(self, row: Mapping[str, Any], time: str) -> list[str]:
        """Return a row's cells; ``time`` is the name of its seconds."""
        cells: list[str] = []
        if self.measured:
            cells += [_seconds(row[time]), _cost_cell(row, time, "cost_usd")]
        if self._idle:
            cells += [_cut(row["idle_cost_usd"]), _cost_cell(row, time, "full_cost_usd")]
        if self._held:
            # Only requests hold blocks, and not the rest of a replica's time.
            cells.append(_seconds(row["kv_block_s"]) if "kv_block_s" in row else "")
        if self._provisional:
            cells.append(_seconds(row["provisional_s"]))
        return cells

    def whole(self) -> dict[str, Any]:
        """Return the last row: everything, idle time apart where it is a column."""
        fleet = dict(self._report["fleet"])
        fleet["kv_block_s"] = self._report["total"]["kv_block_s"]
        if self._idle:
            idle = sum(
                row["cost_nanousd"] for row in self._report["overheads"] if row["what"] == "idle"
            )
            full = fleet["cost_nanousd"]
            fleet |= {"cost_usd": dollars(full - idle), "idle_cost_usd": dollars(idle)}
            fleet["full_cost_usd"] = dollars(full)
        return fleet


def _idle_shown(report: Mapping[str, Any]) -> bool:
    return shows_idle(report["by"]) and "idle" in report


def _overheads(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what there is of the rest, with idle time in its own column where there is one."""
    shown = _idle_shown(report)
    for row in report["overheads"]:
        if row["time_s"] == "0":
            continue
        told = {**row, "idle_cost_usd": "0", "full_cost_usd": row["cost_usd"]}
        if shown and row["what"] == "idle":
            left = report["idle"]["unallocated_usd"]
            told |= {"cost_usd": "0", "idle_cost_usd": left, "full_cost_usd": left}
        yield told


def _cut(amount: str) -> str:
    dollars, _, rest = amount.partition(".")
    return f"{dollars}.{rest[:6]:0<6}"


def _seconds(time: str) -> str:
    whole, _, part = time.partition(".")
    return f"{whole}.{part[:3]:0<3}"


def _cost_cell(row: Mapping[str, Any], time: str, amount: str) -> str:
    if row["unpriced_s"] == row[time] != "0":
        return "no price"
    return _cut(row[amount]) + ("+" if row["unpriced_s"] != "0" else "")


def _hour(field: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise BadQuery(
            field,
            f"write 2026-01-31 or 2026-01-31T05:00Z; got {text!r:.40}",
        ) from None
    whole = time if time.tzinfo is not None else time.replace(tzinfo=UTC)
    at_s = whole.timestamp()
    if at_s % HOUR_S:
        before = iso_time(at_s - at_s % HOUR_S)
        raise BadQuery(field, f"must be a whole hour, as {before} is; got {text!r:.40}")
    return int(at_s)
