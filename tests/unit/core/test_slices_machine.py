"""Several routers share limits, whatever happens to messages, routers and granters.

One bucket for everybody is the judge: no router may take what that one would not have given.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve_app.core.exchange import RouterId
from serve_app.core.holder import Holder
from serve_app.core.limits import Granted, Limiter, LimitKind, Limits, Scope, ScopeKind, Short
from serve_app.core.limits import SliceKey as Key
from serve_app.core.parts import MINUTE_NS, UNIT, WHOLE
from serve_app.core.slice_messages import Message, Reply
from serve_app.core.slices import Granter
from serve_app.core.types import RequestId
from tests.properties import examples

SCOPES = (
    Scope(ScopeKind.KEY, "k", Limits(requests_per_min=12, concurrent=7)),
    Scope(ScopeKind.TENANT, "t", Limits(requests_per_min=20, tokens_per_min=1000)),
)
ROUTERS_MOST = 4
KEYS = [Key(s.kind, s.id, limit) for s in SCOPES for limit in LimitKind]
FATES = ["fine", "lost", "unanswered", "late", "doubled"]
PLACES = 12
places = st.integers(0, PLACES - 1)


class Judge:
    """One bucket for everybody."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.fill = 0
        self.at_ns = 0

    def take(self, amount: int, now_ns: int) -> None:
        self.fill = max(0, self.fill - (now_ns - self.at_ns) * self.limit * WHOLE)
        self.at_ns = now_ns
        self.fill = max(0, self.fill + amount * UNIT)
        # Parts are rounded up by less than a nanosecond's worth of the limit.
        room = self.limit * MINUTE_NS * (WHOLE + 4 * ROUTERS_MOST)
        assert amount <= 0 or self.fill <= room, "one bucket would not have given this"


