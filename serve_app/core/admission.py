"""Who may be admitted: reserves between classes, turns between them, and refused clients.

Class reserves are accounting at dispatch against the pool's knee, in requests, in tokens
and in prompt tokens not yet computed: Critical may use all of it, Standard and Sheddable
together what is not reserved for Critical, Sheddable alone its share of it. Reserves
round in favour of work: slots are whole, reserves rounded down, and a class that holds
nothing may always run one request, however large.

A part of every share is headroom for *sparse* tenants: those that were served less than
their fair share when they asked. Tenants that always have more work wait for the rest,
so that others find room at once instead of waiting for the next request to end.

Among classes that wait, the more important goes first, but a class that waits is owed a
minimum share of the dispatched cost (more once its next request has aged), and goes
first when what it is owed pays for its next request. Sheddable is paid by Standard's
work only, so it never goes before a waiting Critical.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import inf
from zlib import crc32

from serve_app.core.exchange import Held, Triple
from serve_app.core.policy import ClassPolicy, PoolPolicy
from serve_app.core.types import KeyId, RequestId

CRITICAL, STANDARD, SHEDDABLE = 0, 1, 2
RATE_WINDOW_S = 10.0
THROTTLE_WINDOW_S = 30.0
JITTER_RATIO = 0.25
NOTHING_HELD = Held()


def hashed_fraction(request_id: RequestId) -> float:
    """Return a number in [0, 1) that depends on the request alone: replayable randomness."""
    return crc32(request_id.encode()) / 4294967296.0


class Shares:
    """What each class holds of a pool's knee, and whether it may take more.

    Held are requests, tokens (uncached prompt and expected output) and prompt tokens not
    yet computed, the last counted up to one replica's knee each: a longer prompt keeps
    one replica busy, not several. Only live replicas count: what still runs on a
    draining one no longer competes.
    """

    __slots__ = (
        "_others",
        "_prefill_limits",
        "_slot_limits",
        "_token_limits",
        "prefill",
        "requests",
        "slots",
        "tokens",
        "tokens_capacity",
    )

    def __init__(self) -> None:
        self.requests = [0, 0, 0]
        self.tokens = [0, 0, 0]
        self.prefill = [0, 0, 0]
        self.resize(0, 0, 0, PoolPolicy())

    def resize(
        self,
        slots: int,
        tokens_capacity: int,
        prefill_capacity: int,
        policy: PoolPolicy,
        others: Held = NOTHING_HELD,
    ) -> None:
        """Set the knee: requests, tokens, and prompt tokens not yet computed, in flight.

        What other routers hold by class counts as taken.
        """
        self.slots = slots
        self.tokens_capacity = tokens_capacity
        reserve, share = policy.critical_reserve_ratio, policy.sheddable_share_ratio
        sheddable_slots = max(1, int(share * slots)) if share > 0 else 0
        self._slot_limits = _with_headroom(
            (slots, slots - int(reserve * slots), sheddable_slots),
            policy.sparse_headroom_ratio,
            others.requests,
        )
        ratios = (1.0, 1.0 - reserve, share)
        self._token_limits = _with_headroom(
            tuple(int(ratio * tokens_capacity) for ratio in ratios),
            policy.sparse_headroom_ratio,
        )
        self._prefill_limits = _with_headroom(
            tuple(int(ratio * prefill_capacity) for ratio in ratios),
            policy.sparse_headroom_ratio,
        )
        self._others = others

    def has_slot(self, rank: int, sparse: bool) -> bool:
        """Whether one more request of a class may run, by its number of requests."""
        limits = self._slot_limits[sparse]
        critical, standard, sheddable = self.requests
        if critical + standard + sheddable >= limits[CRITICAL]:
            return False
        if rank == CRITICAL:
            return True
        if standard + sheddable >= limits[STANDARD]:
            return False
        return rank == STANDARD or sheddable < limits[SHEDDABLE]

    def has_tokens(self, rank: int, sparse: bool, need_tokens: int, prefill_tokens: int) -> bool:
        """Whether so many more tokens and uncomputed prompt tokens fit a class's share."""
        if rank == CRITICAL:
            return True
        tokens, prefill = self._token_limits[sparse], self._prefill_limits[sparse]
        others = self._others
        return _fits(self.tokens, others.tokens, tokens, rank, need_tokens) and _fits(
            self.prefill, others.prefill, prefill, rank, prefill_tokens
        )


