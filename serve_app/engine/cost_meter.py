"""What each request costs its replica, from what every step of the engine contained.

One meter per replica: it turns the engine's steps into the terms that
``core/attribution.py`` splits, learns the coefficients from the same steps and keeps each
tenant's hold on the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from serve_app.core.attribution import (
    NS_PER_S,
    Account,
    ReplicaTime,
    ReplicaUse,
    StepCoefficients,
    Use,
)
from serve_app.core.engine_parts import Sequence, StepRun
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


@dataclass(slots=True)
class _Whole:
    """Steps of one composition, put together."""

    decodes: tuple[tuple[Sequence, int], ...]
    prefills: tuple[tuple[Sequence, int], ...]
    passed: int
    steps: int
    start_ns: int
    end_ns: int


class CostMeter:
    """Times are the replica's monotonic seconds; sequences' names are their accounts."""

    def __init__(self, born_s: float, block_tokens: int) -> None:
        self._time = ReplicaTime(_ns(born_s))
        self._fit = StepFit()
        self._block_tokens = block_tokens
        self._stepped_ns = 0
        self._whole: _Whole | None = None
        self._kv_block_ns: dict[TenantId, int] = {}

    def ready(self, now_s: float) -> None:
        """The engine takes requests from now on."""
        self._time.ready(_ns(now_s))

    def drain(self, now_s: float) -> None:
        """The engine takes no more requests."""
        self._time.drain(_ns(now_s))

    def occupied(self, now_s: float) -> None:
        """The engine has an unfinished request; it may have had one before."""
        self._time.occupied(_ns(now_s))

    def vacant(self) -> None:
        """The engine has had no unfinished request since its last step ended."""
        self._split()
        self._time.vacant(self._stepped_ns)

    def open(self, tenant: str) -> Account:
        """Return the account of a request that the engine has taken."""
        return Account(TenantId(tenant))

    def close(self, account: Account, outcome: Outcome) -> None:
        """Book a request that has ended."""
        self._split()
        self._time.close(account, outcome)
        self._hold(account.tenant, account.kv_block_ns)

    def stepped(self, run: StepRun, start_s: float, end_s: float) -> None:
        """Take in a run of steps that lasted from ``start_s`` to ``end_s``.

        Runs of one composition are put together and split as one, each request with the
        sum of what it did in them: nothing is done per request before somebody joins,
        leaves or asks.
        """
        whole = self._whole
        if whole is not None and run.decodes is whole.decodes and not run.prefills:
            whole.steps += run.steps
            whole.end_ns = _ns(end_s)
            return
        self._split()
        self._whole = _Whole(
            run.decodes, run.prefills, run.passed, run.steps, _ns(start_s), _ns(end_s)
        )
        if run.prefills:
            # How much of a prompt is computed is known now, and not once more is.
            self._split()

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
        whole, self._whole = self._whole, None
        if whole is None:
            return
        by, duration_ns = self._fit.coefficients, whole.end_ns - whole.start_ns
        own_ps: dict[Account, int] = {}
        kv_tokens = self._decode_terms(whole, by, own_ps)
        again_ps = self._prefill_terms(whole, by, own_ps)
        self._time.step(
            whole.start_ns, whole.end_ns, own_ps, by, recomputed_ps=again_ps, steps=whole.steps
        )
        self._stepped_ns = whole.end_ns
        self._fit.observe(
            duration_ns,
            prefill_tokens=sum([chunk for _, chunk in whole.prefills]),
            decode_sequences=whole.steps * len(whole.decodes),
            kv_tokens_read=kv_tokens,
            steps=whole.steps,
        )

    def _decode_terms(self, whole: _Whole, by: StepCoefficients, own_ps: dict[Account, int]) -> int:
        """Add the own terms of those that decode; return the KV tokens they read."""
        steps, size = whole.steps, self._block_tokens
        duration_ns = whole.end_ns - whole.start_ns
        decode_ps, kv_token_ps = steps * by.decode_sequence_ps, by.kv_token_ps
        growth = steps * whole.passed + steps * (steps - 1) // 2
        last = whole.passed + steps - 1
        kv_tokens = 0
        for sequence, context in whole.decodes:
            account: Account = sequence.name  # type: ignore[assignment]  # see the class
            read = steps * context + growth
            kv_tokens += read
            own_ps[account] = own_ps.get(account, 0) + decode_ps + kv_token_ps * read
            if steps == 1:
                blocks = (context + last + size - 1) // size
            else:
                before = context + whole.passed - 1
                blocks = _blocks_upto(context + last, size) - _blocks_upto(before, size)
            self._held(account, blocks * duration_ns // steps)
        return kv_tokens

    def _prefill_terms(
        self, whole: _Whole, by: StepCoefficients, own_ps: dict[Account, int]
    ) -> dict[Account, int]:
        """Add the own terms of prompts; return how much of them is work done again."""
        duration_ns = whole.end_ns - whole.start_ns
        again_ps: dict[Account, int] = {}
        for sequence, chunk in whole.prefills:
            account: Account = sequence.name  # type: ignore[assignment]  # see the class
            own_ps[account] = own_ps.get(account, 0) + by.prefill_token_ps * chunk
            computed = sequence.computed_tokens
            repeated = min(sequence.lost_tokens, computed) - (computed - chunk)
            if repeated > 0 and by.prefill_token_ps:
                again_ps[account] = again_ps.get(account, 0) + by.prefill_token_ps * repeated
            self._held(account, -(-computed // self._block_tokens) * duration_ns)
        return again_ps

    def _held(self, account: Account, block_ns: int) -> None:
        account.kv_block_ns += block_ns
        if account.use is not Use.OPEN:
            self._hold(account.tenant, block_ns)

    def _hold(self, tenant: TenantId, block_ns: int) -> None:
        held = self._kv_block_ns
        if tenant not in held and len(held) >= TENANTS_MAX:
            tenant = OTHER_TENANTS
        held[tenant] = held.get(tenant, 0) + block_ns


def _blocks_upto(context: int, size: int) -> int:
    """Return the blocks of every context from 1 to ``context`` tokens, summed."""
    full, rest = divmod(context, size)
    return size * full * (full + 1) // 2 + rest * (full + 1)


def _ns(time_s: float) -> int:
    return round(time_s * NS_PER_S)