@dataclass
class Site:
    """A router's process."""

    name: RouterId
    limiter: Limiter = field(default_factory=lambda: Limiter(shared=True))
    open: dict[RequestId, int] = field(default_factory=dict)
    waiting: dict[RequestId, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.holder = Holder(self.name, self.limiter)


@dataclass
class Store:
    """What outlives Control: the epoch, who may hold parts, who was gone lately."""

    epoch: int = 0
    routers: set[RouterId] = field(default_factory=set)
    gone_at_s: float = -1e9


class Shared(RuleBasedStateMachine):
    """Everything that can happen, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0
        self.numbers = 0
        self.sites: list[Site] = []
        self.dead: set[RouterId] = set()
        self.store = Store()
        self.granters: list[Granter] = []
        self.messages: list[Message] = []
        self.replies: list[tuple[RouterId, Reply]] = []
        self.judges = {
            (scope.id, limit): Judge(most)
            for scope in SCOPES
            for limit, most in (
                (LimitKind.REQUESTS, scope.limits.requests_per_min),
                (LimitKind.TOKENS, scope.limits.tokens_per_min),
            )
            if most
        }
        self.start_control()
        for _ in range(2):
            self.add_router()
        self.all_is_well()

    def site(self, place: int) -> Site:
        return self.sites[place % len(self.sites)]

    def granter(self, place: int) -> Granter:
        """Return the newest Control more often than one before it."""
        return self.granters[-1 - max(0, place - PLACES // 2) % len(self.granters)]

    def judge(self, requests: int, tokens: int) -> None:
        now_ns = int(self.now_s * 1e9)
        for (_, limit), judge in self.judges.items():
            judge.take(requests if limit is LimitKind.REQUESTS else tokens, now_ns)

    def try_take(self, site: Site, request_id: RequestId, tokens: int) -> None:
        answer = site.limiter.take(request_id, SCOPES, tokens, self.now_s)
        if isinstance(answer, Short):
            site.holder.want(request_id, answer)
            site.waiting[request_id] = tokens
            return
        site.holder.release(request_id)
        site.waiting.pop(request_id, None)
        if isinstance(answer, Granted):
            site.open[request_id] = tokens
            self.judge(1, tokens)

    # Control

    @rule()
    def start_control(self) -> None:
        """A new Control beside or in place of the old one, which does not know of it."""
        if len(self.granters) >= 4:
            return
        self.store.epoch += 1
        doubtful = self.now_s - self.store.gone_at_s < 60
        self.granters.append(
            Granter(
                self.store.epoch,
                self.now_s,
                awaited=self.store.routers,
                doubtful=doubtful,
            )
        )

    @precondition(lambda self: len(self.granters) > 1)
    @rule(place=places)
    def lose_control(self, place: int) -> None:
        del self.granters[place % len(self.granters)]

    @rule()
    def expire(self) -> None:
        """Routers that are dead are found out."""
        for granter in self.granters:
            for site in self.sites:
                granter.heard(site.name, self.now_s)
            for router in granter.expire(self.now_s, 20.0):
                if granter.epoch == self.store.epoch:
                    self.store.routers.discard(router)
                    self.store.gone_at_s = self.now_s

    # Routers

    @precondition(lambda self: len(self.sites) < ROUTERS_MOST)
    @rule()
    def add_router(self) -> None:
        self.numbers += 1
        self.sites.append(Site(RouterId(f"r{self.numbers}")))

    @precondition(lambda self: len(self.sites) > 1)
    @rule(place=places)
    def kill_router(self, place: int) -> None:
        site = self.site(place)
        self.sites.remove(site)
        self.dead.add(site.name)

    # Requests

    @rule(place=places, tokens=st.integers(0, 400), count=st.integers(1, 6))
    def ask(self, place: int, tokens: int, count: int) -> None:
        site = self.site(place)
        for _ in range(count):
            self.numbers += 1
            self.try_take(site, RequestId(f"q{self.numbers}"), tokens)

    @rule(place=places)
    def give_up(self, place: int) -> None:
        site = self.site(place)
        for request_id in list(site.waiting)[:2]:
            site.holder.release(request_id)
            del site.waiting[request_id]

    @rule(place=places, kept=st.integers(0, 400))
    def settle(self, place: int, kept: int) -> None:
        site = self.site(place)
        for request_id, tokens in list(site.open.items())[:3]:
            used = min(kept, tokens)
            site.limiter.settle(request_id, used, self.now_s)
            del site.open[request_id]
            self.judge(0, used - tokens)

    # Messages: delivered, lost, doubled, late

    @rule(place=places, desk=places, fate=st.sampled_from(FATES))
    def talk(self, place: int, desk: int, fate: str) -> None:
        """A router sends what it has to say; ``late`` ones are delivered by ``recall_late``."""
        site = self.site(place)
        message = site.holder.compose(self.now_s)
        if message is None or fate == "lost":
            return
        if fate in ("late", "doubled"):
            self.messages.append(message)
        if fate != "late":
            reply = self.exchange(self.granter(desk), message)
            if reply is not None and fate != "unanswered":
                self.hear(site, reply)

    @precondition(lambda self: self.messages)
    @rule(place=places, desk=places, at_once=st.booleans())
    def deliver_late(self, place: int, desk: int, at_once: bool) -> None:
        message = self.messages.pop(place % len(self.messages))
        reply = self.exchange(self.granter(desk), message)
        for site in self.sites:
            if reply is not None and site.name == message.router:
                if at_once:
                    self.hear(site, reply)
                else:
                    self.replies.append((message.router, reply))

    @precondition(lambda self: self.replies)
    @rule(place=places)
    def answer_late(self, place: int) -> None:
        name, reply = self.replies.pop(place % len(self.replies))
        for site in self.sites:
            if site.name == name:
                self.hear(site, reply)

    def exchange(self, granter: Granter, message: Message) -> Reply | None:
        if message.claims is not None and message.router not in self.store.routers:
            if granter.epoch != self.store.epoch:
                return None  # its write fails: another Control has begun
            self.store.routers.add(message.router)
        return granter.exchange(message, self.now_s)

    def hear(self, site: Site, reply: Reply) -> None:
        if site.holder.accept(reply, self.now_s):
            for request_id, tokens in list(site.waiting.items()):
                self.try_take(site, request_id, tokens)

    @rule(place=places, desk=places, arrives=st.booleans())
    def ring(self, place: int, desk: int, arrives: bool) -> None:
        site = self.site(place)
        bell = self.granter(desk).bell(site.name, self.now_s)
        if arrives:
            site.holder.rung(bell, self.now_s)
        else:
            site.holder.ask_again()

    @rule(wait_s=st.sampled_from([0.01, 0.25, 1.0, 7.0, 21.0, 61.0]))
    def wait(self, wait_s: float) -> None:
        self.now_s += wait_s

    @rule(place=places, count=st.integers(1, 12), tokens=st.sampled_from([0, 30, 250]))
    def use_in_peace(self, place: int, count: int, tokens: int) -> None:
        """A router is asked, and everybody talks until nobody has anything to say."""
        site = self.site(place)
        for _ in range(count):
            self.numbers += 1
            self.try_take(site, RequestId(f"q{self.numbers}"), tokens)
        self.all_is_well()

    @rule()
    def all_is_well(self) -> None:
        granter = self.granters[-1]
        if granter.epoch != self.store.epoch:
            return
        for _ in range(12):
            for site in self.sites:
                message = site.holder.compose(self.now_s)
                if message is not None:
                    reply = self.exchange(granter, message)
                    assert reply is not None
                    self.hear(site, reply)
                site.holder.rung(granter.bell(site.name, self.now_s), self.now_s)
        assert all(site.holder.registered for site in self.sites)

    @invariant()
    def parts_are_never_more_than_the_whole(self) -> None:
        for key in KEYS:
            assert sum(site.limiter.held(key) for site in self.sites) <= WHOLE

    @invariant()
    def slots_are_never_more_than_the_limit(self) -> None:
        assert sum(len(site.open) for site in self.sites) <= 7


class Storm:
    """The same events in long random runs, weighted so that limits are reached and contended."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.shared = Shared()

    def place(self) -> int:
        return self.chance.randrange(PLACES)

    def step(self) -> None:
        chance, shared = self.chance, self.shared
        kind = chance.choices(
            ["ask", "talk", "ring", "settle", "wait", "late", "rare", "peace"],
            weights=[30, 40, 15, 8, 6, 8, 2, 2],
        )[0]
        if kind == "ask":
            shared.ask(self.place(), chance.choice([0, 20, 100]), chance.randint(1, 3))
        elif kind == "talk":
            fate = chance.choices(FATES, weights=[12, 1, 2, 1, 2])[0]
            shared.talk(self.place(), self.place(), fate)
        elif kind == "ring":
            shared.ring(self.place(), self.place(), chance.random() < 0.8)
        elif kind == "settle":
            shared.settle(self.place(), chance.choice([0, 50, 400]))
        elif kind == "wait":
            shared.wait(chance.choice([0.001, 0.01, 0.1, 0.25, 1.0, 4.0]))
        elif kind == "late" and shared.messages:
            shared.deliver_late(self.place(), self.place(), chance.random() < 0.5)
        elif kind == "late" and shared.replies:
            shared.answer_late(self.place())
        elif kind == "rare":
            self.rare()
        elif kind == "peace":
            shared.use_in_peace(self.place(), chance.randint(1, 12), 20)
        shared.parts_are_never_more_than_the_whole()
        shared.slots_are_never_more_than_the_limit()

    def rare(self) -> None:
        chance, shared = self.chance, self.shared
        event = chance.randrange(5)
        if event == 0:
            shared.start_control()
        elif event == 1 and len(shared.granters) > 1:
            del shared.granters[0]
        elif event == 2 and len(shared.sites) < ROUTERS_MOST:
            shared.add_router()
        elif event == 3 and len(shared.sites) > 1:
            shared.kill_router(self.place())
        elif event == 4:
            shared.wait(21.0)
            shared.expire()


@pytest.mark.parametrize("seed", range(40))
def test_a_storm_of_events_takes_no_more_than_one_bucket_would_give(seed: int) -> None:
    storm = Storm(seed)
    for _ in range(400):
        storm.step()


TestShared = Shared.TestCase
TestShared.settings = examples(
    200,
    stateful_step_count=50,
    suppress_health_check=[HealthCheck.filter_too_much],
)
