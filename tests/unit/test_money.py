"""A request's money: what is reserved for it, how long its answer may be, what it costs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.audit import Audit
from serve_app.core.budget import (
    FOREVER,
    Account,
    BudgetKey,
    BudgetList,
    BudgetScope,
    Line,
)
from serve_app.core.pricing import PriceBook, RateCard, Rates
from serve_app.core.purses import LINGER_S, Lacking, Reserved
from serve_app.core.tokens import TokenEstimate
from serve_app.core.types import (
    KeyId,
    Outcome,
    PoolName,
    PriorityClass,
    TenantId,
    Ticket,
    Usage,
    UserId,
)
from serve_app.engine.transport import Cap
from serve_app.errors import ApiError
from serve_app.keys import KeyRecord
from serve_app.money import PREAMBLE_TOKENS, Money
from serve_app.purse_link import PurseLink
from serve_app.tickets import TEMPLATE_TOKENS, Prepared
from serve_app.treasury import MoneyBell
from serve_app.usage import Witness, encode
from tests.usage_records import charge, record, request_id

TENANT = BudgetKey(BudgetScope.TENANT, "acme")
USER = BudgetKey(BudgetScope.USER, "acme/ann")
RATES = Rates(input_nanousd=1, cached_input_nanousd=1, output_nanousd=10, request_nanousd=100)
BODY = b'{"prompt":"hello"}'
PROMPT = len(BODY) + TEMPLATE_TOKENS + PREAMBLE_TOKENS


class Control:
    """Lends what is left of one amount."""

    def __init__(self, amount: int) -> None:
        self.left = amount
        self.granted: dict[BudgetKey, int] = {}
        self.spent = 0
        self.away = False

    async def lend(self, router: str, accounts: list[Account]) -> list[Line]:
        if self.away:
            raise ConnectionError("away")
        lines = []
        for each in accounts:
            given = min(each.need, max(0, self.left))
            self.left -= given
            self.granted[each.key] = self.granted.get(each.key, 0) + given
            left = self.left + self.granted[each.key] - self.spent
            granted, unmet = self.granted[each.key], given < each.need
            lines.append(Line(each.key, FOREVER, granted, left, unmet, needed=each.need > 0))
        return lines

    async def money_bell(self, router: str) -> MoneyBell:
        await asyncio.sleep(3600)
        return MoneyBell()


class Site:
    """One router's money."""

    def __init__(self, amount: int) -> None:
        self.now_s = 0.0
        self.control = Control(amount)
        loop = asyncio.get_running_loop()
        self.link = PurseLink("r", self.control, lambda: loop.time() + self.now_s, lambda: 0.0)
        self.link.list = BudgetList(1, frozenset({TENANT}))
        books: Any = SimpleNamespace(prices=PriceBook(1, [RateCard("all", RATES)]))
        self.refused: list[tuple[str, str]] = []
        self.money = Money(self.link, books, lambda *why: self.refused.append(why))
        self.count = 0

    def request(self, max_tokens: int, tokens: int | None = None) -> tuple[Audit, Prepared]:
        self.count += 1
        name = request_id(number=self.count)
        key = KeyRecord(KeyId("k1"), "", b"", TenantId("acme"), 0.0, user=UserId("ann"))
        audit = Audit(name, "completions", 0.0, key=key, model="m")
        ticket = Ticket(
            name,
            PoolName("p"),
            TenantId("acme"),
            KeyId("k1"),
            PriorityClass.STANDARD,
            5,
            max_tokens,
        )
        parsed: Any = SimpleNamespace(choices=1, n=1, fields=BODY, prompt_token_ids=tokens)
        terms: Any = None
        prepared = Prepared(ticket, terms, parsed, "", TokenEstimate(5, 5), 5, None)
        return audit, prepared

    async def reserve(self, max_tokens: int) -> tuple[Audit, Reserved]:
        audit, prepared = self.request(max_tokens)
        fare = self.money.fare(audit, prepared)
        assert fare is not None
        answer = self.money.reserve(fare)
        if not isinstance(answer, Reserved):
            answer = await self.money.fetch(fare, answer)
        return audit, answer

    @property
    def purse(self) -> Account:
        [account] = self.link.purses.state(recalled=[TENANT]).accounts
        return account


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control answers at once, or refuses: on a busy machine that may take a while."""
    monkeypatch.setattr("serve_app.contact.PATIENCE_S", 3600.0)
    for name in ("EXCHANGE_TIMEOUT_S", "BELL_TIMEOUT_S"):
        monkeypatch.setattr(f"serve_app.purse_link.{name}", 3600.0)


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    made = Site(10_000)
    made.link.start()
    yield made
    await made.link.stop()


async def test_nothing_is_reserved_without_a_budget_or_without_a_price(site: Site) -> None:
    audit, prepared = site.request(10)
    site.link.list = BudgetList(2, frozenset({USER._replace(id="acme/bob")}))
    assert site.money.fare(audit, prepared) is None
    site.link.list = BudgetList(3, frozenset({TENANT}))
    site.money._books.prices = PriceBook(2)
    assert site.money.fare(audit, prepared) is None


async def test_the_most_that_a_request_can_cost_is_reserved_of_every_budget(site: Site) -> None:
    site.link.list = BudgetList(2, frozenset({TENANT, USER}))
    audit, prepared = site.request(10)
    fare = site.money.fare(audit, prepared)
    assert fare is not None
    assert set(fare.keys) == {TENANT, USER}
    assert fare.most == 100 + PROMPT + 10 * 10
    exact = site.money.fare(*site.request(10, tokens=7))
    assert exact is not None
    assert exact.most == 100 + 7 + 10 * 10


async def test_a_completed_request_costs_what_the_engine_counted(site: Site) -> None:
    audit, reserved = await site.reserve(10)
    audit.charge = charge(price_version=1)
    audit.outcome = Outcome.COMPLETED
    audit.delivery.usage = Usage(6, 0, 3)
    site.money.settle(audit)
    site.money.settle(audit)
    seen = record(charge(request_id=audit.request_id))
    site.money.acknowledge([encode(seen)])
    assert site.purse.released == 100 + 6 + 30
    assert reserved.amount > site.purse.released


async def test_a_request_that_no_engine_saw_costs_nothing(site: Site) -> None:
    audit, _ = await site.reserve(10)
    site.money.settle(audit)
    assert not site.link.purses.unreleased
    assert site.purse.released == 0


async def test_a_cut_off_request_keeps_what_the_engine_may_still_bill(site: Site) -> None:
    audit, reserved = await site.reserve(10)
    audit.charge = charge(price_version=1)
    audit.outcome = Outcome.CANCELLED
    audit.delivery.output_tokens = 2
    site.money.settle(audit)
    seen = record(charge(request_id=audit.request_id))
    site.money.acknowledge([encode(seen)])
    assert site.purse.released == 100 + PROMPT + 20
    assert site.link.purses.unreleased
    site.now_s += LINGER_S
    site.link.purses.expire(site.link.now_s(), 0.0)
    assert not site.link.purses.unreleased
    assert reserved.amount == 100 + PROMPT + 100


async def test_what_an_engine_says_of_one_attempt_lets_go_of_nothing(site: Site) -> None:
    audit, _ = await site.reserve(10)
    of = charge(request_id=audit.request_id)
    site.money.acknowledge([encode(record(of, Witness.ENGINE))])
    audit.charge = of
    audit.delivery.usage = Usage(6, 0, 3)
    site.money.settle(audit)
    assert site.purse.released == 0
    site.money.acknowledge([encode(record(of, Witness.ENGINE, attempt=2))])
    assert site.purse.released == 0
    site.money.acknowledge([encode(record(of))])
    assert site.purse.released == 100 + 6 + 30


async def test_a_request_whose_record_is_lost_is_let_go_of_after_a_while(site: Site) -> None:
    audit, _ = await site.reserve(10)
    audit.charge = charge(request_id=audit.request_id)
    audit.delivery.usage = Usage(6, 0, 3)
    site.money.settle(audit)
    site.control.away = True
    site.money.lose([encode(record(audit.charge))])
    site.now_s += 2 * LINGER_S
    site.link.purses.expire(site.link.now_s(), 0.0)
    assert site.purse.released == 0, "nobody knows what the ledger has"
    site.control.away = False
    async with asyncio.timeout(120):
        while site.link.purses.awaits_ledger:  # noqa: ASYNC110  # another task's
            await asyncio.sleep(0.01)
    site.now_s += LINGER_S
    site.link.purses.expire(site.link.now_s(), 0.0)
    assert site.purse.released == 100 + 6 + 30
    assert not site.link.purses.unreleased


async def test_an_answer_is_as_long_as_what_is_left_pays_for(site: Site) -> None:
    _, reserved = await site.reserve(100_000)
    audit, prepared = site.request(100_000)
    fare = site.money.fare(audit, prepared)
    assert fare is not None
    assert reserved.amount == 100 + PROMPT + 5120, "512 tokens, for an eighth is less"
    assert fare.output_tokens(reserved.amount) == 512
    _, second = await site.reserve(100_000)
    assert 16 <= fare.output_tokens(second.amount) < 512, "what is left"


async def test_a_part_of_a_large_budget_is_enough_for_a_large_answer() -> None:
    site = Site(10**9)
    site.link.start()
    _, reserved = await site.reserve(100_000)
    assert reserved.amount == 100 + PROMPT + 1_000_000, "of a budget never heard of before"
    await site.link.stop()


async def test_spent_reserved_and_unknown_are_told_apart(site: Site) -> None:
    await site.reserve(512)
    await site.reserve(400)
    with pytest.raises(ApiError) as busy:
        await site.reserve(512)
    assert (busy.value.code, busy.value.retry_after_s) == ("budget_reserved", 1.0)

    site.control.spent = 10_000
    site.now_s += 2.0
    with pytest.raises(ApiError) as over:
        await site.reserve(512)
    assert (over.value.status, over.value.code) == (429, "insufficient_quota")
    assert (b"x-should-retry", b"false") in over.value.headers()

    site.control.away = True
    site.now_s += 2.0
    with pytest.raises(ApiError) as unknown:
        await site.reserve(512)
    assert (unknown.value.status, unknown.value.code) == (503, "limits_unavailable")
    reasons = [("tenant", "reserved"), ("tenant", "spent"), ("", "unavailable")]
    assert site.refused == reasons


async def test_lacking_is_not_waited_for_on_the_fast_path(site: Site) -> None:
    fare = site.money.fare(*site.request(10))
    assert fare is not None
    assert isinstance(site.money.reserve(fare), Lacking)


async def test_a_key_that_took_anothers_place_spends_that_ones_budget(site: Site) -> None:
    site.link.list = BudgetList(2, frozenset({BudgetKey(BudgetScope.KEY, "k0")}))
    audit, prepared = site.request(100)
    assert site.money.fare(audit, prepared) is None
    assert audit.key is not None
    audit.key = replace(audit.key, account=KeyId("k0"))
    fare = site.money.fare(audit, prepared)
    assert fare is not None
    assert fare.keys == (BudgetKey(BudgetScope.KEY, "k0"),)


async def test_a_tags_budget_pays_for_what_bears_the_tag_and_is_its_tenants_own(
    site: Site,
) -> None:
    tag = BudgetKey(BudgetScope.TAG, "acme/nightly")
    site.link.list = BudgetList(2, frozenset({TENANT, tag}))
    audit, prepared = site.request(5)
    audit.tag = "nightly"
    fare = site.money.fare(audit, prepared)
    assert fare is not None
    assert set(fare.keys) == {TENANT, tag}
    audit.tag = "other"
    fare = site.money.fare(audit, prepared)
    assert fare is not None
    assert set(fare.keys) == {TENANT}
    site.link.list = BudgetList(3, frozenset({BudgetKey(BudgetScope.TAG, "rival/nightly")}))
    audit.tag = "nightly"
    assert site.money.fare(audit, prepared) is None


async def stream_of(site: Site, max_tokens: int) -> tuple[Audit, Cap]:
    """Reserve for a stream as the router does; return what may grow."""
    audit, prepared = site.request(max_tokens)
    fare = site.money.fare(audit, prepared)
    assert fare is not None
    answer = site.money.reserve(fare)
    if not isinstance(answer, Reserved):
        answer = await site.money.fetch(fare, answer)
    audit.charge = charge(price_version=1)
    return audit, site.money.tranches(fare, answer, max_tokens)


async def come(cap: Cap, tokens: int) -> None:
    """Let frames come up to so many tokens, as fast as Control answers."""
    for _ in range(200):
        cap.on_tokens(tokens)
        await asyncio.sleep(0.001)


async def test_a_stream_is_extended_before_its_end_while_there_is_money() -> None:
    site = Site(100 + PROMPT + 10 * 1500)
    site.link.start()
    audit, cap = await stream_of(site, 100_000)
    raised: list[int] = []
    cap.on_raise = raised.append
    assert cap.tokens == 512
    await come(cap, 100)
    assert raised == [], "it is far from its end"
    await come(cap, 300)
    assert raised == [1024]
    await come(cap, 800)
    assert raised == [1024, 1500], "what is left of the budget"
    await come(cap, 1499)
    assert cap.tokens == 1500
    audit.delivery.usage = Usage(PROMPT, 0, 1500)
    site.money.settle(audit)
    site.money.acknowledge([encode(record(charge(request_id=audit.request_id)))])
    assert site.purse.released == site.purse.granted == 100 + PROMPT + 10 * 1500
    await site.link.stop()


async def test_a_stream_is_extended_to_what_it_asked_for_and_no_further() -> None:
    site = Site(10**6)
    site.link.start()
    _, cap = await stream_of(site, 100_000)
    first = cap.tokens
    await come(cap, first)
    assert cap.tokens == first + 512
    site.money._tranches.clear()
    small, short = await stream_of(site, 600)
    assert short.tokens >= 600, "all of it is reserved at once where there is enough"
    site.money.settle(small)
    await site.link.stop()


async def test_money_that_comes_free_while_a_stream_runs_extends_it() -> None:
    site = Site(2 * (100 + PROMPT) + 10 * 1024)
    site.link.start()
    other, _ = await stream_of(site, 512)
    audit, cap = await stream_of(site, 2000)
    await come(cap, 400)
    assert cap.tokens == 512, "another request has the rest"
    other.charge = None
    site.money.settle(other)
    site.now_s += 2.0
    await come(cap, 500)
    assert cap.tokens > 1000
    site.money.settle(audit)
    await site.link.stop()


async def test_a_stream_that_ended_asks_for_nothing_more() -> None:
    site = Site(10**6)
    site.link.start()
    audit, cap = await stream_of(site, 100_000)
    raised: list[int] = []
    cap.on_raise = raised.append
    site.control.away = True
    cap.on_tokens(cap.tokens)
    audit.delivery.usage = Usage(PROMPT, 0, 100)
    site.money.settle(audit)
    site.control.away = False
    await come(cap, cap.tokens)
    assert raised == []
    assert not site.link.purses.open_requests
    await site.link.stop()


@pytest.mark.parametrize("seed", range(5))
async def test_streams_that_grow_never_cost_more_than_there_is(seed: int) -> None:
    """Engines that go on to their caps at once, clients that leave, answers that end early."""
    chance = random.Random(seed)
    amount = chance.randint(20_000, 200_000)
    site = Site(amount)
    site.link.start()
    cost = 0

    async def one() -> None:
        nonlocal cost
        try:
            audit, cap = await stream_of(site, chance.randint(16, 4000))
        except ApiError:
            return
        wanted, made = chance.randint(1, 4000), 0
        while made < min(wanted, cap.tokens):
            made = min(wanted, cap.tokens, made + chance.randint(1, 400))
            cap.on_tokens(made)
            await asyncio.sleep(0)
        left = chance.random() < 0.2
        # Who leaves is billed what the engine made until it heard of it: up to the cap.
        made = cap.tokens if left else made
        cost += RATES.cost_nanousd(Usage(PROMPT, 0, made))
        audit.delivery.usage = Usage(PROMPT, 0, made)
        site.money.settle(audit)

    await asyncio.gather(*(one() for _ in range(40)))
    assert 0 < cost <= amount
    assert site.purse.granted <= amount
    await site.link.stop()
