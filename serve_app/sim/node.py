"""One simulated replica: an engine model, its snapshots, and what can befall it."""

from __future__ import annotations

from enum import Enum
from math import inf

from serve_app.core.attribution import Account
from serve_app.core.cost_meter import CostMeter
from serve_app.core.engine_model import EngineModel, EngineParams, Event, Sequence
from serve_app.core.model_steps import ModelSteps
from serve_app.core.types import Outcome, PoolName, ReplicaId, ReplicaView, RequestId, Ticket
from serve_app.sim.records import Question


class Attempt:
    """One HTTP request of a client: a question asked once."""

    __slots__ = (
        "account",
        "dispatched_s",
        "ended",
        "first_token_s",
        "node",
        "number",
        "offered_s",
        "question",
        "reported_tokens",
        "router",
        "sequence",
        "ticket",
    )

    def __init__(self, question: Question, ticket: Ticket, router: int, now_s: float) -> None:
        self.question = question
        self.ticket = ticket
        self.router = router
        self.number = question.attempts
        self.offered_s = now_s
        self.dispatched_s = now_s
        self.first_token_s: float | None = None
        self.reported_tokens = 0
        self.node: Node | None = None
        self.sequence: Sequence | None = None
        self.account: Account | None = None
        self.ended = False


class Health(Enum):
    """What a replica is doing."""

    UP = "up"
    DRAINING = "draining"
    HUNG = "hung"
    DEAD = "dead"


class Node:
    """A replica of one pool and the attempts that run on it.

    ``scheduled_s`` is the time of the one entry in the event queue that counts. With
    ``measure_cost`` the engine's steps are split over the attempts, as a replica does it.
    """

    __slots__ = (
        "attempts",
        "engine",
        "free_at_snapshot",
        "health",
        "id",
        "meter",
        "pool",
        "prefill_broken_until_s",
        "scheduled_s",
        "sequence_number",
        "started_s",
        "stopped_s",
    )

    def __init__(
        self,
        replica: ReplicaId,
        pool: PoolName,
        params: EngineParams,
        now_s: float,
        *,
        measure_cost: bool = False,
    ) -> None:
        self.id = replica
        self.pool = pool
        self.meter: CostMeter | None = None
        on_run = on_freed = None
        if measure_cost:
            self.meter = CostMeter(now_s, params.block_tokens)
            self.meter.ready(now_s)
            steps = ModelSteps(self.meter, lambda model_s: model_s, _account_of)
            on_run, on_freed = steps.stepped, steps.freed
        self.engine = EngineModel(params, on_run=on_run, on_freed=on_freed)
        self.attempts: dict[RequestId, Attempt] = {}
        self.free_at_snapshot = 0
        self.health = Health.UP
        self.prefill_broken_until_s = -inf
        self.scheduled_s = inf
        self.sequence_number = 0
        self.started_s = now_s
        self.stopped_s: float | None = None

    @property
    def serves(self) -> bool:
        """Whether a request sent here now is taken (a hung replica takes it, too)."""
        return self.health in (Health.UP, Health.HUNG)

    def view(self, reported_slots: int | None, several_routers: bool) -> ReplicaView:
        """Return the next snapshot; the engine has been advanced to now.

        A lone router knows all prompts itself; counting them is left out for it.
        """
        self.sequence_number += 1
        engine = self.engine
        unstarted = 0
        if self.health is Health.HUNG:
            unstarted = sum(attempt.sequence is None for attempt in self.attempts.values())
        return ReplicaView(
            replica=self.id,
            pool=self.pool,
            sequence=self.sequence_number,
            slots=reported_slots or engine.params.max_num_seqs,
            running=engine.running,
            waiting=engine.waiting + unstarted,
            kv_usage_ratio=engine.kv_usage_ratio(),
            kv_tokens_capacity=engine.capacity_tokens,
            preemptions_total=engine.preemptions_total,
            in_flight_tokens=engine.in_flight_tokens(),
            prefill_tokens=engine.prefill_tokens() if several_routers else 0,
            draining=self.health is Health.DRAINING,
        )

    def start(self, attempt: Attempt, output_tokens: int, priority: int, now_s: float) -> None:
        """Begin generating for an attempt.

        Raises:
            ValueError: the request could never fit this engine.
        """
        arrival = attempt.question.arrival
        if self.health is not Health.HUNG:
            if self.meter is not None:
                attempt.account = self.meter.open(attempt.ticket.tenant)
            attempt.sequence = self.engine.add(
                attempt,
                now_s,
                prompt_tokens=arrival.prompt_tokens,
                output_tokens=output_tokens,
                priority=priority,
                hashes=arrival.prefix_hashes,
            )
        attempt.node = self
        self.attempts[attempt.ticket.request_id] = attempt

    def stop(self, attempt: Attempt, now_s: float) -> int:
        """Drop an attempt; return how many output tokens it had produced."""
        del self.attempts[attempt.ticket.request_id]
        attempt.node = None
        if attempt.sequence is None:
            return 0
        if self.health is not Health.HUNG:
            self.engine.abort(attempt.sequence, now_s)
            self.settle(attempt, Outcome.CANCELLED)
        return self.engine.generated(attempt.sequence)

    def settle(self, attempt: Attempt, outcome: Outcome) -> float:
        """Return the engine time of an attempt that has ended, in seconds; 0 unmeasured."""
        account = attempt.account
        if self.meter is None or account is None:
            return 0.0
        self.meter.close(account, outcome)
        return account.engine_s

    def advance(self, now_s: float) -> list[Event]:
        """Return the engine's events up to ``now_s``; a hung or dead engine has none."""
        if self.health in (Health.HUNG, Health.DEAD):
            return []
        return self.engine.advance(now_s)

    def next_event_s(self) -> float:
        """Return when the engine must be advanced next."""
        if self.health in (Health.HUNG, Health.DEAD):
            return inf
        return self.engine.next_event_s()


def _account_of(sequence: Sequence) -> Account:
    attempt = sequence.name
    assert isinstance(attempt, Attempt)
    assert attempt.account is not None
    return attempt.account
