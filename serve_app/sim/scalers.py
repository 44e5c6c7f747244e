"""Sizing a simulated pool: what Ray Serve does by default, to compare against."""

from __future__ import annotations

from math import ceil

from serve_app.sim.setup import PoolLoad


class OngoingRequestsScaler:
    """Ray Serve's default: enough replicas for a target of ongoing requests each.

    Desired = ongoing / target, smoothed by nothing; a change must be wanted for
    ``upscale_delay_s`` or ``downscale_delay_s`` in a row before it is made.

    Source: Ray Serve's autoscaling policy (30 s up, 600 s down by default).
    """

    def __init__(
        self,
        *,
        target_ongoing: float,
        least: int,
        most: int,
        period_s: float = 10.0,
        upscale_delay_s: float = 30.0,
        downscale_delay_s: float = 600.0,
    ) -> None:
        self.period_s = period_s
        self._target_ongoing = target_ongoing
        self._least, self._most = least, most
        self._delays_s = (upscale_delay_s, downscale_delay_s)
        self._wanted_since_s: float | None = None
        self._direction = 0

    def replicas(self, load: PoolLoad, now_s: float) -> int:
        """Return the size wanted long enough, else the present one."""
        size = load.ready + load.starting
        ongoing = load.queued + load.in_flight
        wanted = min(max(ceil(ongoing / self._target_ongoing), self._least), self._most)
        direction = (wanted > size) - (wanted < size)
        if direction != self._direction:
            self._direction = direction
            self._wanted_since_s = now_s
        if direction == 0 or self._wanted_since_s is None:
            return size
        delay_s = self._delays_s[0] if direction > 0 else self._delays_s[1]
        return wanted if now_s - self._wanted_since_s >= delay_s else size


def oscillations(sizes: list[tuple[float, int]]) -> int:
    """Return how often the wanted size changed direction."""
    turns, direction, previous = 0, 0, None
    for _, size in sizes:
        if previous is not None and size != previous:
            change = 1 if size > previous else -1
            turns += direction not in (0, change)
            direction = change
        previous = size
    return turns
