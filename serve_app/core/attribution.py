"""What requests truly cost: an engine's time, split over them to the last nanosecond.

The time of a step follows, nearly, ``a + b prefill tokens + c decoding sequences + e KV
tokens read``. A request's own term is its part of the last three. Its share of the step is
its own term plus ``a / n`` with n requests in the step, scaled so that the shares come to
what the step really took. For this cost function that is the exact Shapley value: a request
pays what it adds, averaged over every order in which the n could have come.

A replica's life is divided completely:

    start-up + useful + cancelled + preempted + failed + idle + drain + unattributed + open

``idle`` is time in which the engine had no unfinished request: measured, never the rest.
``unattributed`` is the rest: there was work and no step that we know of. ``open`` is the
time of requests that have not ended. All of it is whole nanoseconds, so it adds up exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from serve_app.core.calendar import NS_PER_S
from serve_app.core.types import Outcome, TenantId


class Use(StrEnum):
    """What a replica's time went to.

    ``PREEMPTED`` is what was computed a second time after a preemption, whatever became of
    the request. ``DRAIN`` is time without work after the replica was told to end.
    """

    START_UP = "start_up"
    USEFUL = "useful"
    CANCELLED = "cancelled"
    PREEMPTED = "preempted"
    FAILED = "failed"
    IDLE = "idle"
    DRAIN = "drain"
    UNATTRIBUTED = "unattributed"
    OPEN = "open"


_USE_OF = {
    Outcome.COMPLETED: Use.USEFUL,
    Outcome.CANCELLED: Use.CANCELLED,
    Outcome.FAILED: Use.FAILED,
}


@dataclass(frozen=True, slots=True)
class StepCoefficients:
    """Picoseconds of a step: as such, per prefill token, decoding sequence, KV token read.

    Whole and not negative. Only their ratios matter to the shares. The defaults are an 8B
    model on one H100; ``provisional`` says that they are defaults and not a fit.
    """

    step_ps: int = 6_850_000_000
    prefill_token_ps: int = 30_000_000
    decode_sequence_ps: int = 4_400_000
    kv_token_ps: int = 76_000
    provisional: bool = True

    def own_ps(self, prefill_tokens: int, decode_sequences: int, kv_tokens_read: int) -> int:
        """Return what this work adds to a step that happens anyway."""
        return (
            self.prefill_token_ps * prefill_tokens
            + self.decode_sequence_ps * decode_sequences
            + self.kv_token_ps * kv_tokens_read
        )


def shares_ns(duration_ns: int, own_ps: Sequence[int], step_ps: int) -> list[int]:
    """Split a step of ``duration_ns`` over the requests with these own terms, in their order.

    The shares sum to the duration exactly and each is within one nanosecond of its Shapley
    value. Where every term is zero the step is split evenly. O(n).
    """
    count = len(own_ps)
    # Own term and a part of the step, times n: whole numbers.
    whole = count * (sum(own_ps) + step_ps)
    if not whole:
        own_ps, step_ps, whole = [1] * count, 0, count * count
    shares: list[int] = []
    reached = given = 0
    for own in own_ps:
        reached += count * own + step_ps
        upto = reached * duration_ns // whole
        shares.append(upto - given)
        given = upto
    return shares


class Account:
    """One request's engine time so far, in nanoseconds; made when the engine takes it.

    ``recomputed_ns`` is the part that repeats work lost to a preemption. ``late_ns`` came
    after the request had ended, of the step it was in when it was cancelled.
    ``kv_block_ns`` is KV blocks held times how long, with blocks of a shared prefix counted
    for everyone who holds them.
    """

    __slots__ = ("engine_ns", "kv_block_ns", "late_ns", "recomputed_ns", "tenant", "use")

    def __init__(self, tenant: TenantId) -> None:
        self.tenant = tenant
        self.engine_ns = 0
        self.recomputed_ns = 0
        self.late_ns = 0
        self.kv_block_ns = 0
        self.use = Use.OPEN

    @property
    def closed(self) -> bool:
        """Whether the request has ended."""
        return self.use is not Use.OPEN

    @property
    def engine_s(self) -> float:
        """Engine time up to now, in seconds."""
        return self.engine_ns / NS_PER_S

    @property
    def kv_block_us(self) -> int:
        """KV blocks times microseconds held up to now, in whole ones."""
        return self.kv_block_ns // 1000


@dataclass(frozen=True, slots=True)
class ReplicaUse:
    """How a replica's life up to ``lifetime_ns`` divides: ``uses`` sums to it.

    A step under way is not in it yet, so it ends with the last step while there is work.
    ``late_ns`` is a part of the uses that no request's own record shows; ``provisional_ns``
    was split by default coefficients.
    """

    lifetime_ns: int
    uses: dict[Use, int] = field(default_factory=dict)
    late_ns: int = 0
    provisional_ns: int = 0


class ReplicaTime:
    """Divides one replica's life. Every time is in nanoseconds and does not run backwards.

    The engine says when it is ready, when it has no unfinished request and no step under
    way (``vacant``), when it got one (``occupied``), and each step when it is over. Times
    before the last one known count as that one, so nothing is counted twice.
    """

    def __init__(self, born_ns: int) -> None:
        self._born_ns = born_ns
        self._known_ns = born_ns  # all before this is divided
        self._uses = dict.fromkeys(Use, 0)
        self._now = Use.START_UP  # what the time without a step is
        self._draining = False
        self._late_ns = 0
        self._provisional_ns = 0

    def ready(self, now_ns: int) -> None:
        """The engine can take requests and has none."""
        self._pass(now_ns)
        self._now = self._without_work()

    def drain(self, now_ns: int) -> None:
        """No further requests will be taken."""
        self._draining = True
        if self._now is Use.IDLE:
            self._pass(now_ns)
            self._now = Use.DRAIN

    def occupied(self, now_ns: int) -> None:
        """The engine has an unfinished request; calling it again changes nothing."""
        if self._now is not Use.UNATTRIBUTED:
            self._pass(now_ns)
            self._now = Use.UNATTRIBUTED

    def vacant(self, now_ns: int) -> None:
        """The engine has neither an unfinished request nor a step under way."""
        if self._now is Use.UNATTRIBUTED:
            self._pass(now_ns)
            self._now = self._without_work()

    def step(
        self,
        start_ns: int,
        end_ns: int,
        own_ps: Mapping[Account, int],
        by: StepCoefficients,
        *,
        recomputed_ps: Mapping[Account, int] = MappingProxyType({}),
        steps: int = 1,
    ) -> None:
        """Split a step that is over over the requests in it, by their own terms.

        ``recomputed_ps`` is how much of an own term, above zero, is work done again.
        Several ``steps`` of the same requests count as one, with the sums of their terms.
        """
        self._pass(start_ns)
        duration_ns = max(0, end_ns - self._known_ns)
        self._known_ns += duration_ns
        if not own_ps:
            self._uses[Use.UNATTRIBUTED] += duration_ns
            return
        if by.provisional:
            self._provisional_ns += duration_ns
        self._uses[Use.OPEN] += duration_ns
        shares = shares_ns(duration_ns, list(own_ps.values()), steps * by.step_ps)
        late: list[tuple[Account, int]] = []
        for account, share_ns in zip(own_ps, shares, strict=True):
            account.engine_ns += share_ns
            if account.use is not Use.OPEN:
                late.append((account, share_ns))
        for account, share_ns in late:
            self._came_late(account, share_ns)
        if recomputed_ps:
            share_of = dict(zip(own_ps, shares, strict=True))
            for account, again_ps in recomputed_ps.items():
                self._came_again(account, share_of[account] * again_ps // own_ps[account])

    def close(self, account: Account, outcome: Outcome) -> None:
        """A request has ended; its time goes where its outcome says."""
        use = _USE_OF[outcome]
        assert account.use is Use.OPEN, "a request ends once"
        account.use = use
        self._uses[Use.OPEN] -= account.engine_ns
        self._uses[use] += account.engine_ns - account.recomputed_ns
        self._uses[Use.PREEMPTED] += account.recomputed_ns

    def read(self, now_ns: int) -> ReplicaUse:
        """Return how the life so far divides; with work under way, up to the last step."""
        if self._now is not Use.UNATTRIBUTED:
            self._pass(now_ns)
        return ReplicaUse(
            self._known_ns - self._born_ns, dict(self._uses), self._late_ns, self._provisional_ns
        )

    def _came_late(self, account: Account, share_ns: int) -> None:
        account.late_ns += share_ns
        self._late_ns += share_ns
        self._uses[Use.OPEN] -= share_ns
        self._uses[account.use] += share_ns

    def _came_again(self, account: Account, again_ns: int) -> None:
        account.recomputed_ns += again_ns
        if account.closed:
            self._uses[account.use] -= again_ns
            self._uses[Use.PREEMPTED] += again_ns

    def _pass(self, until_ns: int) -> None:
        """Let time pass in which no step ended."""
        if until_ns > self._known_ns:
            self._uses[self._now] += until_ns - self._known_ns
            self._known_ns = until_ns

    def _without_work(self) -> Use:
        return Use.DRAIN if self._draining else Use.IDLE
