"""A request's money: the most it can cost is reserved before it is admitted.

Between the limits and the gate. An answer is never longer than what was reserved for it
pays for; one request reserves no more than a part of what its budgets have left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serve_app.audit import Audit
from serve_app.books import Books
from serve_app.core.budget import BudgetKey, scopes_of
from serve_app.core.pricing import FREE, Priced, Rates
from serve_app.core.purses import Lacking, Overdrawn, Reserved
from serve_app.core.types import RequestId, Usage
from serve_app.errors import ApiError, InsufficientQuota, RateLimited, Unavailable
from serve_app.purse_link import Answer, PurseLink
from serve_app.tickets import TEMPLATE_TOKENS, Prepared
from serve_app.usage import UsageRecord, arrived_at_s, decode

# What an answer must be able to have, for its request to be admitted.
LEAST_OUTPUT_TOKENS = 16
# What one request may reserve of what is left, if that pays for an answer of some length.
SHARE_OF_LEFT = 8
USEFUL_OUTPUT_TOKENS = 512
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
        left = min(self._link.purses.left(key) for key in fare.keys)
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

    def settle(self, audit: Audit) -> None:
        """Charge a request that ended in whatever way; requests without a fare cost nothing."""
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
        if not self._link.purses.unreleased:
            return
        for payload in payloads:
            record = decode(payload)
            if isinstance(record, UsageRecord):
                self._link.purses.acknowledge(record.charge.request_id)


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
    """Return whose money a request is, as the ledger books it."""
    assert audit.key is not None, "only who has a key is served"
    key = audit.key
    user = key.user or audit.user or ""
    return scopes_of(tenant=key.tenant, user=user, key=key.key_id, tag=audit.tag)
