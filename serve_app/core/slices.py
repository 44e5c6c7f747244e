"""Limits divided between routers: the granter's side, in Control.

Each router holds parts of limits (``core/parts.py``); the granter holds the rest, and knows
how many parts each router has. What the routers have and the rest are the whole, always.

Parts move in one exchange at a time per router: a message, its answer. A message is
repeated until it is answered, and the answer is kept until the next message, so each moves
its parts exactly once, whatever is lost. A router asks for what it lacks and gets it from
the rest, beginning with an equal share. What the rest lacks is recalled from the other
routers: they are rung (a hint that may be lost), give back what is free, and the asker is
rung. A recall that finds nothing is a denial. Nobody waits here, and no request comes here
while a router's parts suffice.

A granter begins without knowing who holds what. It grants nothing until every router that
its predecessor knew has registered what it holds, or is dead. A router registers again
whenever it finds a granter that does not know it; parts that meanwhile went elsewhere are
cut from it. Parts that come back without their fill known count as full.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from serve_app.core.calendar import NS_PER_S
from serve_app.core.exchange import RouterId
from serve_app.core.limits import Moved, SliceKey
from serve_app.core.parts import MINUTE_NS, WHOLE, split
from serve_app.core.slice_messages import Bell, Message, Recall, Reply, Want
from serve_app.core.slice_rest import Holding, Rest, Turn, full

RECALL_WAIT_S = 0.2
RECALL_WAIT_NS = NS_PER_S // 5
RECALL_AGAIN_NS = NS_PER_S
EMPTY_NS = NS_PER_S // 20
TURN_NS = NS_PER_S // 2
# What rounding leaves over: nobody is made to hold so little, and be asked for it.
DUST = WHOLE >> 40
SWEPT_AT_ONCE = 256
ROUTERS_REMEMBERED = 10_000


@dataclass(slots=True)
class _Session:
    """A router as the granter knows it; ``news`` is what it has not been rung about."""

    heard_ns: int
    sequence: int
    reply: Reply | None = None
    recalls: dict[SliceKey, Recall] = field(default_factory=dict)
    ready: set[SliceKey] = field(default_factory=set)

    @property
    def has_news(self) -> bool:
        return bool(self.recalls or self.ready)


@dataclass(slots=True)
class _Outcome:
    granted: list[Moved] = field(default_factory=list)
    pending: list[SliceKey] = field(default_factory=list)
    denied: list[SliceKey] = field(default_factory=list)
    unsure: list[SliceKey] = field(default_factory=list)
    cuts: list[Moved] = field(default_factory=list)


class Granter:
    """Decides who holds which parts. Pure: time is passed in.

    ``awaited`` are the routers that may hold parts granted before. ``doubtful`` says that
    some of them are gone: what they used is unknown, so every limit counts as used up when
    this granter began, and drains from then on.
    """

    def __init__(
        self, epoch: int, now_s: float, *, awaited: Iterable[RouterId] = (), doubtful: bool = False
    ) -> None:
        self.epoch = epoch
        self._now_ns = int(now_s * NS_PER_S)
        self._began_ns = self._now_ns
        self._doubt_ns: int | None = self._now_ns if doubtful else None
        self._awaited: dict[RouterId, int] = dict.fromkeys(awaited, self._now_ns)
        self._sessions: dict[RouterId, _Session] = {}
        # Of routers that are gone, too: a message that comes late must not register them again.
        self._sequences: OrderedDict[RouterId, int] = OrderedDict()
        self._rests: dict[SliceKey, Rest] = {}
        self._rung: set[RouterId] = set()
        self._sweep: list[SliceKey] = []

    def __len__(self) -> int:
        return len(self._rests)

    @property
    def recovering(self) -> bool:
        """Whether routers that may hold parts have not registered yet."""
        return bool(self._awaited)

    def routers(self) -> list[RouterId]:
        """Return the routers that are registered."""
        return list(self._sessions)

    def knows(self, router: RouterId) -> bool:
        """Whether a router is registered, or was with a predecessor."""
        return router in self._sessions or router in self._awaited

    def held(self, key: SliceKey) -> dict[RouterId, int]:
        """Return the parts of a limit by router, for reports and tests."""
        rest = self._rests.get(key)
        return {} if rest is None else {name: each.parts for name, each in rest.accounts.items()}

    def exchange(self, message: Message, now_s: float) -> Reply:
        """Take a router's message and answer it; each moves its parts once."""
        now_ns = self._advance(now_s)
        session = self._sessions.get(message.router)
        if session is not None and session.reply and message.sequence == session.sequence:
            return session.reply
        outcome = _Outcome()
        repeated = message.sequence <= self._sequences.get(message.router, 0)
        if message.epoch != self.epoch or repeated:
            return Reply(self.epoch, message.sequence, unknown=True)
        if message.claims is not None:
            session = self._register(message, message.claims, outcome, now_ns)
        elif session is None or message.sequence != session.sequence + 1:
            return Reply(self.epoch, message.sequence, unknown=True)
        session.heard_ns, session.sequence = now_ns, message.sequence
        self._sequences[message.router] = message.sequence
        self._sequences.move_to_end(message.router)
        if len(self._sequences) > ROUTERS_REMEMBERED:
            self._sequences.popitem(last=False)
        for moved in message.returned:
            self._take_back(message.router, moved, moved.key in message.spent, now_ns)
        if message.leaving:
            self._forget(message.router, now_ns)
        else:
            for want in message.wants:
                self._satisfy(message.router, want, outcome, now_ns)
        session.reply = self._reply(message, outcome, session)
        return session.reply

    def bell(self, router: RouterId, now_s: float) -> Bell:
        """Return what a router has not been told yet, and forget it: a hint may be lost."""
        now_ns = self._advance(now_s)
        session = self._sessions.get(router)
        if session is None:
            return Bell(self.epoch, unknown=True)
        session.heard_ns = now_ns
        return self._news(session) or Bell(self.epoch)

    def rung(self) -> set[RouterId]:
        """Return the routers that have news since the last call."""
        rung, self._rung = self._rung, set()
        return rung

    def heard(self, router: RouterId, now_s: float) -> None:
        """Note that a router lives."""
        now_ns = self._advance(now_s)
        session = self._sessions.get(router)
        if session is not None:
            session.heard_ns = now_ns
        elif router in self._awaited:
            self._awaited[router] = now_ns

    def silent(self, now_s: float, silent_s: float) -> list[RouterId]:
        """Return the routers that have not been heard of for so long."""
        oldest_ns = self._advance(now_s) - int(silent_s * NS_PER_S)
        found = [name for name, each in self._sessions.items() if each.heard_ns < oldest_ns]
        return found + [name for name, at_ns in self._awaited.items() if at_ns < oldest_ns]

    def lose(self, router: RouterId, now_s: float) -> None:
        """Forget a router that is dead; its parts come back, as full as can be."""
        now_ns = self._advance(now_s)
        if router in self._sessions:
            self._forget(router, now_ns)
        if self._awaited.pop(router, None) is not None:
            self._doubt_ns = now_ns
            self._recovered(now_ns)

    def expire(self, now_s: float, silent_s: float) -> list[RouterId]:
        """Lose routers silent for so long; forget limits that nobody uses. Return the lost."""
        lost = self.silent(now_s, silent_s)
        for router in lost:
            self.lose(router, now_s)
        self._sweep_some(self._now_ns)
        return lost

    def _advance(self, now_s: float) -> int:
        self._now_ns = max(self._now_ns, int(now_s * NS_PER_S))
        return self._now_ns

    def _reply(self, message: Message, outcome: _Outcome, session: _Session) -> Reply:
        return Reply(
            self.epoch,
            message.sequence,
            tuple(outcome.granted),
            tuple(outcome.pending),
            tuple(outcome.denied),
            tuple(outcome.unsure),
            tuple(outcome.cuts),
            self._news(session),
        )

    def _news(self, session: _Session) -> Bell | None:
        if not session.has_news:
            return None
        bell = Bell(self.epoch, tuple(session.recalls.values()), tuple(session.ready))
        session.recalls.clear()
        session.ready.clear()
        return bell

    # Who is here

    def _register(
        self, message: Message, claims: Iterable[Moved], outcome: _Outcome, now_ns: int
    ) -> _Session:
        """Believe what a router says it holds, as far as nobody else has it."""
        router = message.router
        if router in self._sessions:
            self._forget(router, now_ns)
        session = self._sessions[router] = _Session(now_ns, message.sequence)
        for key, claimed, _ in claims:
            rest = self._rests.get(key)
            if rest is None:
                # Who used the other parts is not known yet.
                fill = full(key, WHOLE - claimed)
                rest = self._rests[key] = Rest(fill=fill, at_ns=now_ns, claimed=True)
            rest.drain(now_ns)
            parts = min(claimed, rest.parts)
            rest.parts -= parts
            rest.fill = min(rest.fill, rest.parts)
            if parts:
                rest.accounts[router] = Holding(parts)
            if parts < claimed:
                outcome.cuts.append(Moved(key, parts, 0))
        if self._awaited.pop(router, None) is not None and not self._awaited:
            self._recovered(now_ns)
        return session

    def _recovered(self, now_ns: int) -> None:
        """Begin to grant: whatever nobody claimed may have been used just before."""
        if self._awaited:
            return
        for key, rest in self._rests.items():
            rest.drain(now_ns)
            rest.fill = full(key, rest.parts) if rest.claimed else self._doubt(key, now_ns)
            for router in rest.wanting:
                self._ring(router, key)
            rest.wanting.clear()

    def _forget(self, router: RouterId, now_ns: int) -> None:
        del self._sessions[router]
        for key, rest in self._rests.items():
            rest.wanting.pop(router, None)
            rest.turns.pop(router, None)
            account = rest.accounts.pop(router, None)
            if account is None:
                continue
            rest.put(account.parts, full(key, account.parts), now_ns)
            self._tell_wanting(key, rest)

    # What moves

    def _take_back(self, router: RouterId, moved: Moved, spent: bool, now_ns: int) -> None:
        """Put what a router gave back into the rest; tell those who want it."""
        rest = self._rests.get(moved.key)
        account = None if rest is None else rest.accounts.get(router)
        if rest is None or account is None:
            return
        parts = min(moved.parts, account.parts)
        account.parts -= parts
        rest.put(parts, moved.fill, now_ns)
        account.empty_ns = now_ns if spent else None
        account.asked_ns = None
        if not account.parts:
            del rest.accounts[router]
        self._tell_wanting(moved.key, rest)

    def _tell_wanting(self, key: SliceKey, rest: Rest) -> None:
        """Ring those whose want can be met now, or cannot be met any more."""
        free = rest.parts - rest.fill
        for router, need in list(rest.wanting.items()):
            asked = any(
                each.asked_ns is not None for name, each in rest.accounts.items() if name != router
            )
            if free >= need or not asked:
                del rest.wanting[router]
                self._ring(router, key)

    def _ring(self, router: RouterId, key: SliceKey) -> None:
        session = self._sessions.get(router)
        if session is not None:
            session.ready.add(key)
            self._rung.add(router)

    def _satisfy(self, router: RouterId, want: Want, outcome: _Outcome, now_ns: int) -> None:
        """Grant what is free, recall what is not, or deny it."""
        key = want.key
        rest = self._rests.get(key)
        if rest is None:
            rest = self._rests[key] = Rest(at_ns=now_ns, fill=self._doubt(key, now_ns))
        rest.wanting.pop(router, None)
        if self._awaited:
            rest.wanting[router] = want.need
            outcome.pending.append(key)
            return
        rest.drain(now_ns)
        account = rest.accounts.get(router)
        if account is not None and account.parts > want.held:
            # The router lost some, by forgetting the limit when too many were in use.
            lost = account.parts - want.held
            rest.put(lost, full(key, lost), now_ns)
            account.parts = want.held
        ahead = rest.ahead(router, now_ns)
        even = WHOLE // len(self._sessions)
        below = even - (0 if account is None else account.parts)
        granted, fill = self._portion(rest, want.need, below, sum(ahead.values()))
        if granted:
            rest.parts -= granted
            rest.fill -= fill
            account = rest.accounts.setdefault(router, Holding())
            account.parts += granted
            if granted - fill > want.need:
                account.empty_ns = None
            outcome.granted.append(Moved(key, granted, fill))
        left = want.need - (granted - fill)
        if left <= 0:
            self._end_turn(router, key, rest)
            return
        recall = Recall(key, max(0, below - granted), left)
        waiting, unsure = self._recall(router, recall, rest, ahead, now_ns)
        if waiting or ahead:
            rest.wanting[router] = left
            turn = rest.turns.setdefault(router, Turn(left, now_ns + TURN_NS))
            turn.need = left
            outcome.pending.append(key)
        else:
            self._end_turn(router, key, rest)
            (outcome.unsure if unsure else outcome.denied).append(key)

    def _portion(self, rest: Rest, need: int, below: int, promised: int) -> tuple[int, int]:
        """Return the parts to grant and their fill; nothing of what others come first for."""
        if promised:
            if rest.parts - rest.fill - promised < need:
                return 0, 0
            return split(rest.parts, rest.fill, need, need)
        spare = below if below > 0 else rest.parts // (2 * len(self._sessions))
        parts, fill = split(rest.parts, rest.fill, max(need, spare), need)
        return (parts, fill) if parts > DUST or parts - fill >= need else (0, 0)

    def _end_turn(self, router: RouterId, key: SliceKey, rest: Rest) -> None:
        """Let those who came later try again."""
        if rest.turns.pop(router, None) is not None:
            for name in rest.wanting:
                self._ring(name, key)
            rest.wanting.clear()

    def _recall(
        self,
        router: RouterId,
        recall: Recall,
        rest: Rest,
        ahead: Mapping[RouterId, int],
        now_ns: int,
    ) -> tuple[bool, bool]:
        """Ask the others; return whether answers are expected, and whether some are overdue.

        What the asker lacks to an equal share is asked of each in proportion to what it has.
        Who is ahead needs what it has.
        """
        others = [
            (name, each)
            for name, each in rest.accounts.items()
            if name != router and name not in ahead and each.parts
        ]
        total = sum(each.parts for _, each in others)
        waiting = unsure = False
        for name, account in others:
            if account.asked_ns is not None and now_ns - account.asked_ns < RECALL_AGAIN_NS:
                overdue = now_ns - account.asked_ns >= RECALL_WAIT_NS
                unsure, waiting = unsure or overdue, waiting or not overdue
                continue
            if account.empty_ns is not None and now_ns - account.empty_ns < EMPTY_NS:
                continue
            parts = recall.parts * account.parts // total
            self._ask(name, Recall(recall.key, parts, recall.need))
            account.asked_ns = now_ns
            waiting = True
        return waiting, unsure

    def _ask(self, router: RouterId, recall: Recall) -> None:
        session = self._sessions[router]
        known = session.recalls.get(recall.key)
        if known is not None:
            recall = Recall(
                recall.key, max(known.parts, recall.parts), max(known.need, recall.need)
            )
        session.recalls[recall.key] = recall
        self._rung.add(router)

    def _doubt(self, key: SliceKey, now_ns: int) -> int:
        """Return the fill to suppose of a limit that nobody registered."""
        if self._doubt_ns is None:
            return 0
        drained = WHOLE * (now_ns - self._doubt_ns) // MINUTE_NS
        return max(0, full(key, WHOLE) - drained)

    def _sweep_some(self, now_ns: int) -> None:
        """Forget limits that nobody holds, wants or used; a few at a time."""
        if not self._sweep:
            self._sweep = list(self._rests)
        for _ in range(min(SWEPT_AT_ONCE, len(self._sweep))):
            key = self._sweep.pop()
            rest = self._rests.get(key)
            if rest is None or rest.accounts or rest.wanting:
                continue
            rest.drain(now_ns)
            if not rest.fill:
                del self._rests[key]
