"""The disaster of docs/runbooks/disaster.md: all processes and the database gone at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import func, select

from serve_app.ledger.database import Database
from serve_app.ledger.schema import USAGE_EVENT
from tests.e2e.waiting import until
from tests.postgres import PATIENTLY, fresh_database, running_postgres
from tests.runbook import blocks, libpq, run_block
from tests.stack import ROOT, Stack, running_stack

# What the runbook allows for the ledger and the start of Headrace; nodes and models come on top.
RTO_S = 5 * 60.0
BACKUP = blocks("backup.md")
BEFORE, SINCE = 20, 7


def document(database: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "sim.yaml").read_text())
    found["applications"][0]["args"]["database"] = database
    return found


def make_key(stack: Stack, name: str) -> str:
    """Make a key and wait until the routers know it."""
    made = stack.http().post("/admin/keys", json={"name": name, "tenant": "acme"})
    key = str(made.raise_for_status().json()["key"])
    with stack.http(key) as client:
        until(lambda: client.get("/v1/models").status_code == 200, f"{name} is known")
    return key


def ask(stack: Stack, key: str, times: int = 1) -> list[int]:
    body = {"model": "sim", "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}]}
    with stack.http(key) as client:
        return [client.post("/v1/chat/completions", json=body).status_code for _ in range(times)]


def requests_in(url: str) -> int:
    """Return how many requests the ledger has."""
    database = Database(url)
    with database.snapshot() as connection:
        of = func.count(func.distinct(USAGE_EVENT.c.request_id))
        found = connection.execute(select(of)).scalar_one()
    database.close()
    return int(found)


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_everything_lost_comes_back_from_the_backup_in_the_stated_time(tmp_path: Path) -> None:
    with (
        running_postgres() as cluster,
        fresh_database(cluster, "headrace") as url,
        running_stack(document(url)) as stack,
    ):
        key = make_key(stack, "before")
        assert ask(stack, key, BEFORE) == [200] * BEFORE
        until(lambda: requests_in(url) == BEFORE, "the ledger has them")
        run_block(BACKUP["postgresql-backup"], tmp_path, libpq(url))
        younger = make_key(stack, "since")
        assert ask(stack, younger, SINCE) == [200] * SINCE
        until(lambda: requests_in(url) == BEFORE + SINCE, "the ledger has these too")
    # Every process has ended, journals and database are gone. Only the dump is left.
    lost_at_s = time.monotonic()
    with running_postgres() as cluster, fresh_database(cluster, "other") as other:
        run_block(BACKUP["postgresql-restore"], tmp_path, libpq(other))
        restored = cluster + "headrace_restored" + PATIENTLY
        (tmp_path / "ledger.yaml").write_text(yaml.safe_dump(document("postgresql+psycopg://")))
        checked = run_block(BACKUP["postgresql-check"], tmp_path, libpq(restored))
        verified_after_s = time.monotonic() - lost_at_s
        with running_stack(document(restored)) as stack:
            assert ask(stack, key) == [200]
            served_after_s = time.monotonic() - lost_at_s
            assert ask(stack, younger) == [401]
            until(lambda: requests_in(restored) == BEFORE + 1, "what was and what is new")
    print(f"\nledger restored and checked after {verified_after_s:.1f} s")
    print(
        f"first response after {served_after_s:.1f} s, Headrace's own start {stack.start_s:.1f} s"
    )
    assert "acme" in checked
    assert served_after_s < RTO_S
