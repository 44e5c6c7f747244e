"""Several routers share limits, whatever happens to messages, routers and granters.

One bucket for everybody is the judge: no router may take what that one would not have given.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
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

SCOPES = (
    Scope(ScopeKind.KEY, "k", Limits(requests_per_min=12, concurrent=7)),
    Scope(ScopeKind.TENANT, "t", Limits(requests_per_min=20, tokens_per_min=1000)),
)
ROUTERS_MOST = 4
KEYS = [Key(s.kind, s.id, limit) for s in SCOPES for limit in LimitKind]
NS = 1e-9


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

    def site(self, data: st.DataObject) -> Site:
        return data.draw(st.sampled_from(self.sites), label="site")

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
    @rule(data=st.data())
    def lose_control(self, data: st.DataObject) -> None:
        self.granters.remove(data.draw(st.sampled_from(self.granters)))

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
    @rule(data=st.data())
    def kill_router(self, data: st.DataObject) -> None:
        site = self.site(data)
        self.sites.remove(site)
        self.dead.add(site.name)

    # Requests

    @rule(data=st.data(), tokens=st.integers(0, 400), count=st.integers(1, 6))
    def ask(self, data: st.DataObject, tokens: int, count: int) -> None:
        site = self.site(data)
        for _ in range(count):
            self.numbers += 1
            self.try_take(site, RequestId(f"q{self.numbers}"), tokens)

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        site = self.site(data)
        for request_id in list(site.waiting)[:2]:
            site.holder.release(request_id)
            del site.waiting[request_id]

    @rule(data=st.data(), kept=st.integers(0, 400))
    def settle(self, data: st.DataObject, kept: int) -> None:
        site = self.site(data)
        for request_id, tokens in list(site.open.items())[:3]:
            used = min(kept, tokens)
            site.limiter.settle(request_id, used, self.now_s)
            del site.open[request_id]
            self.judge(0, used - tokens)

    # Messages: delivered, lost, doubled, late

    @rule(data=st.data(), fate=st.sampled_from(["fine", "lost", "unanswered", "late", "doubled"]))
    def talk(self, data: st.DataObject, fate: str) -> None:
        """A router sends what it has to say; ``late`` ones are delivered by ``recall_late``."""
        site = self.site(data)
        message = site.holder.compose(self.now_s)
        if message is None or fate == "lost":
            return
        if fate in ("late", "doubled"):
            self.messages.append(message)
        if fate != "late":
            reply = self.exchange(data.draw(st.sampled_from(self.granters)), message)
            if reply is not None and fate != "unanswered":
                self.hear(site, reply)

    @precondition(lambda self: self.messages)
    @rule(data=st.data(), at_once=st.booleans())
    def deliver_late(self, data: st.DataObject, at_once: bool) -> None:
        message = self.messages.pop(data.draw(st.integers(0, len(self.messages) - 1)))
        reply = self.exchange(data.draw(st.sampled_from(self.granters)), message)
        for site in self.sites:
            if reply is not None and site.name == message.router:
                if at_once:
                    self.hear(site, reply)
                else:
                    self.replies.append((message.router, reply))

    @precondition(lambda self: self.replies)
    @rule(data=st.data())
    def answer_late(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.replies) - 1), label="reply")
        name, reply = self.replies.pop(number)
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

    @rule(data=st.data(), arrives=st.booleans())
    def ring(self, data: st.DataObject, arrives: bool) -> None:
        site = self.site(data)
        bell = data.draw(st.sampled_from(self.granters)).bell(site.name, self.now_s)
        if arrives:
            site.holder.rung(bell, self.now_s)
        else:
            site.holder.ask_again()

    @rule(wait_s=st.sampled_from([0.01, 0.25, 1.0, 7.0, 21.0, 61.0]))
    def wait(self, wait_s: float) -> None:
        self.now_s += wait_s

    @rule(data=st.data(), count=st.integers(1, 12), tokens=st.sampled_from([0, 30, 250]))
    def use_in_peace(self, data: st.DataObject, count: int, tokens: int) -> None:
        """A router is asked, and everybody talks until nobody has anything to say."""
        site = self.site(data)
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


TestShared = Shared.TestCase
TestShared.settings = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
