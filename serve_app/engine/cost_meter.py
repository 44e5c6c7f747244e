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
    Work,
)
from serve_app.core.engine_parts import StepRun
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


class CostMeter:
    """Times are the replica's monotonic seconds; sequences' names are their accounts."""

    def __init__(self, born_s: float, block_tokens: int) -> None:
        self._time = ReplicaTime(_ns(born_s))
        self._fit = StepFit()
        self._block_tokens = block_tokens
        self._stepped_ns = 0
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
        self._time.vacant(self._stepped_ns)

    def open(self, tenant: str) -> Account:
        """Return the account of a request that the engine has taken."""
        return Account(TenantId(tenant))

    def close(self, account: Account, outcome: Outcome) -> None:
        """Book a request that has ended."""
        self._time.close(account, outcome)
        self._hold(account.tenant, account.kv_block_ns)

    def stepped(self, run: StepRun, start_s: float, end_s: float) -> None:
        """Split a run of steps that lasted from ``start_s`` to ``end_s``.

        Several steps of one composition are split as one: each request with the sum of
        what it did in them.
        """
        start_ns, end_ns = _ns(start_s), _ns(end_s)
        steps, by = run.steps, self._fit.coefficients
        own: dict[Account, int] = {}
        again: dict[Account, int] = {}
        growth = steps * (steps - 1) // 2
        prefill_tokens = kv_tokens = 0
        for sequence, context in run.decodes:
            account = sequence.name
            assert isinstance(account, Account)
            read = steps * context + growth
            kv_tokens += read
            own[account] = own.get(account, 0) + by.own_ps(0, steps, read)
        for sequence, chunk in run.prefills:
            account = sequence.name
            assert isinstance(account, Account)
            prefill_tokens += chunk
            own[account] = own.get(account, 0) + by.own_ps(chunk, 0, 0)
            repeated = min(sequence.lost_tokens, sequence.computed_tokens)
            repeated -= sequence.computed_tokens - chunk
            if repeated > 0:
                again[account] = again.get(account, 0) + by.own_ps(repeated, 0, 0)
        work = [Work(account, ps, again.get(account, 0)) for account, ps in own.items()]
        # Of several steps each has its own fixed part.
        self._time.step(start_ns, end_ns, work, by, steps=steps)
        self._stepped_ns = end_ns
        self._hold_blocks(run, end_ns - start_ns)
        self._fit.observe(
            end_ns - start_ns,
            prefill_tokens=prefill_tokens,
            decode_sequences=steps * len(run.decodes),
            kv_tokens_read=kv_tokens,
            steps=steps,
        )

    def read(self, now_s: float) -> EngineCosts:
        """Return the figures so far; with work under way, up to the last step."""
        return EngineCosts(
            self._time.read(_ns(now_s)),
            self._fit.error_ratio,
            self._fit.steps,
            self._fit.coefficients,
            {tenant: held / NS_PER_S for tenant, held in self._kv_block_ns.items()},
        )

    def _hold_blocks(self, run: StepRun, duration_ns: int) -> None:
        size, steps = self._block_tokens, run.steps
        for sequence, context in run.decodes:
            blocks = _blocks_upto(context + steps - 1, size) - _blocks_upto(context - 1, size)
            self._held(sequence.name, blocks * duration_ns // steps)
        for sequence, _ in run.prefills:
            self._held(sequence.name, -(-sequence.computed_tokens // size) * duration_ns)

    def _held(self, account: object, block_ns: int) -> None:
        assert isinstance(account, Account)
        account.kv_block_ns += block_ns
        if account.closed:
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
