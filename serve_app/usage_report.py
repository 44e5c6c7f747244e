"""What may be asked of the ledger, and how its answer is written: command line and HTTP alike.

A report covers whole hours, UTC, from one on and before another. Amounts are dollars,
written exactly.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from serve_app.core.calendar import HOUR_S

BY: Final = ("tenant", "model", "user", "key", "class", "tag", "hour")
FIELDS: Final = (
    *("requests", "billed_requests", "prompt_tokens", "cached_prompt_tokens", "output_tokens"),
    *("delivered_tokens", "generated_tokens", "wasted_tokens", "wasted_usd", "amount_usd"),
    *("engine_s", "cost_usd", "wasted_cost_usd", "unpriced_s", "provisional_s", "kv_block_s"),
)

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


def to_csv(report: Mapping[str, Any]) -> str:
    """Return a report's rows as CSV with a header; lines end in a line feed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [*report["by"], *FIELDS, *_idle_columns(report)]
    writer.writerow(columns)
    writer.writerows([row[column] for column in columns] for row in report["data"])
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
    What requests held of the KV cache is a second figure, in no cost, and a column where
    engines say it; so is what of the time default coefficients split where there is any.
    By tenant, idle time that a pool's rule has tenants bear is a column of its own.
    """
    fleet = report["fleet"]
    measured = fleet["time_s"] != "0"
    shown = ("requests", "prompt_tokens", "output_tokens", "wasted_tokens", "amount_usd")
    header = [*(name.upper() for name in report["by"]), "REQUESTS", "INPUT", "OUTPUT"]
    header += ["WASTED", "USD", *(("ENGINE S", "COST USD") if measured else ())]
    idle = bool(measured and _idle_columns(report) and report["idle"]["tenants"])
    header += ["IDLE USD"] if idle else []
    held = measured and report["total"]["kv_block_s"] != "0"
    header += ["KV BLOCK S"] if held else []
    provisional = fleet["provisional_s"] != "0"
    header += ["PROVISIONAL S"] if provisional else []

    def marked(row: Mapping[str, Any]) -> list[str]:
        # Only requests hold blocks, and not the rest of a replica's time.
        cells = [_seconds(row["kv_block_s"]) if "kv_block_s" in row else ""] if held else []
        return [*cells, _seconds(row["provisional_s"])] if provisional else cells

    rows: list[Sequence[str]] = []
    for row in report["data"]:
        cells = [str(row[column]) or "-" for column in (*report["by"], *shown)]
        costs = _cost_cells(row, "engine_s") if measured else ()
        costs = [*costs, *([_cut(row["idle_cost_usd"])] if idle else ())]
        rows.append([*cells, *costs, *marked(row)])
    named = bool(report["by"])
    if named and measured:
        for row in report["overheads"]:
            if row["time_s"] != "0":
                gap = [""] * (len(report["by"]) - 1 + len(shown))
                left = ""
                if idle and row["what"] == "idle":
                    left = _cut(report["idle"]["unallocated_usd"])
                cells = [f"({row['what']})", *gap, *_cost_cells(row, "time_s")]
                rows.append([*cells, *([left] if idle else ()), *marked(row)])
    total = ["TOTAL", *[""] * (len(report["by"]) - 1)] if named else []
    cells = [*total, *(str(report["total"][column]) for column in shown)]
    costs = _cost_cells(fleet, "time_s") if measured else ()
    whole = fleet | {"kv_block_s": report["total"]["kv_block_s"]}
    rows.append([*cells, *costs, *([""] if idle else ()), *marked(whole)])
    return header, rows


def _idle_columns(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the column of who bears idle time: only tenants do."""
    return ("idle_cost_usd",) if report["by"] == ["tenant"] and "idle" in report else ()


def _cut(amount: str) -> str:
    dollars, _, rest = amount.partition(".")
    return f"{dollars}.{rest[:6]:0<6}"


def _seconds(time: str) -> str:
    whole, _, part = time.partition(".")
    return f"{whole}.{part[:3]:0<3}"


def _cost_cells(row: Mapping[str, Any], time: str) -> list[str]:
    if row["unpriced_s"] == row[time] != "0":
        cost = "no price"
    else:
        cost = _cut(row["cost_usd"]) + ("+" if row["unpriced_s"] != "0" else "")
    return [_seconds(row[time]), cost]


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
