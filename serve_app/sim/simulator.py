"""The event loop: virtual time, the real controller, simulated engines and clients.

Each question costs a handful of events: its arrival, its first token, its end, and those
of the engine's steps in which somebody's prompt is processed. Nothing happens per token.
Everything random is drawn from seeded sources, so a seed repeats a run bit by bit.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from math import inf
from time import perf_counter, process_time

from serve_app.core.controller import Controller
from serve_app.core.engine_model import EventKind
from serve_app.core.exchange import RouterId, over_admission_most
from serve_app.core.routing import choose_pool, routing_by_policy
from serve_app.core.types import (
    Dispatch,
    Effect,
    KeyId,
    Outcome,
    PoolName,
    PriorityClass,
    Reject,
    ReplicaId,
    RequestId,
    Ticket,
    Usage,
)
from serve_app.sim.node import Attempt, Health, Node
from serve_app.sim.records import Question, Run, Sample
from serve_app.sim.setup import Fault, FaultKind, PoolLoad, PoolSetup, Scaler, Setup
from serve_app.sim.workload import Arrival, Traffic, arrivals

SAMPLE_PERIOD_S = 1.0
RETRY_SPREAD_RATIO = 0.5


def simulate(
    setup: Setup,
    streams: Iterable[Traffic],
    seed: int,
    on_progress: Callable[[float], None] | None = None,
) -> Run:
    """Run one setup under drawn traffic; see ``replay``."""
    return replay(setup, arrivals(streams, setup.arrivals_end_s, seed), seed, on_progress)


def replay(
    setup: Setup,
    requests: Iterator[Arrival],
    seed: int,
    on_progress: Callable[[float], None] | None = None,
) -> Run:
    """Run one setup under given arrivals, in order of time.

    The same arguments give the same run, but for its ``wall_s`` and ``cpu_s``.
    ``on_progress`` gets the share done, in [0, 1], once per simulated second.
    """
    started_s, started_cpu_s = perf_counter(), process_time()
    collecting = gc.isenabled()
    # A run makes millions of small objects and hardly a cycle: collection only costs.
    gc.disable()
    try:
        run = Simulator(setup, requests, seed).run(on_progress)
    finally:
        if collecting:
            gc.enable()
    run.wall_s = perf_counter() - started_s
    run.cpu_s = process_time() - started_cpu_s
    return run


class Simulator:
    """One run of one setup. ``run`` once, then read the result."""

    def __init__(self, setup: Setup, arrivals: Iterator[Arrival], seed: int) -> None:
        self._setup = setup
        self._arrivals = arrivals
        self._random = random.Random(f"{seed}:clients")
        self._controllers = [self._controller(place, seed) for place in range(setup.routers)]
        self._pools = {pool.name: pool for pool in setup.pools}
        self._nodes: dict[ReplicaId, Node] = {}
        self._ever: list[Node] = []
        self._attempts: dict[RequestId, Attempt] = {}
        self._critical: dict[RequestId, float] = {}
        self._run = Run()
        self._heap: list[tuple[float, int, Callable[..., None], object]] = []
        self._order = 0
        self._now_s = 0.0
        self._open = 0
        self._exhausted = False
        self._wakeups_s = [inf] * setup.routers
        self._starting = 0
        self._scaled_offered = self._scaled_ended = 0
        self._stays, self._stays_s = 0, 0.0

    def run(self, on_progress: Callable[[float], None] | None = None) -> Run:
        """Run to the end and return what happened.

        ``on_progress`` is called once per simulated second with the share done, in [0, 1].
        """
        setup = self._setup
        policies = {pool.name: pool.policy for pool in setup.pools}
        for router, controller in enumerate(self._controllers):
            self._apply(router, controller.configure(policies, 0.0), 0.0)
        for pool in setup.pools:
            for _ in range(pool.replicas):
                self._start_node(0.0, pool)
        for fault in setup.faults:
            self._at(fault.at_s, self._strike, fault)
        if setup.scaler is not None:
            scaler = setup.scaler()
            self._at(scaler.period_s, self._scale, scaler)
        if setup.routers > 1:
            for router in range(setup.routers):
                shift_s = setup.exchange_period_s * router / setup.routers
                self._at(shift_s, self._exchange, router)
        self._at(0.0, self._sample, on_progress)
        self._next_arrival()
        end_s = setup.arrivals_end_s + setup.drain_s
        heap = self._heap
        while heap and not (self._exhausted and self._open == 0):
            now_s, _, handler, payload = heappop(heap)
            if now_s > end_s:
                break
            self._now_s = now_s
            handler(now_s, payload)
        return self._finish()

    def open_requests(self) -> int:
        """Return how many requests the routers still hold."""
        return sum(controller.open_requests() for controller in self._controllers)

    def engines_busy(self) -> int:
        """Return how many live engines still have work."""
        return sum(bool(node.attempts) or node.engine.busy for node in self._nodes.values())

    def processed_tokens_by_pool(self) -> dict[PoolName, int]:
        """Return the prompt and output tokens the engines of each pool have computed."""
        tokens = dict.fromkeys(self._pools, 0)
        for node in self._ever:
            engine = node.engine
            tokens[node.pool] += engine.prefill_tokens_total + engine.decode_tokens_total
        return tokens

    # Events

    def _at(self, at_s: float, handler: Callable[..., None], payload: object) -> None:
        self._order += 1
        heappush(self._heap, (at_s, self._order, handler, payload))

    def _next_arrival(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is None or arrival.arrival_s >= self._setup.arrivals_end_s:
            self._exhausted = True
        else:
            self._at(arrival.arrival_s, self._arrive, arrival)

    def _arrive(self, now_s: float, arrival: Arrival) -> None:
        question = Question(arrival)
        self._run.questions.append(question)
        self._open += 1
        self._ask(now_s, question)
        self._next_arrival()

    def _ask(self, now_s: float, question: Question) -> None:
        """Send a question, for the first time or again."""
        setup, arrival, run = self._setup, question.arrival, self._run
        question.attempts += 1
        if question.asked_s is None:
            question.asked_s = now_s
        run.offered_attempts += 1
        ticket = Ticket(
            RequestId(f"{run.offered_attempts}"),
            setup.pools[0].name,
            arrival.tenant,
            KeyId(arrival.tenant),
            arrival.priority_class,
            int(arrival.prompt_tokens * setup.prompt_estimate_ratio),
            arrival.max_tokens,
            prefix_hashes=arrival.prefix_hashes,
            session=arrival.session,
        )
        if setup.heavy is not None:
            tokens = ticket.prompt_tokens + ticket.max_tokens
            pool = choose_pool(ticket.pool, tokens, setup.heavy)
            if pool != ticket.pool:
                ticket = replace(ticket, pool=pool)
        router = run.offered_attempts % setup.routers
        attempt = Attempt(question, ticket, router, now_s)
        self._attempts[ticket.request_id] = attempt
        if arrival.priority_class is PriorityClass.CRITICAL:
            self._critical[ticket.request_id] = now_s
        self._apply(router, self._controllers[router].offer(ticket, now_s), now_s)
        if setup.clients.patience_s < inf and not attempt.ended:
            self._at(now_s + setup.clients.patience_s, self._lose_patience, attempt)

    def _lose_patience(self, now_s: float, attempt: Attempt) -> None:
        if attempt.ended or attempt.first_token_s is not None:
            return
        controller = self._controllers[attempt.router]
        effects = controller.cancel(attempt.ticket.request_id, now_s)
        self._end(attempt, Outcome.CANCELLED, now_s)
        self._apply(attempt.router, effects, now_s)

    def _apply(self, router: int, effects: Sequence[Effect], now_s: float) -> None:
        """Do what the controller decided, and what it decides because of that."""
        queue = list(effects)
        for effect in queue:
            if isinstance(effect, Dispatch):
                queue.extend(self._dispatch(router, effect, now_s))
            elif isinstance(effect, Reject):
                self._refused(effect, now_s)
            else:
                self._run.notices[effect.kind] += 1

    def _dispatch(self, router: int, effect: Dispatch, now_s: float) -> Sequence[Effect]:
        """Send a request to the first replica ranked; return what follows if it fails."""
        attempt = self._attempts[effect.request_id]
        arrival = attempt.question.arrival
        self._watch_order(effect.request_id, arrival.priority_class, now_s)
        node = self._nodes.get(effect.replicas[0])
        if node is None or not node.serves or now_s < node.prefill_broken_until_s:
            attempt.question.restarts += 1
            return self._controllers[router].fail(effect.request_id, effect.replicas[0], now_s)
        attempt.dispatched_s = now_s
        output_tokens = arrival.output_tokens
        if effect.max_tokens is not None and effect.max_tokens < output_tokens:
            output_tokens = max(1, effect.max_tokens)
            attempt.question.degraded = True
        priority = arrival.priority_class
        if not self._setup.engine_priority:
            priority = PriorityClass.STANDARD
        try:
            node.start(attempt, output_tokens, priority, now_s)
        except ValueError:
            self._end(attempt, Outcome.FAILED, now_s, again=False)
            usage = Usage()
            return self._controllers[router].finish(effect.request_id, usage, Outcome.FAILED, now_s)
        self._watch_cap(node)
        self._schedule(node)
        return ()

    def _watch_cap(self, node: Node) -> None:
        """Note by how much a replica is over its cap, and over what routers may add to it."""
        run, setup = self._run, self._setup
        over = len(node.attempts) - self._pools[node.pool].policy.max_concurrency_per_replica
        if over > run.over_admitted_max:
            run.over_admitted_max = over
        if over > 0 and over - over_admission_most(node.free_at_snapshot, setup.routers) > 0:
            run.over_bound_requests += 1

    def _watch_order(
        self, request_id: RequestId, priority_class: PriorityClass, now_s: float
    ) -> None:
        """Note for how long a Critical request had waited anywhere when a Sheddable one went."""
        waiting = self._critical
        waiting.pop(request_id, None)
        if priority_class is PriorityClass.SHEDDABLE and waiting:
            waited_s = now_s - next(iter(waiting.values()))
            if waited_s > self._run.critical_passed_s:
                self._run.critical_passed_s = waited_s

    def _refused(self, effect: Reject, now_s: float) -> None:
        self._critical.pop(effect.request_id, None)
        attempt = self._attempts.pop(effect.request_id, None)
        if attempt is None:
            # Its client left at the very moment its time was up.
            return
        attempt.ended = True
        question = attempt.question
        question.outcome = None
        question.asked_s = None
        question.refused += 1
        question.refusal = effect.reason
        self._run.rejects[question.arrival.priority_class, effect.reason] += 1
        self._again_or_end(question, now_s, effect.retry_after_s)

    def _end(self, attempt: Attempt, outcome: Outcome, now_s: float, *, again: bool = True) -> None:
        """Close an attempt that did not complete; its client may ask again."""
        attempt.ended = True
        del self._attempts[attempt.ticket.request_id]
        self._critical.pop(attempt.ticket.request_id, None)
        node, question = attempt.node, attempt.question
        if node is not None:
            tokens = node.stop(attempt, now_s)
            self._run.duplicated_tokens += tokens
            self._schedule(node)
        question.outcome = outcome
        if again:
            self._again_or_end(question, now_s, None)
        else:
            self._close(question, now_s)

    def _again_or_end(self, question: Question, now_s: float, advised_s: float | None) -> None:
        clients = self._setup.clients
        if question.attempts > clients.retries_max:
            self._close(question, now_s)
            return
        wait_s = clients.backoff_s
        if advised_s is not None and self._random.random() < clients.obedient_ratio:
            wait_s = advised_s
        spread = 1.0 + RETRY_SPREAD_RATIO * (2.0 * self._random.random() - 1.0)
        self._at(now_s + wait_s * spread, self._ask, question)

    def _close(self, question: Question, now_s: float) -> None:
        question.ended_s = now_s
        self._open -= 1

    # Engines

    def _schedule(self, node: Node) -> None:
        """See that the engine is advanced when something happens in it."""
        next_s = node.next_event_s()
        if next_s != node.scheduled_s:
            node.scheduled_s = next_s
            if next_s < inf:
                self._at(max(next_s, self._now_s), self._engine_due, node)

    def _engine_due(self, now_s: float, node: Node) -> None:
        if node.scheduled_s <= now_s:
            node.scheduled_s = -inf
            self._advance(node, now_s)

    def _advance(self, node: Node, now_s: float) -> None:
        for at_s, kind, sequence in node.advance(now_s):
            attempt = sequence.name
            assert isinstance(attempt, Attempt)
            if attempt.ended:
                continue
            if kind is EventKind.FIRST_TOKEN:
                attempt.first_token_s = at_s
                attempt.reported_tokens = 1
                controller = self._controllers[attempt.router]
                tokens = ((attempt.ticket.request_id, 1),)
                self._apply(attempt.router, controller.progress(node.id, tokens, now_s), now_s)
            elif kind is EventKind.FINISHED:
                self._complete(node, attempt, at_s, now_s)
            else:
                self._run.preemptions[attempt.question.arrival.priority_class] += 1
        self._schedule(node)

    def _complete(self, node: Node, attempt: Attempt, at_s: float, now_s: float) -> None:
        sequence, question = attempt.sequence, attempt.question
        assert sequence is not None
        assert attempt.first_token_s is not None
        attempt.ended = True
        request_id = attempt.ticket.request_id
        del self._attempts[request_id]
        del node.attempts[request_id]
        question.outcome = Outcome.COMPLETED
        assert question.asked_s is not None
        question.ttft_s = attempt.first_token_s - question.asked_s
        question.output_tokens = sequence.output_tokens
        question.cached_tokens = sequence.cached_tokens
        later_tokens = sequence.output_tokens - 1
        if later_tokens:
            question.tpot_s = (at_s - attempt.first_token_s) / later_tokens
        self._close(question, at_s)
        self._stays += 1
        self._stays_s += at_s - attempt.dispatched_s
        # The engine's sequence names the attempt: without this cut they'd be a cycle.
        attempt.sequence = attempt.node = None
        question.engine_s = node.settle(attempt, Outcome.COMPLETED)
        usage = Usage(
            sequence.prompt_tokens,
            sequence.cached_tokens,
            sequence.output_tokens,
            question.engine_s,
        )
        controller = self._controllers[attempt.router]
        effects = controller.finish(request_id, usage, Outcome.COMPLETED, now_s)
        self._apply(attempt.router, effects, now_s)

    def _snapshot(self, now_s: float, node: Node) -> None:
        if node.health is Health.DEAD:
            return
        self._at(now_s + self._setup.snapshot_period_s, self._snapshot, node)
        self._advance(node, now_s)
        self._tell(now_s, node)

    def _tell(self, now_s: float, node: Node) -> None:
        view = node.view(self._setup.reported_slots, self._setup.routers > 1)
        cap = self._pools[node.pool].policy.max_concurrency_per_replica
        node.free_at_snapshot = max(0, cap - len(node.attempts))
        for router, controller in enumerate(self._controllers):
            self._apply(router, controller.observe(view, now_s), now_s)
            self._plan_wakeup(router, now_s)

    def _exchange(self, now_s: float, router: int) -> None:
        """One router tells the others what it holds and who waits; routers take turns."""
        self._at(now_s + self._setup.exchange_period_s, self._exchange, router)
        self._apply(router, self._controllers[router].advance(now_s), now_s)
        digest = self._controllers[router].digest(now_s)
        for place, controller in enumerate(self._controllers):
            if place != router:
                self._apply(place, controller.hear(digest, now_s), now_s)

    def _plan_wakeup(self, router: int, now_s: float) -> None:
        """Between two snapshots the controller may want to be woken; at most one is pending."""
        due_s = self._controllers[router].next_wakeup_s()
        if due_s is None or due_s > now_s + self._setup.snapshot_period_s:
            return
        due_s = max(due_s, now_s)
        if not now_s < self._wakeups_s[router] <= due_s:
            self._wakeups_s[router] = due_s
            self._at(due_s, self._wake, router)

    def _wake(self, now_s: float, router: int) -> None:
        self._wakeups_s[router] = inf
        self._apply(router, self._controllers[router].advance(now_s), now_s)

    def _report_progress(self, now_s: float, node: Node) -> None:
        """Tell the routers how many tokens running generations produced since the last time."""
        if node.health is Health.DEAD:
            return
        self._at(now_s + self._setup.progress_period_s, self._report_progress, node)
        if node.health is Health.HUNG:
            return
        self._advance(node, now_s)
        batches: list[list[tuple[RequestId, int]]] = [[] for _ in self._controllers]
        generated = node.engine.generated
        for request_id, attempt in node.attempts.items():
            if attempt.first_token_s is None or attempt.sequence is None:
                continue
            tokens = generated(attempt.sequence)
            if tokens > attempt.reported_tokens:
                batches[attempt.router].append((request_id, tokens - attempt.reported_tokens))
                attempt.reported_tokens = tokens
        for router, batch in enumerate(batches):
            if batch:
                effects = self._controllers[router].progress(node.id, batch, now_s)
                self._apply(router, effects, now_s)

    # Replicas coming and going

    def _start_node(self, now_s: float, pool: PoolSetup) -> None:
        number = len(self._ever)
        measure_cost = self._setup.measure_cost or pool.policy.fairness.by_engine_seconds
        node = Node(
            ReplicaId(f"{pool.name}-{number}"),
            pool.name,
            pool.engine,
            now_s,
            measure_cost=measure_cost,
        )
        self._ever.append(node)
        self._nodes[node.id] = node
        self._tell(now_s, node)
        # Replicas' periods are shifted against each other, as unsynchronised ones' are.
        shift_ratio = (number % max(1, pool.replicas) + 1) / max(1, pool.replicas)
        self._at(now_s + shift_ratio * self._setup.snapshot_period_s, self._snapshot, node)
        self._at(now_s + shift_ratio * self._setup.progress_period_s, self._report_progress, node)

    def _scale(self, now_s: float, scaler: Scaler) -> None:
        """Ask the scaler for the first pool's size; start or drain replicas accordingly."""
        self._at(now_s + scaler.period_s, self._scale, scaler)
        pool = self._setup.pools[0]
        ready = [
            node
            for node in self._nodes.values()
            if node.pool == pool.name and node.health is Health.UP
        ]
        offered, ended = len(self._run.questions), len(self._run.questions) - self._open
        load = PoolLoad(
            ready=len(ready),
            starting=self._starting,
            queued=sum(each.queue_depth(pool.name) for each in self._controllers),
            in_flight=sum(len(node.attempts) for node in ready),
            kv_usage_ratio=sum(each.engine.kv_usage_ratio() for each in ready) / max(1, len(ready)),
            offered=offered - self._scaled_offered,
            ended=ended - self._scaled_ended,
            since_s=scaler.period_s,
            stay_s=self._stays_s / self._stays if self._stays else None,
        )
        self._stays, self._stays_s = 0, 0.0
        self._scaled_offered, self._scaled_ended = offered, ended
        wanted = scaler.replicas(load, now_s)
        change = wanted - len(ready) - self._starting
        self._run.sizes.append((now_s, wanted))
        for _ in range(change):
            self._order_node(now_s, pool)
        for node in sorted(ready, key=lambda each: len(each.attempts))[: max(0, -change)]:
            node.health = Health.DRAINING
            self._tell(now_s, node)
            self._leave_when_empty(now_s, node)

    def _order_node(self, now_s: float, pool: PoolSetup) -> None:
        """Start a replica that serves after its cold start; it is paid for from now on."""
        self._starting += 1
        self._run.replica_s += pool.cold_start_s
        self._at(now_s + pool.cold_start_s, self._arrive_node, pool)

    def _arrive_node(self, now_s: float, pool: PoolSetup) -> None:
        self._starting -= 1
        self._start_node(now_s, pool)

    def _leave_when_empty(self, now_s: float, node: Node) -> None:
        if node.health is Health.DEAD:
            return
        if node.attempts:
            self._at(now_s + SAMPLE_PERIOD_S, self._leave_when_empty, node)
        else:
            self._remove(now_s, node)

    def _strike(self, now_s: float, fault: Fault) -> None:
        pool = self._setup.pools[0]
        alive = [node for node in self._nodes.values() if node.pool == pool.name]
        if not alive:
            return
        node = alive[fault.replica % len(alive)]
        self._advance(node, now_s)
        if fault.kind is FaultKind.KILL:
            self._kill(now_s, node)
        elif fault.kind is FaultKind.DRAIN:
            node.health = Health.DRAINING
            self._at(now_s + fault.duration_s, self._retire, node)
            self._order_node(now_s, pool)
        elif fault.kind is FaultKind.HANG:
            node.health = Health.HUNG
            node.scheduled_s = inf
            self._at(now_s + fault.duration_s, self._kill, node)
        else:
            node.prefill_broken_until_s = now_s + fault.duration_s
            self._fail_attempts(
                node, [each for each in node.attempts.values() if each.first_token_s is None], now_s
            )

    def _retire(self, now_s: float, node: Node) -> None:
        # A pool that shrank may have let go of it before its notice was over.
        if node.health is not Health.DEAD:
            self._remove(now_s, node)

    def _kill(self, now_s: float, node: Node) -> None:
        """Lose a replica and start another of its pool."""
        if node.health is Health.DEAD:
            return
        self._remove(now_s, node)
        self._order_node(now_s, self._pools[node.pool])

    def _remove(self, now_s: float, node: Node) -> None:
        node.health = Health.DEAD
        node.scheduled_s = inf
        node.stopped_s = now_s
        del self._nodes[node.id]
        for router, controller in enumerate(self._controllers):
            self._apply(router, controller.forget(node.id, now_s), now_s)
        self._fail_attempts(node, list(node.attempts.values()), now_s)

    def _fail_attempts(self, node: Node, attempts: Iterable[Attempt], now_s: float) -> None:
        """Fail over what has no token yet; the rest is lost to its client."""
        for attempt in attempts:
            if attempt.ended:
                continue
            controller = self._controllers[attempt.router]
            request_id = attempt.ticket.request_id
            if attempt.first_token_s is None:
                node.stop(attempt, now_s)
                attempt.question.restarts += 1
                effects = controller.fail(request_id, node.id, now_s)
            else:
                assert attempt.sequence is not None
                self._run.lost_requests += 1
                tokens = node.engine.generated(attempt.sequence)
                usage = Usage(attempt.question.arrival.prompt_tokens, 0, tokens)
                self._end(attempt, Outcome.FAILED, now_s)
                effects = controller.finish(request_id, usage, Outcome.FAILED, now_s)
            self._apply(attempt.router, effects, now_s)
        if node.health is not Health.DEAD:
            self._schedule(node)

    # Figures

    def _sample(self, now_s: float, on_progress: Callable[[float], None] | None) -> None:
        self._at(now_s + SAMPLE_PERIOD_S, self._sample, on_progress)
        nodes = [node for node in self._nodes.values() if node.health is not Health.DEAD]
        queued = sum(
            controller.queue_depth(pool) for controller in self._controllers for pool in self._pools
        )
        usage = sum(node.engine.kv_usage_ratio() for node in nodes) / max(1, len(nodes))
        in_flight = sum(len(node.attempts) for node in nodes)
        figures = (each.figures(pool) for each in self._controllers for pool in self._pools)
        rung = max((each.rung for each in figures if each is not None), default=0)
        self._run.samples.append(Sample(now_s, queued, in_flight, usage, len(nodes), rung))
        if on_progress is not None:
            on_progress(min(1.0, now_s / self._setup.arrivals_end_s))

    def _finish(self) -> Run:
        run = self._run
        run.ended_at_s = self._now_s
        run.processed_tokens = sum(self.processed_tokens_by_pool().values())
        for node in self._ever:
            engine = node.engine
            run.prefix_query_tokens += engine.prefix_query_tokens
            run.prefix_hit_tokens += engine.prefix_hit_tokens
            stopped_s = self._now_s if node.stopped_s is None else node.stopped_s
            run.replica_s += stopped_s - node.started_s
        return run

    def _controller(self, place: int, seed: int) -> Controller:
        source = random.Random(f"{seed}:router-{place}")
        router = RouterId(f"router-{place}")
        return Controller(routing_by_policy(self._setup.routing, source), router)
