"""A replica's life in pieces, each on the account of one hour.

An account begins where the one before it ended, so that pieces follow one another without a
gap and their uses add up to the replica's life. What ends between two cuts is on the account
that is open then: a request's time and the piece that holds it are in the same hour. Time that
holds no request's, a start above all, is on the account of the hour that it was in.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.core.attribution import ReplicaUse, Use
from serve_app.core.calendar import HOUR_NS, HOUR_S, NS_PER_S


@dataclass(frozen=True, slots=True)
class Period:
    """A piece of a life; ``uses_ns`` sums to the wall nanoseconds between its ends.

    ``hour`` is the account's, wall seconds. Of the uses only ``OPEN`` may be below zero: of
    requests that ended, what an earlier piece had as open. ``provisional_ns`` of it was split
    by default coefficients.
    """

    number: int
    hour: int
    from_ns: int
    until_ns: int
    uses_ns: dict[Use, int]
    provisional_ns: int = 0


class Periods:
    """One per replica. Wall time is taken once, at the beginning; then life itself counts."""

    def __init__(self, wall_ns: int, use: ReplicaUse) -> None:
        """``use`` is the life so far, at ``wall_ns``; its first piece begins at its birth."""
        self._reached_ns = wall_ns - use.lifetime_ns
        self._used = dict.fromkeys(Use, 0)
        self._lived_ns = 0
        self._provisional_ns = 0
        self._number = 0

    @property
    def hour(self) -> int:
        """The account that what ends now is on, wall seconds."""
        return self._reached_ns // HOUR_NS * HOUR_S

    def cut(self, use: ReplicaUse) -> list[Period]:
        """Return the piece since the last cut, and before it one for each hour of a start.

        Nothing is returned if no time has passed. Time of which nothing is known is divided
        as a start is where there is no other.
        """
        lasted_ns = use.lifetime_ns - self._lived_ns
        if lasted_ns <= 0:
            return []
        uses = {name: time_ns - self._used[name] for name, time_ns in use.uses.items()}
        uses = {name: time_ns for name, time_ns in uses.items() if time_ns}
        # It is the first in a life: the others come after it.
        alone = Use.UNATTRIBUTED if set(uses) == {Use.UNATTRIBUTED} else Use.START_UP
        until_ns = self._reached_ns + lasted_ns
        pieces: list[Period] = []
        while True:
            hour_ns = HOUR_NS - self._reached_ns % HOUR_NS
            if hour_ns > uses.get(alone, 0) or hour_ns >= until_ns - self._reached_ns:
                break
            uses[alone] -= hour_ns
            pieces.append(self._piece(self._reached_ns + hour_ns, {alone: hour_ns}, 0))
        uses = {name: time_ns for name, time_ns in uses.items() if time_ns}
        provisional_ns = use.provisional_ns - self._provisional_ns
        pieces.append(self._piece(until_ns, uses, provisional_ns))
        self._used.update(use.uses)
        self._provisional_ns = use.provisional_ns
        self._lived_ns = use.lifetime_ns
        return pieces

    def _piece(self, until_ns: int, uses_ns: dict[Use, int], provisional_ns: int) -> Period:
        self._number += 1
        from_ns, hour = self._reached_ns, self.hour
        self._reached_ns = until_ns
        return Period(self._number, hour, from_ns, until_ns, uses_ns, provisional_ns)

    def until_next_hour_s(self) -> float:
        """Return how long after the last cut the account's hour ends."""
        return (HOUR_NS - self._reached_ns % HOUR_NS) / NS_PER_S
