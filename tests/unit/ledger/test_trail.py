"""The audit trail: a row for every change, in the change's own transaction, and no secret in it."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest
from sqlalchemy import select, text

from serve_app.changes import Actor, Change, ChangeQuery, Via
from serve_app.core.budget import Budget, BudgetKey, BudgetScope, Window
from serve_app.core.pricing import RateCard, Rates
from serve_app.errors import StoreUnavailable
from serve_app.keys import KeyWish
from serve_app.ledger.budgets import BudgetStore
from serve_app.ledger.database import Database
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.schema import ADMIN_CHANGE
from serve_app.ledger.store import KeyStore
from serve_app.ledger.trail import Trail

ANN = Actor("key k7f3m2qa", Via.HTTP)
BOB = Actor("bob@desk", Via.COMMAND)
ACME = BudgetKey(BudgetScope.TENANT, "acme")
BUDGET = Budget(ACME, 5 * 10**9, Window.MONTH, alert_ratios=(0.5,))


def told(database: Database, **wanted: object) -> list[Change]:
    return Trail(database).changes(ChangeQuery(**wanted))  # type: ignore[arg-type]


def test_a_key_made_and_revoked_is_two_rows_without_its_secret(database: Database) -> None:
    keys = KeyStore(database, lambda: 50.0)
    secret, record = keys.create(KeyWish("laptop", models=("small",)), ANN)
    keys.revoke(record.key_id, BOB)
    assert keys.revoke(record.key_id, BOB) is not None
    assert keys.revoke("nobody", BOB) is None
    revoked, made = told(database)
    assert (made.number, made.at_s, made.actor, made.action) == (1, 50.0, ANN, "key.create")
    assert made.subject == f"key {record.key_id}"
    assert made.before is None
    assert made.after is not None
    assert (made.after["models"], made.after["revoked_at_s"]) == (["small"], None)
    assert (revoked.number, revoked.actor, revoked.action) == (2, BOB, "key.revoke")
    assert revoked.before == made.after
    assert revoked.after == {**made.after, "revoked_at_s": 50.0}
    with database.transaction() as connection:
        kept = json.dumps([list(row) for row in connection.execute(select(ADMIN_CHANGE))])
    assert secret not in kept
    assert secret.rpartition("-")[2] not in kept
    assert record.digest.hex() not in kept


def test_every_change_of_a_key_says_when_it_was_made(database: Database) -> None:
    now_s = iter((50.0, 60.0, 70.0))
    keys = KeyStore(database, lambda: next(now_s))
    _, record = keys.create(KeyWish("laptop"), ANN)
    rotated = keys.rotate(record.key_id, 600.0, ANN)
    assert rotated is not None
    keys.revoke(record.key_id, BOB)
    assert [(each.action, each.at_s) for each in reversed(told(database))] == [
        ("key.create", 50.0),
        ("key.create", 60.0),
        ("key.rotate", 60.0),
        ("key.revoke", 70.0),
    ]


def test_budgets_and_credits_say_what_they_were_and_became(database: Database) -> None:
    budgets = BudgetStore(database, lambda: 60.0)
    budgets.put(BUDGET, ANN)
    budgets.put(BUDGET, ANN)  # as it is: no change
    budgets.add(ACME, 10**9, BOB)
    budgets.put(replace(BUDGET, hard=False), ANN)
    assert budgets.remove(ACME, BOB)
    assert not budgets.remove(ACME, BOB)
    assert budgets.add(ACME, 1, BOB) is None
    rows = told(database, subject="budget tenant acme")
    assert [(each.number, each.action) for each in reversed(rows)] == [
        (1, "budget.set"),
        (2, "budget.add"),
        (3, "budget.set"),
        (4, "budget.remove"),
    ]
    removed, softened, added, made = rows
    assert made.before is None
    assert made.after == {
        "amount_usd": "5",
        "window": "month",
        "rolling_hours": None,
        "alerts": [0.5],
        "hard": True,
    }
    assert added.before == made.after
    assert added.after == {**made.after, "amount_usd": "6"}
    assert softened.after == {**made.after, "hard": False}
    assert (removed.before, removed.after, removed.actor) == (softened.after, None, BOB)


def test_prices_are_told_by_version_and_only_where_they_change(database: Database) -> None:
    prices = PriceStore(database, lambda: 70.0)
    prices.replace([RateCard("all", Rates(1, 1, 1, 1))], "January", ANN)
    prices.replace([RateCard("all", Rates(1, 1, 1, 1))], "again", BOB)
    [row] = told(database, subject="prices")
    assert (row.actor, row.note) == (ANN, "January")
    assert (row.before, row.after) == ({"version": 0, "cards": 0}, {"version": 1, "cards": 1})


def test_limits_of_the_configuration_are_told_by_what_changed(database: Database) -> None:
    trail = Trail(database, lambda: 80.0)
    by = Actor("configuration", Via.CONFIGURATION)
    assert not trail.note_limits({}, by)
    first = {"tenants.acme.limits.concurrent": 4, "keys.k1.limits.requests_per_min": 60}
    assert trail.note_limits(first, by)
    assert not trail.note_limits(first, by), "another router says the same"
    assert trail.note_limits({"tenants.acme.limits.concurrent": 8}, by)
    assert trail.note_limits(first, by)
    assert not trail.note_limits(first, by)
    back, raised, _ = told(database, subject="limits")
    assert raised.before == first
    assert raised.after == {"tenants.acme.limits.concurrent": 8}
    assert (back.before, back.after) == (raised.after, first)


def test_a_change_that_cannot_be_told_of_is_not_made(database: Database) -> None:
    with database.transaction() as connection:
        connection.execute(text("DROP TABLE admin_change"))
    with pytest.raises(StoreUnavailable):
        BudgetStore(database).put(BUDGET, ANN)
    assert BudgetStore(database).every() == []


def test_a_page_goes_on_where_the_last_one_ended(database: Database) -> None:
    budgets = BudgetStore(database)
    for amount in range(1, 8):
        budgets.put(replace(BUDGET, amount_nanousd=amount), ANN if amount % 2 else BOB)
    budgets.put(Budget(BudgetKey(BudgetScope.TENANT, "acme_2"), 1, Window.NONE), ANN)
    assert [each.number for each in told(database, limit=3)] == [8, 7, 6]
    assert [each.number for each in told(database, limit=3, before=6)] == [5, 4, 3]
    assert [each.number for each in told(database, actor=BOB.name)] == [6, 4, 2]
    assert len(told(database, subject="budget tenant acme")) == 7, "and nobody's whose name goes on"
    assert len(told(database, subject="budget")) == 8
    assert told(database, subject="budget tenant") != []
    assert told(database, subject="budget tenant acm") == []


def test_changes_at_the_same_time_are_numbered_without_a_gap(database: Database) -> None:
    def change(part: int) -> None:
        for number in range(10):
            if part % 2:
                KeyStore(database).create(KeyWish(f"{part}-{number}"), BOB)
            else:
                key = BudgetKey(BudgetScope.TENANT, f"t{part}")
                BudgetStore(database).put(Budget(key, number + 1, Window.NONE), ANN)

    threads = [threading.Thread(target=change, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [each.number for each in told(database)] == list(range(40, 0, -1))
