"""What each request costs its replica, from what every step of the engine contained.

One meter per replica: it turns the engine's steps into the terms that
``core/attribution.py`` splits, learns the coefficients from the same steps and keeps each
tenant's hold on the KV cache. Both engines feed it: the simulated one from its model
(``model_steps.py``), vLLM from the records of its scheduler (``engine/step_reader.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from serve_app.core.attribution import (
    Account,
    ReplicaTime,
    ReplicaUse,
    StepCoefficients,
    Use,
)
from serve_app.core.calendar import NS_PER_S
from serve_app.core.step_fit import StepFit
from serve_app.core.types import Outcome, TenantId

TENANTS_MAX = 10_000
OTHER_TENANTS = TenantId("")


@dataclass(frozen=True, slots=True)
class EngineCosts:
    """Where a replica's time went, and how far the split can be trusted.

    ``fit_error_ratio`` is the mean error of predicted step times over their mean.
    ``coefficients`` split the steps from now on; provisional ones are defaults.
    ``kv_block_s`` is KV blocks times seconds held, by tenant, of requests that have ended;
    tenants beyond TENANTS_MAX are together under the empty name. It is a second figure
    beside the time and is never added to it.
    """

    use: ReplicaUse
    fit_error_ratio: float
    fitted_steps: int
    coefficients: StepCoefficients
    kv_block_s: dict[TenantId, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a prompt that is computed in a step.

    Of its ``tokens`` ``repeated`` redo what a preemption threw away. ``computed_tokens`` is
    the context after it, ``read_tokens`` the KV tokens of the context before it that it
    reads (0 from an engine whose steps do not get longer by it).
    """

    account: Account
    tokens: int
    computed_tokens: int
    repeated_tokens: int = 0
    read_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Steps:
    """Consecutive steps of one composition, in the replica's monotonic seconds.

    ``decodes`` holds every decoding sequence, by its account, with its context ``passed``
    steps before the first of these; it grows by one token a step. Steps of one composition
    share that tuple. With ``prefills`` there is one step. Where one ends and the next starts
    is the same float, unless the engine stood still in between. A first step that takes
    ``first_ps`` is followed by ones that take ``growth_ps`` longer each; an engine that does
    not know leaves them, and all count alike.

    ``waiting`` are accounts that hold KV blocks without a part in the step, ``freed`` those
    of the others that gave theirs back before its end, as ``held`` was told: each with the
    tokens in the blocks. With either there is one step.
    """

    start_s: float
    end_s: float
    decodes: tuple[tuple[Account, int], ...] = ()
    prefills: tuple[Chunk, ...] = ()
    passed: int = 0
    steps: int = 1
    first_ps: int = 1
    growth_ps: int = 0
    waiting: tuple[tuple[Account, int], ...] = ()
    freed: tuple[tuple[Account, int], ...] = ()


