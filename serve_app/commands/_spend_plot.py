"""Spending over time as a PNG file. Needs the ``plots`` extra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve_app.core.calendar import HOUR_S

_GREYS = ("0.85", "0.7", "0.6", "0.5", "0.4", "0.3")


def draw_spending(report: Mapping[str, Any], file: Path) -> None:
    """Write what each day cost, by model and by what was nobody's, with what was billed.

    A day some of whose time has no price, and is in no bar, says so.

    ``report`` is ledger.spending_days'.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    days = [each["day"] for each in report["data"]]
    reached = [0.0] * len(days)
    for label, values, colour in _bands(report):
        axes.bar(days, values, bottom=reached, label=label, color=colour, width=0.9)
        reached = [before + value for before, value in zip(reached, values, strict=True)]
    billed = [float(each["billed_usd"]) for each in report["data"]]
    axes.plot(days, billed, color="black", marker=".", label="billed")
    for place, each in enumerate(report["data"]):
        if each["unpriced_s"] != "0":
            mark = f"{float(each['unpriced_s']) / HOUR_S:.1f} h no price"
            axes.annotate(mark, (place, reached[place]), rotation=90, ha="center", fontsize="small")
    axes.set_title("What replicas cost by day, and what was billed")
    axes.set_ylabel(f"{report['currency']} a day")
    axes.grid(visible=True, axis="y", alpha=0.3)
    shown = max(1, len(days) // 15)
    axes.set_xticks(range(0, len(days), shown), days[::shown], rotation=45, ha="right")
    if days:
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=110)


def _bands(report: Mapping[str, Any]) -> list[tuple[str, list[float], str | None]]:
    bands: list[tuple[str, list[float], str | None]] = []
    for kind in ("models_usd", "overheads_usd"):
        names = sorted({name for each in report["data"] for name in each[kind]})
        for place, name in enumerate(names):
            values = [float(each[kind].get(name, "0")) for each in report["data"]]
            if any(value > 0 for value in values):
                grey = _GREYS[place % len(_GREYS)] if kind == "overheads_usd" else None
                bands.append((name.replace("_", " "), [max(0.0, each) for each in values], grey))
    return bands
