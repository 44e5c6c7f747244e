"""What ``headrace simulate`` shows: a table, and a bar while it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from serve_app.sim.compare import Result

BAR_CHARACTERS = 30


def table(results: Sequence[Result]) -> str:
    """Return the results as a text table, a line per contender."""
    head = (
        "policy", "good/s", "of knee", "jain", "TTFT p99 crit", "std", "shed", "shed crit",
        "std", "shed", "wasted", "hits", "req/wall s",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    for result in results:
        mean = result.mean
        ttft_s, shed = mean["ttft_p99_s"], mean["shed_ratio"]
        rows.append(
            (
                result.contender,
                _number(mean["goodput_per_s"], "{:.1f}"),
                _number(mean["goodput_ratio"], "{:.3f}"),
                _number(mean["jain"], "{:.3f}"),
                *(_number(ttft_s[name], "{:.2f}") for name in ("critical", "standard")),
                _number(ttft_s["sheddable"], "{:.2f}"),
                *(_number(shed[name], "{:.3f}") for name in ("critical", "standard")),
                _number(shed["sheddable"], "{:.3f}"),
                _number(mean["wasted_token_ratio"], "{:.4f}"),
                _number(mean["prefix_hit_ratio"], "{:.3f}"),
                _number(mean["requests_per_wall_s"], "{:.0f}"),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines) + "\n"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


class Bar:
    """A progress bar on standard error; silent where that is no terminal."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._shown = -1

    def show(self, done: float) -> None:
        """Draw the share done, in [0, 1]."""
        percent = int(100 * done)
        if not self._enabled or percent == self._shown:
            return
        self._shown = percent
        filled = int(BAR_CHARACTERS * done)
        sys.stderr.write(f"\r[{'#' * filled:<{BAR_CHARACTERS}}] {percent:3d} %")
        sys.stderr.flush()

    def clear(self) -> None:
        """Remove the bar."""
        if self._enabled:
            sys.stderr.write("\r" + " " * (BAR_CHARACTERS + 9) + "\r")
