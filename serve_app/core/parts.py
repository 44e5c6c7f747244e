"""A router's part of one limit: a bucket for a rate, slots for concurrency.

A limit is divided into ``WHOLE`` parts, which routers hold; all parts of one limit together
are never more than ``WHOLE``. A part is a share and not an amount, so a limit that changes
changes at every router at once, and nobody has to be told.

Rates are GCRA (the generic cell rate algorithm; Redis-cell, Envoy and Stripe use it): a
bucket of one minute's worth that drains at the limit's rate, here at the part's share of it.
Its fill is exact, in units of 1/(60e9 x WHOLE) of a request or token. Parts travel with the
fill that lies on them. So all buckets' fills together are at least the fill of one bucket
for everybody: each taking adds the same to both, and no part drains faster than its share.
As long as every fill lies within its part, what is taken here would fit there as well.

Parts are rounded in the client's favour by one part for each holder, less than 1e-17 of the
limit: one bucket for everybody would admit the same a nanosecond later.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.core.calendar import NS_PER_S

WHOLE = 1 << 60
MINUTE_NS = 60 * NS_PER_S
UNIT = MINUTE_NS * WHOLE
IDLE_NS = 10 * NS_PER_S
ASK_AGAIN_MOST_NS = NS_PER_S
ASK_AGAIN_LEAST_NS = 20_000_000
SLOT_WAIT_NS = NS_PER_S
SLOT_ASK_AGAIN_NS = NS_PER_S // 4


@dataclass(frozen=True, slots=True)
class RateFigure:
    """One ``x-ratelimit-*`` triple: of ``limit``, ``remaining`` can be used now.

    ``reset_s`` is when the whole limit is available again.
    """

    limit: int
    remaining: int
    reset_s: float


def split(held: int, fill: int, parts: int, need: int) -> tuple[int, int]:
    """Divide a share: return the parts to hand over and the fill that goes with them.

    ``parts`` are handed over if held, with as much fill as lies on them on average; but at
    least ``need`` free ones as far as there are free ones. All that is held takes all fill.
    """
    free = max(0, held - fill)
    moved = min(held, max(parts, min(need, free)))
    if moved == held:
        return held, fill
    moved_free = min(moved, max(min(need, free), free * moved // held))
    return moved, moved - moved_free


class RatePart:
    """A part of requests or tokens per minute."""

    __slots__ = ("_at_ns", "_denied_until_ns", "_fill", "_limit", "_rate", "parts", "touched_ns")

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self.touched_ns: int | None = None
        self._limit = 0
        self._rate = 0
        self._fill = 0
        self._at_ns = 0
        self._denied_until_ns = 0

    def fill(self, limit: int, now_ns: int) -> int:
        """Return the fill in units; a changed limit keeps what was used."""
        if now_ns != self._at_ns:
            self._fill = max(0, self._fill - (now_ns - self._at_ns) * self._rate)
            self._at_ns = now_ns
        if limit != self._limit:
            self._limit = limit
            self._rate = self.parts * limit
        return self._fill

    def missing(self, amount: int, limit: int, now_ns: int) -> int:
        """Return how many free parts are wanting for ``amount``; ``limit`` >= 1."""
        room = (self.parts + 1) * limit * MINUTE_NS
        over = self.fill(limit, now_ns) + amount * UNIT - room
        return -(-over // (limit * MINUTE_NS)) if over > 0 else 0

    def wait_ns(self, missing: int) -> int:
        """Return when that many parts become free if all routers' buckets drain."""
        return -(-missing * MINUTE_NS // WHOLE)

    def add(self, amount: int, limit: int, now_ns: int) -> None:
        """Take ``amount`` >= 0, or give back -``amount``, never below empty."""
        self._fill = max(0, self.fill(limit, now_ns) + amount * UNIT)
        self.touched_ns = now_ns

    def deny(self, missing: int, now_ns: int) -> None:
        """Remember that nobody has anything free, for as long as that is likely to hold."""
        wait_ns = min(max(self.wait_ns(missing), ASK_AGAIN_LEAST_NS), ASK_AGAIN_MOST_NS)
        self._denied_until_ns = now_ns + wait_ns

    def denied(self, now_ns: int) -> bool:
        """Whether others were asked lately, in vain."""
        return now_ns < self._denied_until_ns

    def give(self, parts: int, need: int, now_ns: int) -> tuple[int, int]:
        """Hand over parts and their fill in parts; all of it if it has not been used lately."""
        unit = self._limit * MINUTE_NS
        fill = self.fill(self._limit, now_ns)
        fill_parts = -(-fill // unit) if unit else 0
        if self.idle(now_ns):
            parts = self.parts
        moved, moved_fill = split(self.parts, fill_parts, parts, need)
        self._put(self.parts - moved, max(0, fill - moved_fill * unit))
        return moved, moved_fill

    def receive(self, parts: int, fill: int, now_ns: int) -> None:
        """Take over parts with the fill that lies on them, in parts."""
        before = self.fill(self._limit, now_ns)
        self._put(self.parts + parts, before + fill * self._limit * MINUTE_NS)

    def cut(self, parts: int, now_ns: int) -> None:
        """Keep at most ``parts``; what was used is still owed."""
        if parts < self.parts:
            self._put(parts, self.fill(self._limit, now_ns))

    def idle(self, now_ns: int) -> bool:
        """Whether it has not been used lately."""
        return self.touched_ns is None or now_ns - self.touched_ns >= IDLE_NS

    def figure(self, limit: int, now_ns: int) -> RateFigure:
        """Return what a client is told: of a part, what all have if others' are as full."""
        fill = self.fill(limit, now_ns)
        if not self.parts:
            return RateFigure(limit, 0 if fill else limit, 0.0)
        fill = fill * WHOLE // self.parts
        remaining = max(0, (limit * UNIT - fill) // UNIT)
        return RateFigure(limit, remaining, fill / (limit * WHOLE) / NS_PER_S if limit else 0.0)

    def _put(self, parts: int, fill: int) -> None:
        self.parts = parts
        self._rate = parts * self._limit
        self._fill = fill


class SlotPart:
    """A part of the concurrent requests: ``used`` are open here."""

    __slots__ = ("_denied_until_ns", "_limit", "parts", "touched_ns", "used")

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self.used = 0
        self.touched_ns: int | None = None
        self._limit = 0
        self._denied_until_ns = 0

    def missing(self, amount: int, limit: int, now_ns: int) -> int:
        """Return how many free parts are wanting for ``amount`` more; ``limit`` >= 1."""
        self._limit = limit
        return max(0, self._parts_for(self.used + amount) - self.parts)

    def wait_ns(self, missing: int) -> int:
        """Return when to come again: nobody knows when a request will end."""
        return SLOT_WAIT_NS

    def add(self, amount: int, now_ns: int) -> None:
        """Open or end ``amount`` requests."""
        self.used += amount
        assert self.used >= 0
        self.touched_ns = now_ns

    def deny(self, missing: int, now_ns: int) -> None:
        """Remember for a moment that nobody has a free slot."""
        self._denied_until_ns = now_ns + SLOT_ASK_AGAIN_NS

    def denied(self, now_ns: int) -> bool:
        """Whether others were asked lately, in vain."""
        return now_ns < self._denied_until_ns

    def give(self, parts: int, need: int, now_ns: int) -> tuple[int, int]:
        """Hand over free parts: ``need`` if there are, else as many as ``parts`` of the half."""
        free = max(0, self.parts - self._parts_for(self.used))
        spare = free if self.idle(now_ns) else min(parts, free // 2)
        moved = min(free, max(need, spare))
        self.parts -= moved
        return moved, 0

    def receive(self, parts: int, fill: int, now_ns: int) -> None:
        """Take over parts."""
        self.parts += parts

    def cut(self, parts: int, now_ns: int) -> None:
        """Keep at most ``parts``; open requests stay open."""
        self.parts = min(self.parts, parts)

    def idle(self, now_ns: int) -> bool:
        """Whether it has not been used lately."""
        unused = self.touched_ns is None or now_ns - self.touched_ns >= IDLE_NS
        return unused and not self.used

    def _parts_for(self, slots: int) -> int:
        if not self._limit or not slots:
            return 0
        return -(-slots * WHOLE // self._limit) - 1


Part = RatePart | SlotPart
