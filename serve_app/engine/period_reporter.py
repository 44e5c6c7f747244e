"""A replica's account of its own time, sent to the ledger once a minute and at every hour."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from serve_app.core.attribution import ReplicaUse, Use
from serve_app.core.calendar import NS_PER_S
from serve_app.core.periods import Periods
from serve_app.usage import ReplicaPeriod

# A replica that is killed takes at most this much of its idle time to the grave.
PERIOD_S: Final = 60.0
# A step that goes on past the hour is known when it ends: look again, and not at once.
_PAUSE_S: Final = 0.1


class Costs(Protocol):
    """What an engine says of its time; see cost_meter.EngineCosts."""

    @property
    def use(self) -> ReplicaUse: ...


@dataclass(frozen=True, slots=True)
class Place:
    """What a replica is and what it stands on; ``instance`` is what that is priced as."""

    replica: str
    pool: str
    node: str
    instance: str
    gpus: float


class PeriodReporter:
    """One per replica, from when its engine is ready. On its event loop only.

    An engine that does not measure its steps has lived all the same: all its time is
    unattributed.
    """

    def __init__(
        self,
        place: Place,
        costs: Callable[[], Costs | None],
        note: Callable[[ReplicaPeriod], None],
        *,
        clock: Callable[[], float],
        wall_ns: Callable[[], int],
        born_s: float,
    ) -> None:
        """``note`` has a period written down; ``born_s`` is the engine's birth on ``clock``."""
        self._place = place
        self._costs = costs
        self._note = note
        self._clock = clock
        self._born_s = born_s
        self._periods = Periods(wall_ns(), self._read())
        self._task: asyncio.Task[None] | None = None

    @property
    def hour(self) -> int:
        """The account that a request which ends now is on, wall seconds."""
        return self._periods.hour

    def start(self) -> None:
        """Begin to report."""
        self._report()
        self._task = asyncio.create_task(self._every_period())

    def report(self) -> None:
        """Write down what there is up to now; the next piece begins here."""
        self._report()

    async def stop(self) -> None:
        """Report the last piece and end. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
            self._report()

    async def _every_period(self) -> None:
        while True:
            rest_s = self._periods.until_next_hour_s()
            await asyncio.sleep(max(_PAUSE_S, min(PERIOD_S, rest_s)))
            self._report()

    def _report(self) -> None:
        for period in self._periods.cut(self._read()):
            self._note(
                ReplicaPeriod(
                    replica=self._place.replica,
                    number=period.number,
                    pool=self._place.pool,
                    node=self._place.node,
                    instance=self._place.instance,
                    gpus=self._place.gpus,
                    hour=period.hour,
                    from_ns=period.from_ns,
                    until_ns=period.until_ns,
                    uses_ns={use.value: time_ns for use, time_ns in period.uses_ns.items()},
                    provisional_ns=period.provisional_ns,
                )
            )

    def _read(self) -> ReplicaUse:
        costs = self._costs()
        if costs is not None:
            return costs.use
        lived_ns = round((self._clock() - self._born_s) * NS_PER_S)
        return ReplicaUse(lived_ns, {Use.UNATTRIBUTED: lived_ns})