def _with_headroom(
    limits: tuple[int, ...], headroom_ratio: float, others: Sequence[int] = (0, 0, 0)
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the limits for tenants that use much, and for those that use little.

    A class's limit holds for it and the less important ones, and so do the others' parts.
    The whole is bounded by the replicas' own caps, which know of the others sooner.
    """
    taken = (sum(others), others[STANDARD] + others[SHEDDABLE], others[SHEDDABLE])
    whole = (
        limits[CRITICAL],
        limits[STANDARD] - taken[STANDARD],
        limits[SHEDDABLE] - taken[SHEDDABLE],
    )
    much = tuple(
        limit - int(headroom_ratio * limit) - each
        for limit, each in zip(limits, taken, strict=True)
    )
    return much, whole


def _fits(held: list[int], others: Triple, limits: tuple[int, ...], rank: int, amount: int) -> bool:
    """Whether ``amount`` more fits the limits of a class and of those above it.

    A class that holds nothing may take any amount, so that nothing is too large for ever.
    """
    total = held[SHEDDABLE] + others[SHEDDABLE]
    if rank == SHEDDABLE and total and total + amount > limits[SHEDDABLE]:
        return False
    total += held[STANDARD] + others[STANDARD]
    return not total or total + amount <= limits[STANDARD]


class Turns:
    """What waiting classes are owed of the dispatched cost: never starved, never hoarding.

    Each unit of cost dispatched for a class pays the next less important one, if it
    waits, share / (1 - share); dispatching from that one costs it. What is owed never
    exceeds the cost of the next request by more than one payment, and is lost when nobody
    of the class waits.
    """

    __slots__ = ("_classes", "_owed")

    def __init__(self, classes: tuple[ClassPolicy, ClassPolicy, ClassPolicy]) -> None:
        self._classes = classes
        self._owed = [0.0, 0.0, 0.0]

    def owed(self, rank: int) -> float:
        """Cost a class may take before more important ones."""
        return self._owed[rank]

    def goes_first(self, rank: int, next_cost: float) -> bool:
        """Whether a waiting class has been owed the whole cost of its next request."""
        return 0.0 < next_cost <= self._owed[rank]

    def dispatched(self, rank: int, cost: float, below: tuple[float, bool] | None) -> None:
        """Take note of a dispatch from ``rank``.

        ``below`` is the next cost of the class below and whether that request has aged,
        or None if it has nobody waiting.
        """
        owed = self._owed
        if rank != CRITICAL:
            owed[rank] = max(0.0, owed[rank] - cost)
        if rank == SHEDDABLE:
            return
        if below is None:
            owed[rank + 1] = 0.0
            return
        policy = self._classes[rank + 1]
        share = policy.minimum_share_ratio
        if below[1]:
            share = max(share, policy.aged_share_ratio)
        payment = cost * share / (1.0 - share)
        owed[rank + 1] = min(owed[rank + 1] + payment, below[0] + payment)


class ServiceRate:
    """Cost served per second while a class has requests waiting: its share of capacity.

    Time without waiting requests says nothing about capacity and is left out. Forgets
    over ``RATE_WINDOW_S`` of busy time.
    """

    __slots__ = ("_busy", "_cost", "_seconds", "_since_s")

    def __init__(self) -> None:
        self._cost = 0.0
        self._seconds = 0.0
        self._busy = False
        self._since_s = 0.0

    def begin(self, now_s: float) -> None:
        """Somebody waits from now on."""
        if not self._busy:
            self._busy = True
            self._since_s = now_s

    def end(self, now_s: float) -> None:
        """Nobody waits any more."""
        if self._busy:
            self.served(0.0, now_s)
            self._busy = False

    def served(self, cost: float, now_s: float) -> None:
        """A waiting request was dispatched."""
        if not self._busy:
            return
        elapsed_s = now_s - self._since_s
        keep = RATE_WINDOW_S / (RATE_WINDOW_S + elapsed_s)
        self._cost = self._cost * keep + cost
        self._seconds = self._seconds * keep + elapsed_s
        self._since_s = now_s

    def seconds(self, now_s: float) -> float:
        """Return how much recent busy time the rate rests on."""
        return self._seconds + (now_s - self._since_s if self._busy else 0.0)

    def per_s(self, now_s: float) -> float | None:
        """Return the rate, or None before there was anything to measure."""
        seconds = self.seconds(now_s)
        if seconds <= 0.0 or self._cost <= 0.0:
            return None
        return self._cost / seconds


class _Client:
    __slots__ = ("accepts", "ignored", "not_before_s", "updated_s")

    def __init__(self, now_s: float) -> None:
        self.accepts = 0.0
        self.ignored = 0.0
        self.not_before_s = -inf
        self.updated_s = now_s

    def fade(self, now_s: float) -> None:
        keep = THROTTLE_WINDOW_S / (THROTTLE_WINDOW_S + now_s - self.updated_s)
        self.ignored *= keep
        self.accepts *= keep
        self.updated_s = now_s


class ClientThrottle:
    """Refuses, without further work, clients that ignore the advice to come back later.

    Counts, per key and class, requests that come before the advised time ("requests")
    and requests admitted ("accepts"). A request that comes early is refused with
    probability max(0, (requests - 2 x accepts) / (requests + 1)), decided by a hash of
    its id. A client that waits as advised is never throttled, nor is one of whose
    requests half are admitted. Counts fade over ``THROTTLE_WINDOW_S``; the keys longest
    unheard of are forgotten first.

    Source: "Handling Overload", Site Reliability Engineering (Google), client-side
    throttling with K = 2, here kept by the server for clients that lack it.
    """

    def __init__(self, keys_max: int = 10_000) -> None:
        self._keys_max = keys_max
        self._clients: OrderedDict[tuple[KeyId, int], _Client] = OrderedDict()

    def __len__(self) -> int:
        return len(self._clients)

    def refuses(self, key: KeyId, rank: int, request_id: RequestId, now_s: float) -> bool:
        """Whether to refuse this request for what its key did before."""
        client = self._clients.get((key, rank))
        if client is None or now_s >= client.not_before_s:
            return False
        client.fade(now_s)
        client.ignored += 1.0
        chance = (client.ignored - 2.0 * client.accepts) / (client.ignored + 1.0)
        return hashed_fraction(request_id) < chance

    def remaining_s(self, key: KeyId, rank: int, now_s: float) -> float:
        """Return how long a key was advised to stay away, from now."""
        client = self._clients.get((key, rank))
        return max(0.0, client.not_before_s - now_s) if client else 0.0

    def accepted(self, key: KeyId, rank: int, now_s: float) -> None:
        """A request of the key was admitted."""
        client = self._client((key, rank), now_s)
        client.fade(now_s)
        client.accepts += 1.0

    def refused(self, key: KeyId, rank: int, retry_after_s: float, now_s: float) -> None:
        """A request of the key was refused with the advice to come back later."""
        client = self._client((key, rank), now_s)
        client.not_before_s = max(client.not_before_s, now_s + retry_after_s)

    def _client(self, name: tuple[KeyId, int], now_s: float) -> _Client:
        client = self._clients.get(name)
        if client is not None:
            self._clients.move_to_end(name)
            return client
        if len(self._clients) >= self._keys_max:
            self._clients.popitem(last=False)
        client = self._clients[name] = _Client(now_s)
        return client


def advice_s(wait_s: float, request_id: RequestId, policy: PoolPolicy) -> float:
    """Return the Retry-After for a predicted wait: within bounds, spread upwards by a hash.

    The spread keeps refused clients from coming back together.
    """
    bounded_s = min(max(wait_s, policy.retry_after_min_s), policy.retry_after_max_s)
    return bounded_s * (1.0 + JITTER_RATIO * hashed_fraction(request_id))
