"""The router's side of limits that routers share: what it asks for and gives back.

Requests that its parts do not suffice for wait here; ``compose`` makes the next message to
the granter (``core/slices.py``), ``accept`` takes the answer. One message is under way at a
time, and is repeated until it is answered.
"""

from __future__ import annotations

from serve_app.core.exchange import RouterId
from serve_app.core.limits import Lack, Limiter, Moved, Short, SliceKey
from serve_app.core.slice_messages import Bell, Message, Reply, Want
from serve_app.core.types import RequestId

RETURNED_AT_ONCE = 4096
UNSURE_S = 0.25


class Holder:
    """One per router, beside its shared Limiter. Pure: time is passed in."""

    def __init__(self, router: RouterId, limiter: Limiter) -> None:
        self._router = router
        self._limiter = limiter
        self._sequence = 0
        self._in_flight: Message | None = None
        self._registered = False
        self._returns: dict[SliceKey, Moved] = {}
        self._spent: set[SliceKey] = set()
        self._waiting: dict[RequestId, tuple[Lack, ...]] = {}
        self._asking: set[SliceKey] = set()
        self._pending: set[SliceKey] = set()
        self._unsure_until_s: dict[SliceKey, float] = {}
        self._leaving = False
        self.left = False
        self.epoch = 0

    @property
    def registered(self) -> bool:
        """Whether the granter knows this router."""
        return self._registered

    @property
    def waiting(self) -> int:
        """Requests that wait for parts."""
        return len(self._waiting)

    @property
    def pending(self) -> bool:
        """Whether a recall is under way for requests here."""
        return bool(self._pending)

    def want(self, request_id: RequestId, short: Short) -> None:
        """Have a request wait for what it lacks, until ``release``."""
        self._waiting[request_id] = short.lacks
        self._asking.update(each.key for each in short.lacks if each.key not in self._pending)

    def release(self, request_id: RequestId) -> None:
        """Have a request wait no longer."""
        self._waiting.pop(request_id, None)

    def unsure(self, short: Short, now_s: float) -> bool:
        """Whether something lacking could not be found out about just now."""
        return any(self._unsure_until_s.get(each.key, now_s) > now_s for each in short.lacks)

    def rung(self, bell: Bell, now_s: float) -> None:
        """Follow a hint: give back what is recalled, ask again for what may be free."""
        if bell.epoch < self.epoch:
            return
        if bell.unknown or bell.epoch > self.epoch:
            self._begin(bell.epoch)
            return
        if not self._registered or (self._in_flight and self._in_flight.claims is not None):
            return
        for recall in bell.recalls:
            moved = self._limiter.give(recall.key, recall.parts, recall.need, now_s)
            if moved.parts - moved.fill < recall.need:
                self._spent.add(recall.key)
            self._give(moved)
        ready = self._pending.intersection(bell.ready)
        self._pending -= ready
        self._asking |= ready

    def ask_again(self) -> None:
        """Ask again for everything that is pending: recalls have had their time."""
        self._asking |= self._pending
        self._pending.clear()

    def leave(self, now_s: float) -> None:
        """Give everything back with the next message, which is the last."""
        self._leaving = True
        for moved in list(self._limiter.holdings(now_s)):
            parts = moved.parts
            self._give(self._limiter.give(moved.key, parts, parts, now_s))

    def compose(self, now_s: float) -> Message | None:
        """Return the message to send now: the one under way, else a new one; None without need."""
        if self._in_flight is not None or self.left:
            return self._in_flight
        if not self._registered:
            self._returns.clear()
            self._spent.clear()
            self._limiter.dropped.clear()
            self._ask_all()
            claims = tuple(self._limiter.holdings(now_s))
            return self._send(Message(self._router, self.epoch, self._next(), claims=claims))
        while self._limiter.dropped:
            self._give(self._limiter.dropped.popleft())
        wants = self._wants(now_s)
        if not (wants or self._returns or self._leaving):
            return None
        keys = list(self._returns)[:RETURNED_AT_ONCE]
        returned = tuple(self._returns.pop(key) for key in keys)
        last = self._leaving and not self._returns
        spent = frozenset(self._spent.intersection(keys))
        self._spent -= spent
        sequence = self._next()
        return self._send(
            Message(self._router, self.epoch, sequence, returned, wants, leaving=last, spent=spent)
        )

    def accept(self, reply: Reply, now_s: float) -> bool:
        """Take the answer to the message under way; tell whether it was one."""
        sent = self._in_flight
        if sent is None or reply.sequence != sent.sequence or reply.epoch < self.epoch:
            return False
        self._in_flight = None
        if reply.unknown or reply.epoch != sent.epoch:
            self._begin(reply.epoch)
            return True
        self.left = sent.leaving
        self._registered = True
        for cut in reply.cuts:
            self._limiter.cut(cut.key, cut.parts, now_s)
        for moved in reply.granted:
            self._limiter.receive(moved, now_s)
            self._spent.discard(moved.key)
        for key in reply.denied:
            self._limiter.deny(key, self._least_missing(key, now_s), now_s)
        self._unsure_until_s = dict.fromkeys(reply.unsure, now_s + UNSURE_S)
        self._pending.update(reply.pending)
        if reply.bell is not None:
            self.rung(reply.bell, now_s)
        return True

    def _begin(self, epoch: int) -> None:
        """Have to register with the granter of this epoch; listen to none before it."""
        self.epoch = epoch
        self._registered = False
        self._in_flight = None

    def _give(self, moved: Moved) -> None:
        before = self._returns.get(moved.key)
        if before is not None:
            moved = Moved(moved.key, before.parts + moved.parts, before.fill + moved.fill)
        self._returns[moved.key] = moved

    def _ask_all(self) -> None:
        self._pending.clear()
        self._asking = {lack.key for lacks in self._waiting.values() for lack in lacks}

    def _wants(self, now_s: float) -> tuple[Want, ...]:
        """Add up what waiting requests lack of the limits to ask for."""
        totals: dict[SliceKey, Lack] = {}
        for lacks in self._waiting.values():
            for lack in lacks:
                if lack.key in self._asking:
                    known = totals.get(lack.key)
                    amount = lack.amount + (known.amount if known else 0)
                    totals[lack.key] = Lack(lack.key, amount, lack.limit)
        self._asking.clear()
        wants = []
        for key, total in totals.items():
            need = self._limiter.missing(total, now_s)
            if need:
                wants.append(Want(key, need, self._limiter.held(key)))
        return tuple(wants)

    def _least_missing(self, key: SliceKey, now_s: float) -> int:
        """Return the fewest parts that a waiting request lacks of a limit."""
        lacks = (lack for lacks in self._waiting.values() for lack in lacks if lack.key == key)
        missing = (self._limiter.missing(lack, now_s) for lack in lacks)
        return min((each for each in missing if each), default=0)

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence

    def _send(self, message: Message) -> Message:
        self._in_flight = message
        return message
