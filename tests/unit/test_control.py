"""Control: what its tasks do beside each other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from serve_app.changes import PROGRAM
from serve_app.config import ControlArgs, ControlLinkSettings
from serve_app.core.budget import Balance, Budget, BudgetKey, BudgetScope, Window
from serve_app.core.pricing import RateCard, Rates
from serve_app.errors import StoreUnavailable
from serve_app.keys import KeyWish
from serve_app.ledger.budgets import BudgetStore
from serve_app.ledger.database import Database
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.store import KeyStore
from serve_app.telemetry.uplink import Heartbeat
from tests.stack import ROOT

if TYPE_CHECKING:
    from serve_app.control import Control


@asynccontextmanager
async def control_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, follow_period_s: float
) -> AsyncIterator[Control]:
    """Run Control in this process, with a database ``books.db`` of its own."""
    from serve_app.control import Control  # imports Ray

    monkeypatch.setattr("serve_app.control.configure", lambda stream: None)
    control = Control.__new__(Control)
    args = {
        "database": f"sqlite:///{folder}/books.db",
        "journal": {"folder": str(folder / "journal")},
        "follow_period_s": follow_period_s,
    }
    await control.__init__(args)  # type: ignore[misc]  # as Serve does
    try:
        yield control
    finally:
        control._watch.cancel()
        await asyncio.gather(control._watch, return_exceptions=True)
        for each in (control._following, control._costs, control._sweeper):
            await each.stop()
        control._database.close()


@pytest.mark.slow
async def test_a_long_look_at_budgets_does_not_delay_a_revocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, go = threading.Event(), threading.Event()

    def long(_: BudgetStore) -> Sequence[Balance]:
        looking.set()
        go.wait(120)
        return []

    monkeypatch.setattr(BudgetStore, "balances", long)
    monkeypatch.setattr("serve_app.treasury.ALERTS_PERIOD_S", 0.0)
    with closing(Database(f"sqlite:///{tmp_path}/books.db")) as database:
        keys = KeyStore(database)
        _, record = keys.create(KeyWish(name="mine"), PROGRAM)
        go.set()
        async with control_of(tmp_path, monkeypatch, 0.05) as control:
            go.clear()
            looking.clear()
            try:
                assert await asyncio.to_thread(looking.wait, 120)
                before = control._table.version
                keys.revoke(record.key_id, PROGRAM)
                async with asyncio.timeout(60):
                    while control._table.version == before:  # noqa: ASYNC110  # its own task's
                        await asyncio.sleep(0.01)
            finally:
                go.set()


@pytest.mark.slow
async def test_no_key_is_known_before_the_budgets_and_prices_that_were_set_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sets a budget on the command line and then makes a key must not get free answers."""
    key = BudgetKey(BudgetScope.TENANT, "acme")
    async with control_of(tmp_path, monkeypatch, 10.0) as control:
        beat = Heartbeat("r1", "router", keys_version=-1, prices_version=-1, budgets_version=-1)
        await control._following.stop()
        before = await control.heartbeat(beat)
        with closing(Database(f"sqlite:///{tmp_path}/books.db")) as database:
            BudgetStore(database).put(Budget(key, 10**9, Window.NONE), PROGRAM)
            prices = PriceStore(database).replace([RateCard("all", Rates(1))], "", PROGRAM)
        _, record = await control.create_key(KeyWish(name="mine", tenant="acme"), PROGRAM)
        after = await control.heartbeat(beat)
        assert before.budgets is not None
        assert key not in before.budgets.keys
        assert record in (after.keys or ())
        assert after.budgets is not None
        assert key in after.budgets.keys
        assert after.prices is not None
        assert after.prices.version == prices


@pytest.mark.slow
async def test_keys_are_known_though_budgets_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: BudgetStore) -> int:
        raise StoreUnavailable("no such table")

    async with control_of(tmp_path, monkeypatch, 10.0) as control:
        monkeypatch.setattr(BudgetStore, "version", away)
        _, record = await control.create_key(KeyWish(name="mine"), PROGRAM)
        tables = await control.heartbeat(Heartbeat("r1", "router", keys_version=-1))
        assert record in (tables.keys or ())


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda each: each.stem
)
def test_a_revocation_waits_for_less_than_two_seconds_of_periods(file: Path) -> None:
    """On the command line: until Control looks, then until a router's heartbeat."""
    text = file.read_text()
    assert "follow_period_s" not in text
    assert "heartbeat_period_s" not in text
    looks_s = ControlArgs.model_fields["follow_period_s"].default
    beats_s = ControlLinkSettings.model_fields["heartbeat_period_s"].default
    assert looks_s + beats_s <= 1.5
