"""The bugs that are planted: what, where, and which tests must see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CORE = "serve_app/core/"
UNIT = "tests/unit/core/"


@dataclass(frozen=True, slots=True)
class Mutant:
    """One bug: ``before`` stands exactly once in ``file`` and becomes ``after``.

    ``tests`` are names of files under tests/unit/core, without ``test_`` and ``.py``.
    """

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    @property
    def path(self) -> str:
        """The mutated file, from the root of the tree."""
        return CORE + self.file

    @property
    def test_paths(self) -> list[str]:
        """The test files, from the root of the tree."""
        return [f"{UNIT}test_{name}.py" for name in self.tests]


MUTANTS: Sequence[Mutant] = (
    # Fair queueing
    Mutant(
        "lift removed: a tenant that was away starts at zero",
        "fair_queue.py",
        "            flow = _Flow(tenant, floor, now_s)\n",
        "            flow = _Flow(tenant, 0.0, now_s)\n",
        ("fair_queue", "controller_policies"),
    ),
    Mutant(
        "debt is forgotten when a tenant leaves",
        "fair_queue.py",
        "            flow.counter = max(floor, self._decayed(flow, now_s))\n",
        "            flow.counter = floor\n",
        ("fair_queue", "controller_policies"),
    ),
    Mutant(
        "debt never decays",
        "fair_queue.py",
        "exp2(-away_s / self._policy.debt_half_life_s)",
        "1.0",
        ("fair_queue",),
    ),
    Mutant(
        "weight ignored",
        "fair_queue.py",
        "        flow = self._flows.get(entry.flow)\n"
        "        weight = usable_weight(entry.ticket.weight)\n",
        "        flow = self._flows.get(entry.flow)\n        weight = 1.0\n",
        ("fair_queue", "controller_policies"),
    ),
    Mutant(
        "pre-charge not reconciled with what a request really cost",
        "pool.py",
        "        self._charge(entry, cost - entry.charged, now_s)\n",
        "        entry.charged = cost\n",
        ("controller_policies",),
    ),
    Mutant(
        "tables of tenants grow without bound",
        "fair_queue.py",
        "owed > DEBT_FORGOTTEN and len(idle) <= self._policy.tenants_max",
        "owed > DEBT_FORGOTTEN",
        ("fair_queue",),
    ),
    Mutant(
        "a request's fixed cost left out: splitting pays",
        "pool.py",
        "            fairness.request_cost\n            + fairness.input_weight",
        "            fairness.input_weight",
        ("controller_policies",),
    ),
    # Queues, slots and deadlines
    Mutant(
        "queue bound off by one",
        "refusals.py",
        "    if waiting >= capacity:\n",
        "    if waiting > capacity:\n",
        ("controller", "controller_machine"),
    ),
    Mutant(
        "a cancelled request keeps its slot",
        "controller.py",
        "            replica = pool.load.release(entry)\n            pool.settle(",
        "            replica = entry.replica\n"
        "            if outcome is not Outcome.CANCELLED:\n"
        "                pool.load.release(entry)\n"
        "            pool.settle(",
        ("controller", "controller_machine"),
    ),
    Mutant(
        "deadlines ignored",
        "controller.py",
        "        while deadlines and deadlines[0][0] <= self._now_s:\n",
        "        while deadlines and deadlines[0][0] <= -1.0:\n",
        ("controller",),
    ),
    Mutant(
        "a freed slot wakes nobody",
        "controller.py",
        "            pool.capacity_changed()\n            self._judge(",
        "            self._judge(",
        ("controller", "controller_machine"),
    ),
    Mutant(
        "time runs backwards inside",
        "controller.py",
        "        if slept_s > 0.0:\n            self._now_s = now_s\n",
        "        self._now_s = now_s\n",
        ("controller",),
    ),
    Mutant(
        "what was sent since the snapshot is not counted",
        "load.py",
        "            if replica.own >= replica.own_cap or prefill_tokens",
        "            if replica.own_cap <= 0 or prefill_tokens",
        ("controller", "controller_machine"),
    ),
    Mutant(
        "routing picks the replica at arrival",
        "pool.py",
        "        found = load.candidates(entry, self.routing, now_s)\n        if found:",
        "        found = load.candidates(entry, self.routing, now_s)\n"
        "        early = load.live[entry.order % len(load.live)] if load.live else None\n"
        "        found = [each for each in found if each is early]\n"
        "        if found:",
        ("controller", "controller_machine"),
    ),
    Mutant(
        "a failed request goes back to the replica that failed it",
        "controller.py",
        "        entry.excluded = (*entry.excluded, entry.replica.id, replica)\n",
        "        entry.excluded = ()\n",
        ("controller",),
    ),
    # Classes and reserves
    Mutant(
        "Critical's reserve ignored",
        "admission.py",
        "(slots, slots - int(reserve * slots), sheddable_slots)",
        "(slots, slots, sheddable_slots)",
        ("admission", "controller_policies"),
    ),
    Mutant(
        "a starved Standard is owed nothing",
        "admission.py",
        "        share = policy.minimum_share_ratio\n",
        "        share = 0.0\n",
        ("admission",),
    ),
    Mutant(
        "a tenant's share of the KV cache ignored",
        "load.py",
        "        return tokens + entry.need_tokens <= policy.tenant_kv_ratio "
        "* shares.tokens_capacity\n",
        "        return True\n",
        ("controller_policies",),
    ),
    # Saturation, prediction and refusals
    Mutant(
        "stale snapshots believed",
        "load.py",
        "            if now_s - replica.observed_at_s >= stale_after_s:\n",
        "            if now_s < replica.observed_at_s:\n",
        ("controller", "controller_machine"),
    ),
    Mutant(
        "KV prediction ignores the expected output",
        "load.py",
        "        need_tokens = prompt_tokens + entry.expected_output\n",
        "        need_tokens = prompt_tokens\n",
        ("controller_policies",),
    ),
    Mutant(
        "predicted misses of the TTFT target are queued",
        "refusals.py",
        "        if predicted_s is not None and predicted_s > _target_s(pool, entry):\n",
        "        if False:\n",
        ("controller_policies",),
    ),
    Mutant(
        "heavy Sheddable requests wait instead of being refused",
        "refusals.py",
        "            return RejectReason.KV_BUDGET\n    if policy.early_rejection",
        "            pass\n    if policy.early_rejection",
        ("controller_policies",),
    ),
    Mutant(
        "Retry-After sends everybody back at the same moment",
        "admission.py",
        "    return bounded_s * (1.0 + JITTER_RATIO * hashed_fraction(request_id))\n",
        "    return bounded_s\n",
        ("admission",),
    ),
    Mutant(
        "clients that wait as advised are throttled, too",
        "admission.py",
        "        if client is None or now_s >= client.not_before_s:\n",
        "        if client is None:\n",
        ("admission", "controller_policies"),
    ),
    # Brownout, breaker and retries
    Mutant(
        "ladder without hysteresis",
        "brownout.py",
        "        margin = self._policy.hysteresis_ratio\n",
        "        margin = 0.0\n",
        ("brownout",),
    ),
    Mutant(
        "ladder without its interval",
        "brownout.py",
        "        if now_s - self._below_since_s < self._policy.stable_s:\n",
        "        if now_s < self._below_since_s:\n",
        ("brownout", "fair_machine"),
    ),
    Mutant(
        "breaker never closes",
        "breaker.py",
        "        was_open, self.is_open = self.is_open, False\n",
        "        was_open = self.is_open\n",
        ("breaker",),
    ),
    Mutant(
        "half-open breaker lets everybody through",
        "breaker.py",
        "        if self.is_open:\n            self.closed_until_s = inf\n",
        "        pass\n",
        ("breaker", "controller_policies"),
    ),
    Mutant(
        "retry budget unlimited",
        "breaker.py",
        "        if self._balance < 1.0:\n            return False\n",
        "",
        ("breaker", "controller_policies"),
    ),
    # Limits
    Mutant(
        "scopes not taken all or none",
        "limits.py",
        "        obstacle = self._obstacle(scopes, states, tokens, now_ns)\n",
        "        obstacle = self._obstacle(scopes[:1], states[:1], tokens, now_ns)\n",
        ("limits",),
    ),
    Mutant(
        "a clock that jumps back gives the limit away again",
        "limits.py",
        "        self._now_ns = max(self._now_ns, int(now_s * NS_PER_S))\n",
        "        self._now_ns = int(now_s * NS_PER_S)\n",
        ("limits",),
    ),
    Mutant(
        "tokens used beyond the estimate are not owed",
        "limits.py",
        "                state.tokens.add(tokens - taken, limit, now_ns)\n",
        "                state.tokens.add(min(0, tokens - taken), limit, now_ns)\n",
        ("limits",),
    ),
    # Prefixes and several routers
    Mutant(
        "a lost replica's prefixes are still believed in",
        "prefix_index.py",
        "        for block in self._recent.pop(replica):\n            self._drop(block, bit)\n",
        "        self._recent.pop(replica)\n",
        ("prefix_index",),
    ),
    Mutant(
        "every router takes all free places",
        "exchange.py",
        "    return upper - lower\n",
        "    return free\n",
        ("exchange",),
    ),
    Mutant(
        "Sheddable goes while Critical waits at another router",
        "pool.py",
        "self._critical_waits_elsewhere or self._critical_waits()",
        "self._critical_waits()",
        ("exchange",),
    ),
    Mutant(
        "what other routers hold does not count against reserves",
        "load.py",
        "        self._taken = peers.held()\n",
        "",
        ("exchange",),
    ),
    Mutant(
        "dead routers keep their part for ever",
        "exchange.py",
        "if now_s - at_s >= PEER_LOST_S]",
        "if now_s < at_s]",
        ("exchange",),
    ),
    Mutant(
        "what a lost replica held takes from the retry budget",
        "controller.py",
        "            if why is not Failure.REQUEST or pool.retries.spend():\n",
        "            if pool.retries.spend():\n",
        ("controller",),
    ),
    Mutant(
        "retries of requests that fail by themselves are not bounded",
        "controller.py",
        "            if why is not Failure.REQUEST or pool.retries.spend():\n",
        "            if True:\n",
        ("controller", "controller_policies"),
    ),
    Mutant(
        "a router that stood still takes the others for dead",
        "controller.py",
        "        if slept_s > STOOD_STILL_S:\n",
        "        if False:\n",
        ("exchange",),
    ),
    # Shared limits and budgets
    Mutant(
        "whoever answered a recall has nothing left",
        "slices.py",
        "account.empty_ns = now_ns if spent else None",
        "account.empty_ns = now_ns",
        ("slices",),
    ),
    Mutant(
        "what was granted since does not count",
        "holder.py",
        "            self._spent.discard(moved.key)\n",
        "",
        ("slices",),
    ),
    Mutant(
        "parts come back without the fill that lies on them",
        "slices.py",
        "        rest.put(parts, moved.fill, now_ns)\n",
        "        rest.put(parts, 0, now_ns)\n",
        ("slices", "slices_machine"),
    ),
    Mutant(
        "a dead router's parts come back empty",
        "slices.py",
        "            rest.put(account.parts, full(key, account.parts), now_ns)\n",
        "            rest.put(account.parts, 0, now_ns)\n",
        ("slices",),
    ),
    Mutant(
        "a new Control grants before everybody has registered",
        "slices.py",
        "        if self._awaited:\n            rest.wanting[router] = want.need\n",
        "        if False:\n            rest.wanting[router] = want.need\n",
        ("slices", "slices_machine"),
    ),
    Mutant(
        "a message of another epoch is taken",
        "slices.py",
        "        if message.epoch != self.epoch or repeated:\n",
        "        if repeated:\n",
        ("slices",),
    ),
    Mutant(
        "a repeated message is taken again",
        "slices.py",
        "        if message.epoch != self.epoch or repeated:\n",
        "        if message.epoch != self.epoch:\n",
        ("slices",),
    ),
    Mutant(
        "an old Control's answer is believed",
        "holder.py",
        " or reply.epoch < self.epoch:\n",
        ":\n",
        ("slices",),
    ),
    Mutant(
        "what is claimed is given away meanwhile",
        "holder.py",
        "        if not self._registered or (self._in_flight and "
        "self._in_flight.claims is not None):\n",
        "        if False:\n",
        ("slices",),
    ),
    Mutant(
        "a part arrives without the fill that lies on it",
        "parts.py",
        "before + fill * self._limit * MINUTE_NS",
        "before",
        ("slices_machine",),
    ),
    Mutant(
        "what others hold of a budget is not counted",
        "budget.py",
        "allot(left - others - own.outstanding, need, routers)",
        "allot(left - own.outstanding, need, routers)",
        ("budget",),
    ),
    Mutant(
        "what was lent of a rolling window's other hours is not counted",
        "budget.py",
        "if name != mine and shares(budget, period, name.start_s)",
        "if name != mine and name.start_s == period.start_s",
        ("budget",),
    ),
    Mutant(
        "money of a rolling window pays for what came before it was lent",
        "purses.py",
        "return self.period.start_s <= at_s < self.period.end_s",
        "return at_s < self.period.end_s",
        ("budget",),
    ),
    Mutant(
        "a late answer is taken for news",
        "purses.py",
        "        if statement.number <= self._answered:\n",
        "        if False:\n",
        ("budget",),
    ),
    Mutant(
        "a grant that never arrived is never told again",
        "budget.py",
        "if name.router == router and each.outstanding and name not in changed:",
        "if False:",
        ("budget",),
    ),
    Mutant(
        "a grant that was never heard of is given again",
        "budget.py",
        "    need = account.need - (own.granted - max(known, own.released))\n",
        "    need = account.need\n",
        ("budget",),
    ),
    Mutant(
        "a cost is released before the ledger has it",
        "purses.py",
        "        if hold.acknowledged:\n            self._release(request_id, hold, now_s)\n",
        "        self._release(request_id, hold, now_s)\n",
        ("budget",),
    ),
    Mutant(
        "what an engine billed of a cut-off request is spent again",
        "purses.py",
        "                purse.released += hold.amount + hold.posted\n",
        "                purse.released += hold.posted\n",
        ("budget",),
    ),
    Mutant(
        "what a cut-off request may still cost is free at once",
        "purses.py",
        "        rest = 0 if final else max(0, hold.amount - cost)\n",
        "        rest = 0\n",
        ("budget",),
    ),
    Mutant(
        "what a cut-off request may still cost is kept only from its end on",
        "purses.py",
        "        if hold.acknowledged:\n            self._release(request_id, hold, now_s)\n",
        "        if hold.acknowledged:\n            self._release(request_id, hold, now_s)\n"
        "        elif rest:\n            self._linger(request_id, hold, now_s)\n",
        ("budget",),
    ),
    # True cost
    Mutant(
        "cost: each part of an hour is rounded by itself",
        "true_cost.py",
        "        parts.append(upto - given)\n        given = upto\n    return parts\n",
        "        parts.append(weight * amount // whole)\n    return parts\n",
        ("true_cost",),
    ),
    Mutant(
        "cost: time without a price is free",
        "true_cost.py",
        "hour.from_ns < self.rates[0].from_ns:\n            return None\n",
        "hour.from_ns < self.rates[0].from_ns:\n            return 0\n",
        ("true_cost",),
    ),
    Mutant(
        "cost: what requests prove of a killed replica's time is dropped",
        "true_cost.py",
        "    proved_ns = max(0, -cut_off_ns)\n",
        "    proved_ns = 0\n",
        ("true_cost",),
    ),
    Mutant(
        "cost: a period that was lost with its disk costs nothing",
        "true_cost.py",
        "uses.get(Use.UNATTRIBUTED, 0) + lost_ns,",
        "uses.get(Use.UNATTRIBUTED, 0),",
        ("true_cost",),
    ),
    Mutant(
        "cost: a piece of a life is on the account of the hour it ends in",
        "periods.py",
        "from_ns, hour = self._reached_ns, self.hour\n",
        "from_ns, hour = self._reached_ns, until_ns // HOUR_NS * HOUR_S\n",
        ("periods",),
    ),
    Mutant(
        "cost: anomalies by the mean, which one wild hour moves",
        "anomalies.py",
        "max(0.0, median(values)), deviation(values))\n",
        "max(0.0, sum(values) / len(values)), deviation(values))\n",
        ("anomalies",),
    ),
    Mutant(
        "cost: who was seen by night only is alarming by day",
        "anomalies.py",
        "usual.count >= by.history_min and at_s - usual.from_s >= by.history_span_s\n",
        "usual.count >= by.history_min\n",
        ("anomalies",),
    ),
    Mutant(
        "cost: what runs away becomes its own norm",
        "anomalies.py",
        "        odd.append(point)\n",
        "        history.append(point)\n        odd.append(point)\n",
        ("anomalies",),
    ),
    Mutant(
        "cost: a bill that is null is a bill of nothing",
        "reconciliation.py",
        "    if bill is None or billed is None:\n",
        "    billed = billed or 0\n    if bill is None:\n",
        ("reconciliation",),
    ),
    Mutant(
        "cost: a cheaper model need not be idle enough",
        "savings.py",
        "if needed_ns > by_name[other.pool].time_ns[Use.IDLE]:",
        "if needed_ns < 0:",
        ("savings",),
    ),
)
