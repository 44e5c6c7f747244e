"""The ledger: each record once, priced exactly, never changed, and it adds up."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
from sqlalchemy import func, select, text, update

from serve_app.changes import Actor, ChangeQuery, Reversal, Via
from serve_app.core.budget import Budget, BudgetKey, BudgetScope, Window
from serve_app.core.pricing import RateCard, Rates
from serve_app.core.types import Outcome, PriorityClass, TenantId
from serve_app.ledger.budgets import BudgetStore
from serve_app.ledger.database import Database
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.schema import SUMS, USAGE_EVENT, USAGE_RECONCILIATION, USAGE_ROLLUP
from serve_app.ledger.trail import Trail
from serve_app.ledger.usage import Committed, UsageLedger
from serve_app.ledger.verify import verify
from serve_app.usage import Witness
from tests.usage_records import HOUR_S, START_S, charge, record, request_id, traffic

RATES = Rates(input_nanousd=10, cached_input_nanousd=1, output_nanousd=100, request_nanousd=7)
# 12 fresh, 8 cached, 5 out.
PRICE = 7 + 120 + 8 + 500


@pytest.fixture
def prices(database: Database) -> PriceStore:
    store = PriceStore(database)
    cards = [
        RateCard("any", RATES),
        RateCard("large", Rates(50, 5, 200, 0), model="large"),
        RateCard("flex", Rates(5, 1, 50, 0), priority_class=PriorityClass.SHEDDABLE),
        RateCard("acme", Rates(9, 9, 9, 9), tenant=TenantId("bolt"), model="large"),
    ]
    assert store.replace(cards, "test") == 1
    return store


@pytest.fixture
def ledger(database: Database, prices: PriceStore) -> UsageLedger:
    return UsageLedger(database, prices, lambda: 99.0)


def rows(database: Database) -> list[Any]:
    order = (USAGE_EVENT.c.request_id, USAGE_EVENT.c.attempt, USAGE_EVENT.c.witness)
    with database.transaction() as connection:
        return list(connection.execute(select(USAGE_EVENT).order_by(*order)))


def total(database: Database, column: str) -> int:
    """Return a sum over the rollups."""
    with database.transaction() as connection:
        found = connection.execute(select(func.sum(USAGE_ROLLUP.c[column]))).scalar()
        return int(found or 0)


def agrees(database: Database) -> bool:
    findings = verify(database)
    assert findings.lines == []
    return findings.differences == 0


PAID = charge(price_version=1)
BUDGETED = (
    *(BudgetKey(BudgetScope.TENANT, name) for name in ("acme", "bolt", "coil")),
    *(BudgetKey(BudgetScope.USER, name) for name in ("acme/ann", "bolt/bob")),
    *(BudgetKey(BudgetScope.KEY, name) for name in ("k1", "k2")),
    BudgetKey(BudgetScope.TAG, "coil/batch-7"),
)


def test_an_event_keeps_what_was_seen_and_what_it_cost(
    ledger: UsageLedger, database: Database
) -> None:
    of = charge(
        3,
        START_S + 2 * HOUR_S + 5,
        price_version=1,
        user="ann",
        tag="t",
        client_label="mine",
        endpoint="completions",
    )
    seen = record(
        of,
        attempt=2,
        replica="r1",
        finish_reason="stop",
        degraded="rung1",
        queued_s=0.5,
        first_token_s=0.7,
        token_interval_s=0.01,
        duration_s=1.5,
    )
    assert ledger.commit([seen]) == Committed(1, 0)
    [row] = rows(database)
    assert (row.request_id, row.attempt, row.witness) == (of.request_id, 2, "router")
    assert (row.hour, row.arrived_at_s) == (START_S + 2 * HOUR_S, START_S + 2 * HOUR_S + 5)
    assert (row.tenant, row.user_id, row.key_id, row.tag) == ("acme", "ann", "k1", "t")
    assert (row.client_label, row.replica, row.degraded) == ("mine", "r1", "rung1")
    assert (row.prompt_tokens, row.cached_prompt_tokens, row.output_tokens) == (20, 8, 5)
    assert (row.first_token_s, row.token_interval_s, row.recorded_at_s) == (0.7, 0.01, 99.0)
    assert (row.price_version, row.card, row.amount_nanousd) == (1, "any", PRICE)
    assert agrees(database)


def test_a_record_that_comes_again_changes_nothing(ledger: UsageLedger, database: Database) -> None:
    assert ledger.commit([record(PAID), record(PAID)]) == Committed(1, 1)
    assert ledger.commit([record(PAID)]) == Committed(0, 1)
    assert len(rows(database)) == 1
    assert total(database, "amount_nanousd") == PRICE


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_witnesses_of_a_request_make_one_bill_in_any_order(
    ledger: UsageLedger, database: Database, order: tuple[int, ...]
) -> None:
    """Sent away by one replica, served by the next, left by the client after three tokens."""
    seen = [
        record(PAID, Witness.ENGINE, outcome=Outcome.FAILED.value, output_tokens=2),
        record(PAID, Witness.ENGINE, attempt=2, outcome=Outcome.CANCELLED.value),
        record(
            PAID,
            attempt=2,
            outcome=Outcome.CANCELLED.value,
            exact=False,
            prompt_tokens=31,
            cached_prompt_tokens=0,
            output_tokens=3,
        ),
    ]
    for index in order:
        ledger.commit([seen[index]])
    assert total(database, "amount_nanousd") == PRICE
    assert (total(database, "requests"), total(database, "billed_requests")) == (1, 1)
    assert total(database, "delivered_tokens") == 3
    assert total(database, "generated_tokens") == 7
    assert (total(database, "wasted_tokens"), total(database, "wasted_nanousd")) == (4, 400)
    assert agrees(database)


def test_reconciliation_shows_both_witnesses_of_a_request(
    ledger: UsageLedger, database: Database
) -> None:
    left = charge(2, price_version=1)
    ledger.commit(
        [
            record(PAID),
            record(PAID, Witness.ENGINE),
            record(left, outcome="cancelled", output_tokens=5),
            record(left, Witness.ENGINE, outcome="cancelled", output_tokens=9),
        ]
    )
    with database.transaction() as connection:
        query = select(USAGE_RECONCILIATION).order_by(text("request_id"))
        first, second = connection.execute(query)
    assert (first.router_rows, first.engine_rows, first.wasted_tokens) == (1, 1, 0)
    assert (second.outcome, second.delivered_tokens) == ("cancelled", 5)
    assert (second.generated_tokens, second.wasted_tokens, second.wasted_nanousd) == (9, 4, 400)


def test_prices_that_change_change_no_settled_row_and_no_open_request(
    ledger: UsageLedger, database: Database, prices: PriceStore
) -> None:
    ledger.commit([record(PAID)])
    before = rows(database)
    assert prices.replace([RateCard("any", Rates(1000, 1000, 1000, 1000))], "dearer") == 2
    late = charge(5, price_version=1)
    ledger.commit([record(PAID, Witness.ENGINE), record(late), record(charge(6, price_version=2))])
    after = rows(database)
    assert before[0] in after
    amounts = {row.request_id: row.amount_nanousd for row in after if row.witness == "router"}
    assert amounts[PAID.request_id] == amounts[late.request_id] == PRICE
    assert amounts[request_id(number=6)] == 26_000
    assert agrees(database)


def test_a_correction_is_a_row_that_takes_back_and_nothing_else_changes(
    ledger: UsageLedger, database: Database
) -> None:
    ledger.commit([record(PAID)])
    [before] = rows(database)
    by = Actor("key k7f3m2qa", Via.HTTP)
    assert ledger.reverse(PAID.request_id, "goodwill", by) == Reversal(PAID.request_id, PRICE, True)
    assert ledger.reverse(PAID.request_id, "again", by) == Reversal(PAID.request_id, 0, False)
    assert ledger.reverse("req_unknown", "what?", by) is None
    correction, kept = rows(database)
    assert kept == before
    assert (correction.witness, correction.note) == ("operator", "goodwill")
    assert (correction.amount_nanousd, correction.requests) == (-PRICE, 0)
    assert total(database, "amount_nanousd") == total(database, "billed_output_tokens") == 0
    assert total(database, "requests") == 1
    assert agrees(database)
    [told] = Trail(database).changes(ChangeQuery(subject="request"))
    assert (told.actor, told.action, told.note) == (by, "usage.reverse", "goodwill")
    assert told.subject == f"request {PAID.request_id}"
    assert told.before is not None
    assert told.after is not None
    assert (told.before["output_tokens"], told.before["amount_usd"]) == (5, "0.000000635")
    assert (told.after["output_tokens"], told.after["amount_usd"]) == (0, "0")


def test_a_free_request_is_taken_back_once_too(ledger: UsageLedger, database: Database) -> None:
    free = charge(4)
    ledger.commit([record(free)])
    assert ledger.reverse(free.request_id, "why") == Reversal(free.request_id, 0, True)
    assert ledger.reverse(free.request_id, "why") == Reversal(free.request_id, 0, False)
    assert total(database, "billed_requests") == 0
    assert agrees(database)


def test_what_is_taken_back_can_be_spent_again(ledger: UsageLedger, database: Database) -> None:
    budgets = BudgetStore(database, lambda: START_S)
    budgets.put(Budget(BudgetKey(BudgetScope.TENANT, "acme"), 10**6, Window.MONTH))
    ledger.commit([record(PAID), record(charge(2, price_version=1))])
    assert budgets.balances()[0].spent_nanousd == 2 * PRICE
    ledger.reverse(PAID.request_id, "goodwill")
    assert budgets.balances()[0].spent_nanousd == PRICE


def test_two_who_take_back_at_once_take_back_once(
    database: Database, prices: PriceStore, ledger: UsageLedger
) -> None:
    ledger.commit([record(PAID)])
    found: list[Reversal | None] = []

    def take_back() -> None:
        found.append(UsageLedger(database, prices).reverse(PAID.request_id, "both"))

    threads = [threading.Thread(target=take_back) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.amount_nanousd for each in found if each is not None) == [0, 0, 0, PRICE]
    assert total(database, "amount_nanousd") == 0
    assert agrees(database)


def test_an_account_that_comes_after_a_correction_adds_its_difference_only(
    ledger: UsageLedger, database: Database
) -> None:
    ledger.commit([record(PAID, outcome="cancelled")])
    ledger.reverse(PAID.request_id, "goodwill")
    ledger.commit([record(PAID, Witness.ENGINE, outcome="cancelled", output_tokens=7)])
    assert total(database, "amount_nanousd") == 200
    assert ledger.reverse(PAID.request_id, "the rest") == Reversal(PAID.request_id, 200, True)
    assert agrees(database)


def test_a_price_version_that_is_unknown_loses_no_event(
    ledger: UsageLedger, database: Database
) -> None:
    ledger.commit([record(charge(price_version=17))])
    assert rows(database)[0].price_version == 1
    assert agrees(database)


def test_texts_that_a_column_does_not_take_hold_up_nobody(
    ledger: UsageLedger, database: Database
) -> None:
    odd = charge(user="a\0b" * 500, client_label="x" * 4000)
    ledger.commit([record(odd, reason="r" * 999), record(charge(1))])
    assert rows(database)[0].user_id.startswith("abab")
    assert agrees(database)


def test_an_id_that_tells_no_time_is_kept_under_hour_zero(
    ledger: UsageLedger, database: Database
) -> None:
    ledger.commit([record(charge(request_id="what-is-this"))])
    assert rows(database)[0].hour == 0
    assert agrees(database)


def test_rollups_can_be_made_anew(ledger: UsageLedger, database: Database) -> None:
    ledger.commit(list(traffic(300, price_version=1)))
    with database.transaction() as connection:
        connection.execute(update(USAGE_ROLLUP).values(amount_nanousd=1))
    assert verify(database).differences > 0
    assert ledger.rebuild() > 10
    assert agrees(database)


def test_writers_at_the_same_time_count_every_event_once(
    database: Database, prices: PriceStore
) -> None:
    records = list(traffic(400, price_version=1))
    new: list[int] = []

    def write(part: int) -> None:
        ledger = UsageLedger(database, prices)
        # Everyone writes everything, each from another place on.
        turned = records[part * 100 :] + records[: part * 100]
        for start in range(0, len(turned), 50):
            new.append(ledger.commit(turned[start : start + 50]).new)

    threads = [threading.Thread(target=write, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = {(r.charge.request_id, r.attempt, r.witness) for r in records}
    assert sum(new) == len(names) == len(rows(database))
    assert agrees(database)


PLANTS = {
    "a row's amount": "UPDATE usage_event SET amount_nanousd = amount_nanousd + 1",
    "a row's rate": "UPDATE usage_event SET output_rate_nanousd = output_rate_nanousd + 1",
    "what a witness saw": "UPDATE usage_event SET output_tokens = output_tokens + 1",
    "an event lost": "DELETE FROM usage_event WHERE witness = 'router'",
    "a rollup's amount": "UPDATE usage_rollup SET amount_nanousd = amount_nanousd - 1",
    "a rollup lost": "DELETE FROM usage_rollup",
    "a rollup of nothing": "UPDATE usage_rollup SET tag = 'other'",
    "an hour": "UPDATE usage_event SET hour = hour + 3600",
    "a price version": "UPDATE usage_event SET price_version = 77",
}


@pytest.mark.parametrize("plant", PLANTS.values(), ids=list(PLANTS))
def test_whatever_is_changed_behind_its_back_is_found(
    ledger: UsageLedger, database: Database, plant: str
) -> None:
    ledger.commit([record(PAID), record(PAID, Witness.ENGINE)])
    assert agrees(database)
    with database.transaction() as connection:
        connection.execute(text(plant))
    findings = verify(database)
    assert findings.differences > 0
    assert findings.lines


@pytest.mark.parametrize(
    "requests",
    [
        pytest.param(50_000, id="1e5 events", marks=pytest.mark.slow),
        pytest.param(
            500_000, id="1e6 events", marks=(pytest.mark.proof, pytest.mark.timeout(7200))
        ),
    ],
)
def test_events_rollups_and_budgets_do_not_drift_by_a_nano_dollar(
    ledger: UsageLedger, database: Database, requests: int
) -> None:
    if requests == 50_000 and not database.is_sqlite:
        # A tenth says as much of another database; the proof has all of them.
        requests = 5_000
    budgets = BudgetStore(database, lambda: START_S + 3 * HOUR_S)
    for key in BUDGETED:
        budgets.put(Budget(key, 10**15, Window.MONTH))
    records = traffic(requests, seed=requests, price_version=1)
    written = 0
    while batch := list(itertools.islice(records, 2000)):
        written += ledger.commit(batch).new
    findings = verify(database)
    assert findings.lines == []
    assert (findings.differences, findings.events) == (0, written)
    assert findings.requests == requests
    assert total(database, "requests") == requests
    sums = {name: total(database, name) for name in SUMS}
    ledger.rebuild()
    assert sums == {name: total(database, name) for name in SUMS}
    assert findings.amount_nanousd == sums["amount_nanousd"] > requests * 10**5
    # Budgets, from the events themselves, added up by nobody but this test.
    amounts = dict.fromkeys(BUDGETED, 0)
    names = ("tenant", "user_id", "key_id", "tag", "amount_nanousd")
    with database.transaction() as connection:
        for row in connection.execute(select(*(USAGE_EVENT.c[name] for name in names))):
            for key in (
                BudgetKey(BudgetScope.TENANT, row.tenant),
                BudgetKey(BudgetScope.USER, f"{row.tenant}/{row.user_id}"),
                BudgetKey(BudgetScope.KEY, row.key_id),
                BudgetKey(BudgetScope.TAG, f"{row.tenant}/{row.tag}"),
            ):
                if key in amounts:
                    amounts[key] += row.amount_nanousd
    spent = {each.budget.key: each.spent_nanousd for each in budgets.balances()}
    assert spent == amounts
    assert min(spent.values()) > 10**7
