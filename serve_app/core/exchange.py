"""What routers of one fleet tell each other, so that several decide nearly like one.

Every ``EXCHANGE_PERIOD_S`` each router sends the others a Digest: per pool what it holds
by class, whose Critical requests wait for room, what each tenant was served since the
last time and what it has waiting. Between two exchanges a router works on what it heard
last; one not heard of for ``PEER_LOST_S`` is taken for dead, and its part is shared out. The
time in which a router itself stood still does not count: it could hear nobody.

What a router does with the others' digests:

- Free places of a replica, as a snapshot shows them, are divided: each router may take
  its part until the next snapshot. Parts are proportional to the weight of the tenants
  waiting at each router in the most important class that waits anywhere, mixed with equal
  parts (``EVEN_RATIO``), so that a router where nobody waited finds room for its first.
  Routers that work on the same digests never take one place twice; see ``divided``.
- What others hold by class counts against the reserves.
- Tenants' service elsewhere is added to their counters here.
- Sheddable is held while a Critical request waits for room anywhere. So a Critical
  request waits at most one period, and the time a digest travels, while another router
  sends a Sheddable one.

Over-admission. Routers on different digests may disagree about the parts. A router's part
is at most 1 - EVEN_RATIO + EVEN_RATIO / R, so beside its own R routers together take at most
(1 - EVEN_RATIO) x (R - 1) times the places that the last snapshot showed free: a replica
shown full is never over-admitted. Requests that fail over are outside the bound; the retry
budget bounds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, inf
from typing import NewType
from zlib import crc32

from serve_app.core.types import PoolName, ReplicaId, TenantId

RouterId = NewType("RouterId", str)

EXCHANGE_PERIOD_S = 0.25
PEER_LOST_S = 3 * EXCHANGE_PERIOD_S
# Something happens in a router every period at least, its own digest, unless it stands still.
STOOD_STILL_S = 2 * EXCHANGE_PERIOD_S
EVEN_RATIO = 0.25
PREFILL_KEEP = 0.75
TENANTS_TOLD_MAX = 1024
LARGE_TENANT_RATIO = 1 / 32

Triple = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class TenantWaiting:
    """What one tenant has waiting at a router in one class, in cost, and its weight."""

    tenant: TenantId
    weight: float
    backlog: float


@dataclass(frozen=True, slots=True)
class TenantHeld:
    """What one tenant that holds much of a pool holds through one router."""

    tenant: TenantId
    requests: int
    tokens: int


@dataclass(frozen=True, slots=True)
class PoolDigest:
    """One router's part of one pool. Triples are by class: Critical, Standard, Sheddable.

    ``requests``, ``tokens`` and ``prefill`` (prompt tokens not yet computed, long prompts
    counted up to the prefill knee) are in flight on live replicas. ``critical_waits`` says that a
    Critical request waits for room (not only for its own tenant's cap). ``served`` is what
    tenants were charged since the router's last digest, in cost over weight, ``waiting`` what
    they have waiting, both by class; ``large`` the tenants near a cap.
    """

    requests: Triple = (0, 0, 0)
    tokens: Triple = (0, 0, 0)
    prefill: Triple = (0, 0, 0)
    critical_waits: bool = False
    served: tuple[tuple[tuple[TenantId, float], ...], ...] = ((), (), ())
    waiting: tuple[tuple[TenantWaiting, ...], ...] = ((), (), ())
    large: tuple[TenantHeld, ...] = ()


@dataclass(frozen=True, slots=True)
class Digest:
    """What a router tells the others; ``sequence`` grows with each one it sends."""

    router: RouterId
    sequence: int
    pools: Mapping[PoolName, PoolDigest]


@dataclass(frozen=True, slots=True)
class Part:
    """A router's part of what is free: the stretch from ``low`` to ``high`` of [0, 1]."""

    low: float = 0.0
    high: float = 1.0

    @property
    def width(self) -> float:
        """The part's size."""
        return self.high - self.low


ALONE = Part()


def divided(free: int, part: Part, replica: ReplicaId, sequence: int) -> int:
    """Return a router's whole places of ``free`` (negative: to give up) at one snapshot.

    Whoever holds the parts of [0, 1] gets together exactly ``free``: the places are laid
    out evenly over the stretch, shifted by a hash of replica and snapshot so that
    remainders change hands. Source: systematic sampling.
    """
    if part is ALONE:
        return free
    shift = crc32(f"{replica}:{sequence}".encode()) / 4294967296.0
    upper = free if part.high >= 1.0 else floor(free * part.high + shift)
    lower = 0 if part.low <= 0.0 else floor(free * part.low + shift)
    return upper - lower


def over_admission_most(free: int, routers: int) -> int:
    """Return by how many requests routers on different digests may overfill a replica.

    ``free`` places were shown by its last snapshot, all of them to each router.
    """
    return floor((1.0 - EVEN_RATIO) * (routers - 1) * free + routers)


@dataclass(frozen=True, slots=True)
class Held:
    """What routers hold together by class: requests, tokens, prompt tokens to compute."""

    requests: Triple = (0, 0, 0)
    tokens: Triple = (0, 0, 0)
    prefill: Triple = (0, 0, 0)


class Peers:
    """The other routers of one pool, as last heard of. Mutated by the controller only."""

    __slots__ = ("_digests", "_heard_s", "_own", "_prefill", "_router", "part")

    def __init__(self, router: RouterId) -> None:
        self._router = router
        self._own = PoolDigest()
        self._digests: dict[RouterId, PoolDigest] = {}
        self._heard_s: dict[RouterId, float] = {}
        self._prefill: dict[RouterId, Sequence[float]] = {}
        self.part = ALONE

    def __len__(self) -> int:
        return len(self._digests)

    def told(self, digest: PoolDigest) -> None:
        """Keep what was sent last: parts follow from it, not from what only this router knows."""
        self._own = digest
        self._divide()

    def hear(self, router: RouterId, digest: PoolDigest, now_s: float) -> None:
        """Keep another router's digest in place of its last one."""
        before = self._prefill.get(router, digest.prefill)
        self._prefill[router] = [
            each + PREFILL_KEEP * (last - each)
            for last, each in zip(before, digest.prefill, strict=True)
        ]
        self._digests[router] = digest
        self._heard_s[router] = now_s
        self._divide()

    def expire(self, now_s: float) -> bool:
        """Forget routers long unheard of; return whether there were any."""
        lost = [each for each, at_s in self._heard_s.items() if now_s - at_s >= PEER_LOST_S]
        for router in lost:
            del self._digests[router], self._heard_s[router], self._prefill[router]
        if lost:
            self._divide()
        return bool(lost)

    def stood_still(self, seconds: float) -> None:
        """Give the others the time in which this router could hear nobody."""
        for router in self._heard_s:
            self._heard_s[router] += seconds

    def expires_s(self) -> float:
        """When the router longest unheard of is taken for dead; inf without any."""
        return min(self._heard_s.values(), default=inf) + PEER_LOST_S

    @property
    def critical_waits(self) -> bool:
        """Whether a Critical request waits for room at another router."""
        return any(each.critical_waits for each in self._digests.values())

    def held(self) -> Held:
        """Return what the others have in flight by class."""
        requests, tokens, prefill = [0, 0, 0], [0, 0, 0], [0.0, 0.0, 0.0]
        for digest in self._digests.values():
            for rank in range(3):
                requests[rank] += digest.requests[rank]
                tokens[rank] += digest.tokens[rank]
        for mean in self._prefill.values():
            prefill = [total + each for total, each in zip(prefill, mean, strict=True)]
        return Held(_triple(requests), _triple(tokens), _triple([int(each) for each in prefill]))

    def waiting(self) -> list[dict[TenantId, float]]:
        """Return what tenants have waiting at the others by class, in cost over weight."""
        classes: list[dict[TenantId, float]] = [{}, {}, {}]
        for digest in self._digests.values():
            for waiting, told in zip(classes, digest.waiting, strict=True):
                for each in told:
                    share = each.backlog / each.weight
                    waiting[each.tenant] = waiting.get(each.tenant, 0.0) + share
        return classes

    def large(self) -> dict[TenantId, tuple[int, int]]:
        """Return the requests and tokens that large tenants hold through the others."""
        held: dict[TenantId, tuple[int, int]] = {}
        for digest in self._digests.values():
            for each in digest.large:
                requests, tokens = held.get(each.tenant, (0, 0))
                held[each.tenant] = (requests + each.requests, tokens + each.tokens)
        return held

    def _divide(self) -> None:
        """Lay the routers' parts side by side, in the order of their ids."""
        if not self._digests:
            self.part = ALONE
            return
        digests = {**self._digests, self._router: self._own}
        routers = sorted(digests)
        demand = _demand([digests[router] for router in routers])
        total = sum(demand)
        low = 0.0
        for place, router in enumerate(routers):
            width = 1.0 / len(routers)
            if total > 0.0:
                width += (1.0 - EVEN_RATIO) * (demand[place] / total - width)
            high = 1.0 if place == len(routers) - 1 else low + width
            if router == self._router:
                self.part = Part(low, high)
                return
            low = high


def _demand(digests: list[PoolDigest]) -> list[float]:
    """Return the tenants' weight at each router, in the most important class that waits.

    A tenant that waits at several routers divides its weight by what it has waiting.
    """
    demand = [0.0] * len(digests)
    for rank in range(3):
        backlogs: dict[TenantId, float] = {}
        for digest in digests:
            for each in digest.waiting[rank]:
                backlogs[each.tenant] = backlogs.get(each.tenant, 0.0) + each.backlog
        if not backlogs:
            continue
        for place, digest in enumerate(digests):
            for each in digest.waiting[rank]:
                total = backlogs[each.tenant]
                demand[place] += each.weight * (each.backlog / total if total > 0 else 1.0)
        break
    return demand


def _triple(counts: list[int]) -> Triple:
    critical, standard, sheddable = counts
    return critical, standard, sheddable
