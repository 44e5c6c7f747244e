"""Sizing a simulated pool: the product's policy, what others do, and who knows the future.

Baselines as their documentation gives them; every time of theirs is a parameter, since a
scenario may run a day faster than it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import ceil

from serve_app.core.scaling import Decision, Demand, ScalingPolicy, ScalingState, decide
from serve_app.sim.setup import PoolLoad


class PolicyScaler:
    """The product's own policy; ``decisions`` are those it made."""

    def __init__(self, policy: ScalingPolicy, period_s: float = 1.0) -> None:
        self.period_s = period_s
        self.decisions: list[Decision] = []
        self._policy = policy
        self._state = ScalingState()

    def replicas(self, load: PoolLoad, now_s: float) -> int:
        """Return the size that ``core/scaling.py`` wants."""
        demand = Demand(
            now_s,
            load.ready,
            load.starting,
            offered=load.offered,
            queued=load.queued,
            in_flight=load.in_flight,
            stay_s=load.stay_s,
            kv_usage_ratio=load.kv_usage_ratio,
        )
        decision = decide(self._policy, self._state, demand)
        self._state = decision.state
        self.decisions.append(decision)
        return decision.replicas


class ClairvoyantScaler:
    """Knows the rate to come, and orders what it takes a cold start ahead. The bound."""

    def __init__(
        self,
        *,
        rate_per_s: Callable[[float], float],
        replica_per_s: float,
        cold_start_s: float,
        least: int,
        most: int,
        period_s: float = 1.0,
    ) -> None:
        """``replica_per_s`` is what one replica carries at its knee."""
        self.period_s = period_s
        self._rate_per_s = rate_per_s
        self._replica_per_s = replica_per_s
        self._cold_start_s = cold_start_s
        self._bounds = (least, most)

    def replicas(self, load: PoolLoad, now_s: float) -> int:
        """Return the size for the highest rate until what is ordered now can serve."""
        steps = max(1, ceil(self._cold_start_s / self.period_s))
        peak_per_s = max(self._rate_per_s(now_s + n * self.period_s) for n in range(steps + 1))
        least, most = self._bounds
        return min(max(ceil(peak_per_s / self._replica_per_s), least), most)


class KnativeScaler:
    """AIBrix's and Knative's: mean concurrency over a stable and a panic window.

    A panic begins when the short window wants ``panic_ratio`` times what is ready and lasts a
    stable window; nothing is taken away in it. Otherwise the pool shrinks to the largest size
    wanted within ``down_after_s``.

    Source: AIBrix's KPA (180 s and 60 s windows, panic at 2.0, 300 s down).
    """

    def __init__(
        self,
        *,
        target_ongoing: float,
        least: int,
        most: int,
        period_s: float = 1.0,
        stable_s: float = 180.0,
        panic_s: float = 60.0,
        panic_ratio: float = 2.0,
        down_after_s: float = 300.0,
    ) -> None:
        self.period_s = period_s
        self._target_ongoing = target_ongoing
        self._bounds = (least, most)
        self._stable_s, self._panic_s = stable_s, panic_s
        self._panic_ratio = panic_ratio
        self._down_after_s = down_after_s
        self._seen: deque[tuple[float, int]] = deque()
        self._wanted: deque[tuple[float, int]] = deque()
        self._panic_until_s = 0.0

    def replicas(self, load: PoolLoad, now_s: float) -> int:
        """Return the size wanted by the window in force."""
        size = load.ready + load.starting
        self._seen.append((now_s, load.queued + load.in_flight))
        while self._seen[0][0] < now_s - self._stable_s:
            self._seen.popleft()
        stable = self._mean(now_s - self._stable_s)
        panic = self._mean(now_s - self._panic_s)
        if panic >= self._panic_ratio * max(1, load.ready):
            self._panic_until_s = now_s + self._stable_s
        least, most = self._bounds
        if now_s < self._panic_until_s:
            return min(max(ceil(max(stable, panic)), size, least), most)
        wanted = min(max(ceil(stable), least), most)
        self._wanted.append((now_s, wanted))
        while self._wanted[0][0] < now_s - self._down_after_s:
            self._wanted.popleft()
        return max(each for _, each in self._wanted)

    def _mean(self, since_s: float) -> float:
        """Return the replicas that the concurrency since then asks for."""
        values = [count for at_s, count in self._seen if at_s >= since_s]
        return sum(values) / len(values) / self._target_ongoing


class SaturationScaler:
    """llm-d's workload-variant autoscaler: one more when spare capacity is short.

    A replica is saturated at ``kv_full`` of its cache or ``queue_full`` waiting. One more when
    the mean spare cache or queue falls below its trigger; one less only if the others, with its
    load spread over them, keep both.

    Source: llm-d's WVA, saturation mode (KV 0.80, queue 5, spare 0.1 and 3).
    """

    def __init__(
        self,
        *,
        least: int,
        most: int,
        period_s: float = 30.0,
        kv_full: float = 0.8,
        queue_full: float = 5.0,
        spare_kv: float = 0.1,
        spare_queue: float = 3.0,
    ) -> None:
        self.period_s = period_s
        self._bounds = (least, most)
        self._full = (kv_full, queue_full)
        self._spare = (spare_kv, spare_queue)

    def replicas(self, load: PoolLoad, now_s: float) -> int:
        """Return the size, one more or one less; the same while replicas start."""
        size = load.ready + load.starting
        least, most = self._bounds
        if load.starting:
            return size
        queue = load.queued / max(1, load.ready)
        if self._is_short(load.kv_usage_ratio, queue):
            return min(size + 1, most)
        if load.ready > 1:
            spread = load.ready / (load.ready - 1)
            if not self._is_short(load.kv_usage_ratio * spread, queue * spread):
                return max(size - 1, least)
        return size

    def _is_short(self, kv_ratio: float, queue: float) -> bool:
        full_kv, full_queue = self._full
        spare_kv, spare_queue = self._spare
        return full_kv - kv_ratio < spare_kv or full_queue - queue < spare_queue


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