class CostMeter:
    """Times are the replica's monotonic seconds.

    Until ``ready`` all time is start-up, whatever the engine does meanwhile.
    """

    def __init__(
        self, born_s: float, block_tokens: int, coefficients: StepCoefficients | None = None
    ) -> None:
        """``coefficients`` split the steps until enough are seen; None: defaults, provisional."""
        self._time = ReplicaTime(_ns(born_s))
        self._fit = StepFit(coefficients)
        self._block_tokens = block_tokens
        self._stepped_ns = 0
        self._ready = False
        self._first: Steps | None = None  # of the steps that are put together
        self._steps = 0
        self._kv_block_ns: dict[TenantId, int] = {}

    def ready(self, now_s: float) -> None:
        """The engine takes requests from now on."""
        self._ready = True
        self._time.ready(_ns(now_s))

    def drain(self, now_s: float) -> None:
        """The engine takes no more requests."""
        self._time.drain(_ns(now_s))

    def occupied(self, now_s: float) -> None:
        """The engine has an unfinished request; it may have had one before."""
        if self._ready:
            self._time.occupied(_ns(now_s))

    def vacant(self, since_s: float | None = None) -> None:
        """The engine has no unfinished request, since its last step ended or ``since_s``."""
        if self._ready:
            self._split()
            self._time.vacant(self._stepped_ns if since_s is None else _ns(since_s))

    def open(self, tenant: str) -> Account:
        """Return the account of a request that the engine has taken."""
        return Account(TenantId(tenant))

    def close(self, account: Account, outcome: Outcome) -> None:
        """Book a request that has ended."""
        self._split()
        self._time.close(account, outcome)
        self._hold(account.tenant, account.kv_block_ns)

    def stepped(self, steps: Steps) -> None:
        """Take in steps that are over.

        Those of one composition are put together and split as one, each request with the
        sum of what it did in them: nothing is done per request before somebody joins,
        leaves or asks.
        """
        if not self._ready:
            return
        first = self._first
        alone = bool(steps.prefills or steps.waiting or steps.freed)
        if (
            first is None
            or steps.decodes is not first.decodes
            or alone
            or _ns(steps.start_s) > self._stepped_ns  # in between nobody computed
        ):
            self._split()
            self._first = first = steps
            self._steps = 0
        self._steps += steps.steps
        self._stepped_ns = _ns(steps.end_s)
        if alone:
            self._split()

    def held(self, account: Account, tokens: int, since_s: float, until_s: float) -> None:
        """Count the KV blocks of a request that gave them back in the middle of a step.

        The step has to name it among its ``freed``, when it is over.
        """
        if self._ready:
            duration_ns = max(0, _ns(until_s) - _ns(since_s))
            self._held(account, self._blocks(tokens) * duration_ns)

    def read(self, now_s: float) -> EngineCosts:
        """Return the figures so far; with work under way, up to the last step."""
        self._split()
        return EngineCosts(
            self._time.read(_ns(now_s)),
            self._fit.error_ratio,
            self._fit.steps,
            self._fit.coefficients,
            {tenant: held / NS_PER_S for tenant, held in self._kv_block_ns.items()},
        )

    def _split(self) -> None:
        """Split the steps taken in so far."""
        first, self._first = self._first, None
        if first is None:
            return
        start_ns, end_ns, steps = _ns(first.start_s), self._stepped_ns, self._steps
        by = self._fit.coefficients
        own_ps: dict[Account, int] = {}
        kv_tokens = self._decode_terms(first, end_ns - start_ns, by, own_ps)
        kv_tokens += sum([chunk.read_tokens for chunk in first.prefills])
        again_ps = self._prefill_terms(first, end_ns - start_ns, by, own_ps)
        for account, tokens in first.waiting:
            self._held(account, self._blocks(tokens) * (end_ns - start_ns))
        for account, tokens in first.freed:
            self._held(account, -self._blocks(tokens) * (end_ns - start_ns))
        self._time.step(start_ns, end_ns, own_ps, by, recomputed_ps=again_ps, steps=steps)
        if own_ps:
            self._fit.observe(
                end_ns - start_ns,
                prefill_tokens=sum([chunk.tokens for chunk in first.prefills]),
                decode_sequences=steps * len(first.decodes),
                kv_tokens_read=kv_tokens,
                steps=steps,
            )

    def _decode_terms(
        self, first: Steps, duration_ns: int, by: StepCoefficients, own_ps: dict[Account, int]
    ) -> int:
        """Add the own terms of those that decode; return the KV tokens they read."""
        steps, size = self._steps, self._block_tokens
        decode_ps, kv_token_ps = steps * by.decode_sequence_ps, by.kv_token_ps
        growth = steps * first.passed + steps * (steps - 1) // 2
        first_ps, growth_ps = first.first_ps, first.growth_ps
        whole_ps = steps * first_ps + growth_ps * (steps * (steps - 1) // 2)
        kv_tokens = 0
        for account, context in first.decodes:
            read = steps * context + growth
            kv_tokens += read
            own_ps[account] = own_ps.get(account, 0) + decode_ps + kv_token_ps * read
            held = context + first.passed
            if steps == 1:
                self._held(account, self._blocks(held) * duration_ns)
            else:
                block_ps = _block_ps(held, steps, size, first_ps, growth_ps)
                self._held(account, block_ps * duration_ns // whole_ps)
        return kv_tokens

    def _prefill_terms(
        self, first: Steps, duration_ns: int, by: StepCoefficients, own_ps: dict[Account, int]
    ) -> dict[Account, int]:
        """Add the own terms of prompts; return how much of them is work done again."""
        token_ps = by.prefill_token_ps
        again_ps: dict[Account, int] = {}
        for chunk in first.prefills:
            account = chunk.account
            own = token_ps * chunk.tokens + by.kv_token_ps * chunk.read_tokens
            own_ps[account] = own_ps.get(account, 0) + own
            if chunk.repeated_tokens and own:
                again = own * chunk.repeated_tokens // chunk.tokens
                again_ps[account] = again_ps.get(account, 0) + again
            self._held(account, self._blocks(chunk.computed_tokens) * duration_ns)
        return again_ps

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def _held(self, account: Account, block_ns: int) -> None:
        account.kv_block_ns += block_ns
        if account.use is not Use.OPEN:
            self._hold(account.tenant, block_ns)

    def _hold(self, tenant: TenantId, block_ns: int) -> None:
        held = self._kv_block_ns
        if tenant not in held and len(held) >= TENANTS_MAX:
            tenant = OTHER_TENANTS
        held[tenant] = held.get(tenant, 0) + block_ns


def _block_ps(context: int, steps: int, size: int, first_ps: int, growth_ps: int) -> int:
    """Return blocks times duration over steps, the first with so much context in blocks."""
    before, last = context - 1, context + steps - 1
    blocks = _blocks_upto(last, size) - _blocks_upto(before, size)
    if not growth_ps:
        return first_ps * blocks
    weighted = _weighted_upto(last, size) - _weighted_upto(before, size)
    return (first_ps - growth_ps * context) * blocks + growth_ps * weighted


def _blocks_upto(context: int, size: int) -> int:
    """Return the blocks of every context from 1 to ``context`` tokens, summed."""
    full, rest = divmod(context, size)
    return size * full * (full + 1) // 2 + rest * (full + 1)


def _weighted_upto(context: int, size: int) -> int:
    """Return the same sum of blocks times context."""
    full, rest = divmod(context, size)
    twice = full * (full + 1)
    whole = size * size * twice * (2 * full + 1) // 6 - size * (size - 1) * twice // 4
    return whole + (full + 1) * (rest * full * size + rest * (rest + 1) // 2)


def _ns(time_s: float) -> int:
    return round(time_s * NS_PER_S)
