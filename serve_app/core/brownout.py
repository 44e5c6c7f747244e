"""The brownout ladder: what a pool gives up, rung by rung, before it fails everyone.

rung 1  shed Sheddable        rung 3  Standard goes to the fallback pool
rung 2  cap the output        rung 4  Critical only

Steps up at once to the rung that the KV use, the queues or a preemption storm demand.
Steps down one rung at a time, each after ``stable_s`` during which a lower rung was
demanded even with ``hysteresis_ratio`` added to the load. So after any change the next
step down is at least ``stable_s`` away, and the ladder cannot flap faster.
"""

from __future__ import annotations

from math import inf

from serve_app.core.policy import BrownoutPolicy

RUNGS = 4
STORM_WINDOW_S = 5.0


class Ladder:
    """One pool's rung, in [0, 4]; ``updated_s`` is when it was last looked at."""

    __slots__ = ("_below_since_s", "_policy", "_storm_per_s", "_storm_s", "rung", "updated_s")

    def __init__(self, policy: BrownoutPolicy) -> None:
        self._policy = policy
        self.rung = 0
        self.updated_s = -inf
        self._below_since_s: float | None = None
        self._storm_per_s = 0.0
        self._storm_s: float | None = None

    def configure(self, policy: BrownoutPolicy) -> None:
        """Use other thresholds from the next update on; the rung stays."""
        self._policy = policy

    @property
    def sheds_sheddable(self) -> bool:
        """Whether Sheddable is refused."""
        return self.rung >= 1 and self._policy.shed_sheddable

    @property
    def caps_output(self) -> bool:
        """Whether answers of less than Critical are shortened."""
        return self.rung >= 2 and self._policy.cap_output

    @property
    def uses_fallback(self) -> bool:
        """Whether Standard goes to the fallback pool."""
        return self.rung >= 3 and self._policy.use_fallback

    @property
    def sheds_standard(self) -> bool:
        """Whether Standard is refused."""
        return self.rung >= 4 and self._policy.critical_only

    def preempted(self, preemptions: int, replicas: int, now_s: float) -> None:
        """Count preemptions that engines reported since the last call."""
        if self._storm_s is not None:
            elapsed_s = now_s - self._storm_s
            self._storm_per_s *= STORM_WINDOW_S / (STORM_WINDOW_S + elapsed_s)
        self._storm_s = now_s
        self._storm_per_s += preemptions / (STORM_WINDOW_S * max(1, replicas))

    def update(
        self, kv_usage_ratio: float, queue_ratios: tuple[float, float], now_s: float
    ) -> int | None:
        """Move to the rung the load demands; return the new rung if it changed.

        ``queue_ratios`` say how full the Critical and the Standard queue are.
        """
        self.updated_s = now_s
        demanded = self._demanded(kv_usage_ratio, queue_ratios, 0.0, now_s)
        if not self.rung and not demanded:
            return None
        if demanded > self.rung:
            self.rung = demanded
            self._below_since_s = None
            return self.rung
        margin = self._policy.hysteresis_ratio
        if self._demanded(kv_usage_ratio, queue_ratios, margin, now_s) >= self.rung:
            self._below_since_s = None
            return None
        if self._below_since_s is None:
            self._below_since_s = now_s
            return None
        if now_s - self._below_since_s < self._policy.stable_s:
            return None
        self.rung -= 1
        self._below_since_s = now_s
        return self.rung

    def _demanded(
        self, kv_usage_ratio: float, queue_ratios: tuple[float, float], margin: float, now_s: float
    ) -> int:
        """Return the highest rung demanded with ``margin`` added to the load.

        Standard is shed for a full Critical queue, never for its own.
        """
        policy = self._policy
        if self._storm(now_s) >= policy.storm_preemptions_per_s:
            return RUNGS
        for rung in range(RUNGS, 0, -1):
            fill = queue_ratios[0] if rung == RUNGS else max(queue_ratios)
            if (
                kv_usage_ratio + margin >= policy.kv_ratios[rung - 1]
                or fill + margin >= policy.queue_ratios[rung - 1]
            ):
                return rung
        return 0

    def _storm(self, now_s: float) -> float:
        if self._storm_s is None:
            return 0.0
        elapsed_s = now_s - self._storm_s
        return self._storm_per_s * STORM_WINDOW_S / (STORM_WINDOW_S + elapsed_s)
