"""What a request comes to, from what its witnesses saw.

Records arrive in any order, some late, some never. The tally is a function of the set of
those that are there; each new row of the ledger holds the difference that it made. So rows
are never changed, they add up to the tally whatever the order, and a request is billed once
however many witnesses speak.

Who is believed:
- The router says whether the response may be billed, and which attempt it came from; what
  the engine's meter counted for that attempt is the bill. Without the meter's account it
  is what was delivered.
- Without the router's record (it was lost with its disk) the last attempt that an engine
  finished, or that was cancelled, is billed.
- Waste is what was generated and not delivered. It is known once the router has spoken.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from serve_app.core.pricing import Rates
from serve_app.core.types import Outcome, Usage
from serve_app.ledger.schema import SUMS
from serve_app.usage import Witness


@dataclass(frozen=True, slots=True)
class Account:
    """One witness's account, as far as it decides what a request comes to."""

    witness: str
    attempt: int
    outcome: str
    billable: bool
    usage: Usage


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums of one or several requests; differences may be negative. Tokens and nano-dollars.

    Named as the columns of ``schema.SUMS`` are.
    """

    requests: int = 0
    billed_requests: int = 0
    billed_prompt_tokens: int = 0
    billed_cached_tokens: int = 0
    billed_output_tokens: int = 0
    delivered_tokens: int = 0
    generated_tokens: int = 0
    wasted_tokens: int = 0
    wasted_nanousd: int = 0
    amount_nanousd: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*map(operator.add, _VALUES(self), _VALUES(other)))

    def __sub__(self, other: Tally) -> Tally:
        return Tally(*map(operator.sub, _VALUES(self), _VALUES(other)))

    def taken_back(self) -> Tally:
        """Return what a correction adds: the bill's opposite. What was done stays done."""
        return Tally(
            billed_requests=-self.billed_requests,
            billed_prompt_tokens=-self.billed_prompt_tokens,
            billed_cached_tokens=-self.billed_cached_tokens,
            billed_output_tokens=-self.billed_output_tokens,
            amount_nanousd=-self.amount_nanousd,
        )

    def columns(self) -> dict[str, int]:
        """Return the sums by the names of their columns."""
        return dict(zip(SUMS, _VALUES(self), strict=True))


_VALUES: Final[Callable[[Tally], tuple[int, ...]]] = operator.attrgetter(*SUMS)
NOTHING = Tally()


def tally(accounts: Iterable[Account], rates: Rates) -> Tally:
    """Return what one request comes to at ``rates``, from every account there is of it."""
    router: Account | None = None
    engines: dict[int, Account] = {}
    for account in accounts:
        if account.witness == Witness.ROUTER:
            router = account
        elif account.witness == Witness.ENGINE:
            engines[account.attempt] = account
    if router is None and not engines:
        return NOTHING
    billed = _billed(router, engines)
    generated = sum(engine.usage.completion_tokens for engine in engines.values())
    delivered = 0 if router is None else router.usage.completion_tokens
    wasted = _wasted(router, engines)
    # A request that ended before any work was done costs nothing, its fee included.
    requests = 1 if billed.prompt_tokens or billed.completion_tokens else 0
    return Tally(
        requests=1,
        billed_requests=requests,
        billed_prompt_tokens=billed.prompt_tokens,
        billed_cached_tokens=billed.cached_prompt_tokens,
        billed_output_tokens=billed.completion_tokens,
        delivered_tokens=delivered,
        generated_tokens=generated,
        wasted_tokens=wasted,
        wasted_nanousd=wasted * rates.output_nanousd,
        amount_nanousd=rates.cost_nanousd(billed, requests),
    )


def _billed(router: Account | None, engines: dict[int, Account]) -> Usage:
    if router is None:
        ended = [e for e in engines.values() if e.outcome != Outcome.FAILED and e.billable]
        return max(ended, key=lambda engine: engine.attempt).usage if ended else Usage()
    if not router.billable:
        return Usage()
    engine = engines.get(router.attempt)
    if engine is None:
        return router.usage
    # A meter never counts less than was delivered; if one ever did, delivery is a fact.
    output = max(engine.usage.completion_tokens, router.usage.completion_tokens)
    prompt = engine.usage
    if router.usage.completion_tokens and not prompt.prompt_tokens:
        prompt = _prompt_of_a_continued(router, engines)
    return Usage(prompt.prompt_tokens, prompt.cached_prompt_tokens, output)


def _prompt_of_a_continued(router: Account, engines: dict[int, Account]) -> Usage:
    """Return who counted the prompt of a stream whose last engine did not come to a token."""
    counted = [attempt for attempt, each in engines.items() if each.usage.prompt_tokens]
    return engines[max(counted)].usage if counted else router.usage


def _wasted(router: Account | None, engines: dict[int, Account]) -> int:
    """Return the tokens that were generated for nobody, as far as known."""
    if router is None:
        last = max(engines)
        return sum(e.usage.completion_tokens for n, e in engines.items() if n != last)
    generated = sum(engine.usage.completion_tokens for engine in engines.values())
    return max(0, generated - router.usage.completion_tokens)
