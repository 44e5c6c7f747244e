"""What Ray Serve asks about an engine deployment's size: it does as Control decided.

Serve calls ``replicas`` in its controller, where nothing may block or raise. Control decides
(``serve_app/scaler.py``), each engine replica hands the decision on with its autoscaling
statistics, and the newest one counts. Without news the size stays as it is. A pool without a
replica has nobody to bring news: there a call that waits for one, a router's ``wake``, is the
demand.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any, Final

WANTED: Final = "headrace_wanted_replicas"
DECIDED_AT: Final = "headrace_decided_at_s"
"""Wall-clock seconds; of several replicas' news the latest counts."""
NEWS_MAX_AGE_S: Final = 30.0


def statistics(wanted: int | None, decided_at_s: float) -> dict[str, float]:
    """Return what an engine replica tells Serve; nothing was decided where it is None."""
    if wanted is None:
        return {WANTED: -1.0, DECIDED_AT: 0.0}
    return {WANTED: float(wanted), DECIDED_AT: decided_at_s}


def replicas(context: Any) -> tuple[int, dict[str, Any]]:
    """Return the deployment's size, and no state, for an ``AutoscalingContext``. Never raises."""
    target = _whole(getattr(context, "target_num_replicas", 0))
    try:
        wanted = _newest(context)
        if wanted is not None:
            return wanted, {}
        # Not all that is open: a router's subscription to a replica that leaves would count
        # as demand for the next one, and a pool never come to rest.
        waiting = float(context.total_queued_requests)
        return (1 if not target and waiting > 0 else target), {}
    except Exception:  # noqa: BLE001  # one policy that raises stops every application's
        return target, {}


def _newest(context: Any) -> int | None:
    """Return the latest decision, None if there is none that is fresh."""
    metrics = context.raw_metrics or {}
    sizes, times = metrics.get(WANTED) or {}, metrics.get(DECIDED_AT) or {}
    living = {str(each) for each in context.running_replicas or ()}
    latest: tuple[float, int] | None = None
    for replica in sizes:
        if str(replica) not in living:
            continue
        wanted, decided_at_s = _last(sizes, replica), _last(times, replica)
        if wanted is None or decided_at_s is None or wanted < 0:
            continue
        if latest is None or decided_at_s > latest[0]:
            latest = (decided_at_s, int(wanted))
    if latest is None or context.current_time - latest[0] > NEWS_MAX_AGE_S:
        return None
    return latest[1]


def _last(series: Mapping[Any, Any], replica: Any) -> float | None:
    values = series.get(replica)
    if not values:
        return None
    value = float(getattr(values[-1], "value", values[-1]))
    return value if isfinite(value) else None


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0
