"""Routing by length: similar prompts share replicas."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.core.routing.loads import LoadOnly, by_load
from serve_app.core.routing.settings import RoutingSettings
from serve_app.core.saturation import Replica
from serve_app.core.types import ReplicaId, Ticket

WORK_KEPT_RATIO = 0.999
"""Work is forgotten over about a thousand requests."""


class LengthGroups(LoadOnly):
    """Short prompts and long ones prefer different replicas, others when those are worse off.

    Prompts of at least ``long_prompt_tokens`` are long. The fleet, in order of replica id,
    is split in proportion to the prompt tokens each group brought lately, both groups
    keeping at least one replica. Within its group a request goes by load; if the other
    group's least loaded replica has ``length_gap_requests`` fewer in flight, it goes there.

    Kept for comparison: docs/decisions/grouping-by-length.md says what it brings.
    """

    def __init__(self, settings: RoutingSettings) -> None:
        self._settings = settings
        self._work = [1.0, 1.0]

    def rank(
        self, ticket: Ticket, candidates: Sequence[Replica], now_s: float
    ) -> Sequence[ReplicaId]:
        """Order the request's group by load, then the other; the other first past the gap."""
        if len(candidates) == 1:
            return [candidates[0].id]
        fleet = sorted(candidates, key=lambda each: each.id)
        short_work, long_work = self._work
        short = round(len(fleet) * short_work / (short_work + long_work))
        short = min(max(short, 1), len(fleet) - 1)
        groups = (fleet[:short], fleet[short:])
        is_long = self._is_long(ticket)
        mine, other = groups[is_long], groups[not is_long]
        gap = min(each.in_flight for each in mine) - min(each.in_flight for each in other)
        if gap >= self._settings.length_gap_requests:
            mine, other = other, mine
        return [*by_load(mine), *by_load(other)]

    def placed(self, ticket: Ticket, replica: ReplicaId, now_s: float) -> None:
        """Count the group's work."""
        self._work = [work * WORK_KEPT_RATIO for work in self._work]
        self._work[self._is_long(ticket)] += ticket.prompt_tokens

    def _is_long(self, ticket: Ticket) -> bool:
        return ticket.prompt_tokens >= self._settings.long_prompt_tokens
