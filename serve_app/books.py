"""The router's side of the ledger: who pays, and what was delivered.

A completed response is written down before its last byte goes out; one that ended
otherwise right after. Only requests that reached an engine are: a refusal costs nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from serve_app.audit import Audit, since, token_interval_s
from serve_app.core.calendar import NS_PER_S
from serve_app.core.pricing import PriceBook
from serve_app.core.types import Outcome, PoolName, ReplicaId
from serve_app.errors import JournalUnavailable, Unavailable
from serve_app.usage import Charge, UsageRecord, Witness, arrived_at_s

RETRY_AFTER_S: Final = 5.0

# Failures that are not ours: what was generated until then is billed.
BILLED_FAILURES: Final = frozenset({"client_too_slow", "deadline"})


class UsageWriter(Protocol):
    """Where records go; see usage_log.UsageLog."""

    def check(self) -> None:
        """Raise JournalUnavailable if there is no room for another request's record."""

    async def append(self, record: UsageRecord) -> None:
        """Return when a record is durable, or raise JournalUnavailable."""

    def note(self, record: UsageRecord) -> None:
        """Have a record written soon."""


class Books:
    """One per router. ``prices`` is the book in force, replaced as a whole."""

    def __init__(
        self,
        writer: UsageWriter,
        clock: Callable[[], float],
        on_durable: Callable[[float], None] = lambda _: None,
    ) -> None:
        """``on_durable`` is told how many seconds a completed response's record took."""
        self._writer = writer
        self._clock = clock
        self._on_durable = on_durable
        self.prices = PriceBook(0)

    def check(self) -> None:
        """Return if a request may begin.

        Raises:
            Unavailable: its use could not be written down.
        """
        try:
            self._writer.check()
        except JournalUnavailable:
            raise Unavailable(
                "The service cannot record usage at the moment; retry later.",
                code="usage_unavailable",
                retry_after_s=RETRY_AFTER_S,
            ) from None

    def price(self, audit: Audit) -> None:
        """Have a request cost what the book in force says, however long it waits."""
        audit.price_version = self.prices.version

    def charge(self, audit: Audit, pool: PoolName) -> Charge:
        """Return who pays for a request that goes to ``pool``, by its prices."""
        assert audit.key is not None, "only who has a key is served"
        assert audit.model is not None, "only a request for a model is served"
        assert audit.served_class is not None, "a ticket has a class"
        assert audit.price_version is not None, "a request has its prices before it has a place"
        return Charge(
            request_id=audit.request_id,
            tenant=audit.key.tenant,
            key=audit.key.key_id,
            user=audit.key.user or audit.user or "",
            tag=audit.tag,
            model=audit.model,
            pool=pool,
            priority_class=audit.served_class,
            endpoint=audit.endpoint,
            client_label=audit.client_label,
            price_version=audit.price_version,
        )

    async def complete(self, audit: Audit, replica: ReplicaId) -> None:
        """Return when the record of a response that needs only its end is durable.

        Raises:
            Unavailable: it cannot be made durable; the response must not end as if it were.
        """
        began_s = self._clock()
        audit.replica, audit.outcome, audit.booked = replica, Outcome.COMPLETED, True
        try:
            await self._writer.append(record(audit, began_s))
        except JournalUnavailable:
            audit.outcome, audit.booked = Outcome.FAILED, False
            raise Unavailable(
                "The usage of this response could not be recorded; retry later.",
                code="usage_unavailable",
                retry_after_s=RETRY_AFTER_S,
            ) from None
        self._on_durable(self._clock() - began_s)

    def close(self, audit: Audit) -> None:
        """Write down a request that ended in whatever way; once, and only if it was served."""
        if audit.charge is not None and not audit.booked:
            audit.booked = True
            self._writer.note(record(audit, self._clock()))


def record(audit: Audit, now_s: float) -> UsageRecord:
    """Return the router's account of a request at ``now_s``, monotonic seconds."""
    assert audit.charge is not None, "it was served"
    delivery, usage = audit.delivery, audit.delivery.usage
    outcome = audit.outcome or Outcome.FAILED
    duration_s = now_s - audit.arrived_at_s
    estimate = audit.expected_prompt_tokens if delivery.output_tokens else 0
    return UsageRecord(
        charge=audit.charge,
        witness=Witness.ROUTER,
        attempt=max(1, delivery.attempts),
        outcome=outcome.value,
        # On the clock that named the request: both ends of it agree if that is set.
        ended_at_s=arrived_at_s(audit.request_id) + duration_s,
        billable=outcome is not Outcome.FAILED or audit.reason in BILLED_FAILURES,
        exact=usage is not None,
        prompt_tokens=estimate if usage is None else usage.prompt_tokens,
        cached_prompt_tokens=0 if usage is None else usage.cached_prompt_tokens,
        output_tokens=delivery.output_tokens if usage is None else usage.completion_tokens,
        replica=audit.replica or "",
        reason=audit.reason or "",
        finish_reason=delivery.finish_reason or "",
        degraded=audit.degraded or "",
        queued_s=audit.queued_s,
        first_token_s=since(audit.arrived_at_s, delivery.first_byte_at_s),
        token_interval_s=token_interval_s(delivery),
        duration_s=duration_s,
        engine_ns=0 if usage is None else round(usage.engine_s * NS_PER_S),
        kv_block_us=0 if usage is None else usage.kv_block_us,
    )
