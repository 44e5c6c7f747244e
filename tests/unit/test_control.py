"""Control: what its tasks do beside each other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from serve_app.changes import PROGRAM
from serve_app.config import ControlArgs, ControlLinkSettings
from serve_app.core.budget import Balance
from serve_app.keys import KeyWish
from serve_app.ledger.budgets import BudgetStore
from serve_app.ledger.database import Database
from serve_app.ledger.store import KeyStore
from tests.stack import ROOT


@pytest.mark.slow
async def test_a_long_look_at_budgets_does_not_delay_a_revocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve_app.control import Control  # imports Ray

    looking, go = threading.Event(), threading.Event()

    def long(_: BudgetStore) -> Sequence[Balance]:
        looking.set()
        go.wait(30)
        return []

    monkeypatch.setattr(BudgetStore, "balances", long)
    monkeypatch.setattr("serve_app.treasury.ALERTS_PERIOD_S", 0.0)
    monkeypatch.setattr("serve_app.control.configure", lambda stream: None)
    url = f"sqlite:///{tmp_path}/books.db"
    with closing(Database(url)) as database:
        keys = KeyStore(database)
        _, record = keys.create(KeyWish(name="mine"), PROGRAM)
        control = Control.__new__(Control)
        go.set()
        journal = {"folder": str(tmp_path / "journal")}
        await control.__init__(  # type: ignore[misc]  # as Serve does
            {"database": url, "journal": journal, "follow_period_s": 0.05}
        )
        go.clear()
        looking.clear()
        try:
            assert await asyncio.to_thread(looking.wait, 10)
            before = control._table.version
            keys.revoke(record.key_id, PROGRAM)
            async with asyncio.timeout(5):
                while control._table.version == before:  # noqa: ASYNC110  # its own task's
                    await asyncio.sleep(0.01)
        finally:
            go.set()
            control._watch.cancel()
            await asyncio.gather(control._watch, return_exceptions=True)
            for each in (control._following, control._costs, control._sweeper):
                await each.stop()
            control._database.close()


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
