"""Routing by who asks: sessions return to their replica, adapters to where they are loaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from serve_app.core.routing.loads import LoadOnly, by_load
from serve_app.core.routing.prefixes import PrefixAware
from serve_app.core.routing.rendezvous import rendezvous
from serve_app.core.routing.settings import RoutingSettings
from serve_app.core.saturation import Replica
from serve_app.core.types import ReplicaId, Ticket

RESIDENT, FREE_SLOT, WAITING, FULL = 1.0, 0.8, 0.6, 0.0


class SessionAffinity(PrefixAware):
    """A session always prefers the same replicas in the same order, within a load bound.

    Replicas are ordered by a hash of session and replica, so losing or adding one moves
    only the sessions that preferred it. Replicas with more than ``session_load_factor``
    times the mean requests in flight, this request included, go to the back. A request
    without a session goes by load.

    Source: rendezvous hashing (Thaler and Ravishankar); the bound is that of consistent
    hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, arXiv 1608.01350).
    """

    def rank(
        self, ticket: Ticket, candidates: Sequence[Replica], now_s: float
    ) -> Sequence[ReplicaId]:
        """Order by the session's preference, overloaded replicas last."""
        order = by_load(candidates)
        session = ticket.session
        if session is None or len(order) == 1:
            return order
        loads = {each.id: each.in_flight for each in candidates}
        mean = (sum(loads.values()) + 1) / len(loads)
        limit = max(1.0, mean * self._settings.session_load_factor)
        order.sort(key=lambda replica: (loads[replica] + 1 > limit, -rendezvous(session, replica)))
        return order


class AdapterLocality(LoadOnly):
    """The replica where the adapter is loaded, while that does not pile requests up.

    Score 1.0 where the adapter is resident or being loaded into a free slot, 0.8 where a
    slot is free, 0.6 where it waits for a slot, 0 where all slots are taken; ties go by
    load. A replica more than ``adapter_gap_requests`` above the least loaded goes behind
    the others. Loading or waiting is what this router sent there and the snapshot does not
    yet show: of the last ``adapter_slots`` adapters sent. A request without an adapter goes
    by load.

    Source: the Gateway API inference extension's LoRA affinity scorer.
    """

    def __init__(self, settings: RoutingSettings) -> None:
        self._settings = settings
        self._asked: dict[ReplicaId, OrderedDict[str, None]] = {}

    def rank(
        self, ticket: Ticket, candidates: Sequence[Replica], now_s: float
    ) -> Sequence[ReplicaId]:
        """Order by adapter score, then load; piled-up replicas last."""
        order = by_load(candidates)
        if ticket.adapter is None:
            return order
        by_id = {each.id: each for each in candidates}
        limit = by_id[order[0]].in_flight + self._settings.adapter_gap_requests
        scores = {each.id: self._score(each, ticket.adapter) for each in candidates}
        order.sort(key=lambda replica: (by_id[replica].in_flight > limit, -scores[replica]))
        return order

    def placed(self, ticket: Ticket, replica: ReplicaId, now_s: float) -> None:
        """Expect the replica to load the adapter."""
        if ticket.adapter is None:
            return
        asked = self._asked.setdefault(replica, OrderedDict())
        asked[ticket.adapter] = None
        asked.move_to_end(ticket.adapter)
        while len(asked) > self._settings.adapter_slots:
            asked.popitem(last=False)

    def forgotten(self, replica: ReplicaId) -> None:
        """Drop what was asked of a lost replica."""
        self._asked.pop(replica, None)

    def _score(self, replica: Replica, adapter: str) -> float:
        resident = replica.view.adapters
        if adapter in resident:
            return RESIDENT
        unseen = [each for each in self._asked.get(replica.id, ()) if each not in resident]
        free_slots = self._settings.adapter_slots - len(resident) - len(unseen)
        if adapter in unseen:
            return RESIDENT if free_slots >= 0 else WAITING
        return FREE_SLOT if free_slots > 0 else FULL
