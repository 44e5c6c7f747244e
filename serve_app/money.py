"""A request's money: the most it can cost is reserved before it is admitted.

Between the limits and the gate. An answer is never longer than what was reserved for it
pays for; one request reserves no more than a part of what its budgets have left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serve_app.audit import Audit
from serve_app.books import Books
from serve_app.core.budget import BudgetKey, scopes_of
from serve_app.core.pricing import FREE, Priced, Rates
from serve_app.core.purses import Lacking, Overdrawn, Reserved
from serve_app.core.types import RequestId, Usage
from serve_app.engine.transport import Cap
from serve_app.errors import ApiError, InsufficientQuota, RateLimited, Unavailable
from serve_app.purse_link import Answer, PurseLink
from serve_app.tickets import TEMPLATE_TOKENS, Prepared
from serve_app.usage import UsageRecord, Witness, arrived_at_s, decode

# What an answer must be able to have, for its request to be admitted.
LEAST_OUTPUT_TOKENS = 16
# What one request may reserve of what is left, if that pays for an answer of some length.
SHARE_OF_LEFT = 8
USEFUL_OUTPUT_TOKENS = 512
# A running answer's next part, and how long before its end it is reserved: time to ask Control
# and the other routers while tokens go on coming.
TRANCHE_TOKENS = 512
LEAD_TOKENS = 256
AGAIN_S = 0.25
# What chat templates put before everything, on their own account or for tools.
PREAMBLE_TOKENS = 256
RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Fare:
    """What a request may cost: ``most``, of which ``least`` has to be reserved.

    ``useful`` pays for an answer of some length.
    """

    request_id: RequestId
    keys: tuple[BudgetKey, ...]
    rates: Rates
    prompt_tokens: int
    most: int
    useful: int
    least: int

    def output_tokens(self, reserved: int) -> int:
        """Return how many output tokens a reservation pays for."""
        rest = reserved - self.rates.most_nanousd(self.prompt_tokens, 0)
        return rest // self.rates.output_nanousd if self.rates.output_nanousd else 1 << 62


class Money:
    """One per router."""

    def __init__(
        self,
        link: PurseLink,
        books: Books,
        on_refused: Callable[[str, str], None] = lambda scope, reason: None,
    ) -> None:
        """``on_refused`` is told whose budget refused a request, and why."""
        self._on_refused = on_refused
        self._link = link
        self._books = books
        self._fares: dict[RequestId, Fare] = {}
        self._tranches: dict[RequestId, _Tranches] = {}

    def fare(self, audit: Audit, prepared: Prepared) -> Fare | None:
        """Return what has to be reserved, None where no budget or no price holds."""
        if not self._link.list.keys:
            return None
        keys = tuple(key for key in _keys(audit) if key in self._link.list.keys)
        if not keys:
            return None
        ticket = prepared.ticket
        assert audit.model is not None, "a ticket is for a model"
        rates = self._books.prices.rates(
            Priced(
                tenant=ticket.tenant,
                model=audit.model,
                priority_class=ticket.priority_class,
                at_s=arrived_at_s(ticket.request_id),
            )
        )
        if rates == FREE:
            return None
        parsed = prepared.parsed
        prompts = max(1, parsed.choices // parsed.n)
        # No token is shorter than a byte, and a message's own syntax in JSON is longer than
        # in any chat template: an estimate could be too low.
        longest = len(parsed.fields) + prompts * TEMPLATE_TOKENS + PREAMBLE_TOKENS
        known = parsed.prompt_token_ids
        prompt = longest if known is None else known
        most = rates.most_nanousd(prompt, ticket.max_tokens)
        least = rates.most_nanousd(prompt, min(ticket.max_tokens, LEAST_OUTPUT_TOKENS))
        useful = rates.most_nanousd(prompt, min(ticket.max_tokens, USEFUL_OUTPUT_TOKENS))
        return Fare(ticket.request_id, keys, rates, prompt, most, useful, least)

    def reserve(self, fare: Fare) -> Answer:
        """Reserve at once, without waiting: all of it, or a part of what is left."""
        left = self._link.left(fare.request_id, fare.keys)
        amount = min(fare.most, max(fare.useful, left // SHARE_OF_LEFT))
        answer = self._link.reserve(fare.request_id, fare.keys, amount, fare.least)
        if isinstance(answer, Reserved):
            self._fares[fare.request_id] = fare
        return answer

    async def fetch(self, fare: Fare, answer: Answer | None) -> Reserved:
        """Get what is lacking from Control, and reserve.

        Raises:
            InsufficientQuota: a budget is spent.
            RateLimited: what is left of it is reserved by requests that run.
            Unavailable: Control cannot be asked.
        """
        if isinstance(answer, Lacking):
            lacking = answer
            answer = await self._link.fetch(fare.request_id, lacking, lambda: self.reserve(fare))
        if isinstance(answer, Reserved):
            return answer
        if answer is None:
            self._on_refused("", "unavailable")
        else:
            self._on_refused(answer.key.scope, "spent" if answer.exhausted else "reserved")
        raise refusal(answer)

    def tranches(self, fare: Fare, reserved: Reserved, most_tokens: int) -> Cap:
        """Return a cap for a stream of one choice that grows while there is more to reserve."""
        tranches = _Tranches(fare, reserved.amount, most_tokens, self._link)
        self._tranches[fare.request_id] = tranches
        return tranches.cap

    def settle(self, audit: Audit) -> None:
        """Charge a request that ended in whatever way; requests without a fare cost nothing."""
        tranches = self._tranches.pop(audit.request_id, None)
        if tranches is not None:
            tranches.close()
        fare = self._fares.pop(audit.request_id, None)
        if fare is None:
            return
        purses, usage = self._link.purses, audit.delivery.usage
        if audit.charge is None:
            purses.void(audit.request_id)
        elif usage is not None:
            purses.settle(audit.request_id, fare.rates.cost_nanousd(usage))
        else:
            # The engine may have generated more than was delivered; it will say so.
            used = Usage(fare.prompt_tokens, 0, audit.delivery.output_tokens)
            cost = min(fare.rates.cost_nanousd(used), fare.most)
            now_s = self._link.now_s()
            purses.settle(audit.request_id, cost, final=False, now_s=now_s)

    def acknowledge(self, payloads: Sequence[bytes]) -> None:
        """Let go of what these records cost: the ledger has them."""
        purses, now_s = self._link.purses, self._link.now_s()
        for request_id in self._told(payloads):
            purses.acknowledge(request_id, now_s)
        purses.heard(now_s)

    def lose(self, payloads: Sequence[bytes]) -> None:
        """Let go, after a while, of what these records cost: no ledger will have them."""
        for request_id in self._told(payloads):
            self._link.purses.lose(request_id)

    def _told(self, payloads: Sequence[bytes]) -> list[RequestId]:
        """Return the requests that routers' records are of: an engine's tells of one attempt."""
        if not self._link.purses.unreleased:
            return []
        records = [decode(payload) for payload in payloads]
        return [
            each.charge.request_id
            for each in records
            if isinstance(each, UsageRecord) and each.witness is Witness.ROUTER
        ]


class _Tranches:
    """A running answer's reservation, extended before the answer has come to its end.

    The cap is raised only when what it stands for is reserved, so an answer never costs more
    than was. Where nothing more is to be had it ends at its cap, unless some comes free first.
    """

    def __init__(self, fare: Fare, reserved: int, most_tokens: int, link: PurseLink) -> None:
        self.cap = Cap(fare.output_tokens(reserved), self._came)
        self._fare = fare
        self._reserved = reserved
        self._most_tokens = most_tokens
        self._link = link
        self._again_at_s = link.now_s()
        self._task: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Ask for no more."""
        if self._task is not None:
            self._task.cancel()

    def _came(self, output_tokens: int) -> None:
        """Reserve the next tranche once the answer is near the end of what is paid for."""
        cap = self.cap
        if cap.tokens - output_tokens > LEAD_TOKENS or cap.tokens >= self._most_tokens:
            return
        if (self._task is not None and not self._task.done()) or (
            self._link.now_s() < self._again_at_s
        ):
            return
        answer = self._extend()
        if isinstance(answer, Lacking):
            self._task = asyncio.create_task(self._fetch(answer))

    async def _fetch(self, lacking: Lacking) -> None:
        answer = await self._link.fetch(self._fare.request_id, lacking, self._attempt)
        if answer is None:
            self._again_at_s = self._link.now_s() + AGAIN_S

    def _attempt(self) -> Answer:
        answer = self._extend()
        # One that has ended meanwhile needs nothing.
        return Reserved(0) if answer is None else answer

    def _extend(self) -> Answer | None:
        rate = self._fare.rates.output_nanousd
        tokens = min(TRANCHE_TOKENS, self._most_tokens - self.cap.tokens)
        least = min(tokens, LEAST_OUTPUT_TOKENS)
        answer = self._link.extend(self._fare.request_id, tokens * rate, least * rate)
        if isinstance(answer, Reserved):
            self._reserved += answer.amount
            self.cap.raise_to(self._fare.output_tokens(self._reserved))
        elif not isinstance(answer, Lacking):
            self._again_at_s = self._link.now_s() + AGAIN_S
        return answer


def refusal(answer: Overdrawn | None) -> ApiError:
    """Return the client's error for what could not be reserved; None: nobody could say."""
    if answer is None:
        return Unavailable(
            "The budget of this request cannot be checked at the moment; retry later.",
            code="limits_unavailable",
            retry_after_s=RETRY_AFTER_S,
        )
    whose = answer.key.scope.value
    if answer.exhausted:
        return InsufficientQuota(
            f"The budget of this {whose} is spent; retrying does not help.", should_retry=False
        )
    return RateLimited(
        f"What is left of this {whose}'s budget is reserved by requests that run; retry later.",
        code="budget_reserved",
        retry_after_s=RETRY_AFTER_S,
    )


def _keys(audit: Audit) -> list[BudgetKey]:
    """Return whose money a request is, as the ledger counts it."""
    assert audit.key is not None, "only who has a key is served"
    key = audit.key
    user = key.user or audit.user or ""
    return scopes_of(tenant=key.tenant, user=user, key=key.budget_id, tag=audit.tag)
