"""A process's usage records: durable here or in the ledger, and sent on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from serve_app.errors import JournalUnavailable
from serve_app.journal import Journal
from serve_app.usage import decode
from serve_app.usage_log import UsageLog, journal_folder
from tests.usage_records import charge, record


@dataclass
class Settings:
    folder: str | None
    segment_bytes: int = 65_536
    segments: int = 4


class Ledger:
    """A sink that keeps what it was sent, and fails when told to."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []
        self.fails = False

    async def __call__(self, payloads: list[bytes]) -> None:
        if self.fails:
            raise ConnectionError("away")
        self.payloads += payloads


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
async def log(tmp_path: Path, ledger: Ledger) -> AsyncIterator[UsageLog]:
    made = UsageLog(Settings(str(tmp_path)), "router-1", ledger)
    yield made
    await made.stop()


async def test_what_was_appended_and_noted_is_in_the_ledger_when_it_has_stopped(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.usage_log.STOP_TIMEOUT_S", 300.0)
    log = UsageLog(Settings(str(tmp_path)), "router-1", ledger)
    log.start()
    await log.append(record(charge(1)))
    log.note(record(charge(2)))
    log.note(record(charge(3)))
    await log.stop()
    assert [decode(p).charge for p in ledger.payloads] == [charge(n) for n in (1, 2, 3)]
    assert log.backlog == 0


async def test_what_the_ledger_does_not_take_stays_on_the_disk_for_the_next(
    tmp_path: Path, ledger: Ledger
) -> None:
    ledger.fails = True
    log = UsageLog(Settings(str(tmp_path)), "router-1", ledger)
    log.start()
    await log.append(record())
    await log.stop()
    assert (ledger.payloads, log.backlog) == ([], 1)
    ledger.fails = False
    after = UsageLog(Settings(str(tmp_path)), "router-2", ledger)
    assert await after._sweeper.sweep() == 1
    assert decode(ledger.payloads[0]) == record()
    await after.stop()


async def test_a_record_that_the_disk_does_not_take_goes_to_the_ledger_at_once(
    log: UsageLog, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_disk(*_: object) -> int:
        raise JournalUnavailable("no disk")

    monkeypatch.setattr(Journal, "append", no_disk)
    await log.append(record())
    assert [decode(p) for p in ledger.payloads] == [record()]
    ledger.fails = True
    with pytest.raises(JournalUnavailable, match="neither journal nor ledger"):
        await log.append(record(charge(1)))


async def test_a_ledger_that_says_nothing_is_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_disk(*_: object) -> int:
        raise JournalUnavailable("no disk")

    async def silent(_: list[bytes]) -> None:
        await asyncio.sleep(3600)

    monkeypatch.setattr(Journal, "append", no_disk)
    monkeypatch.setattr("serve_app.usage_log.LEDGER_TIMEOUT_S", 0.01)
    log = UsageLog(Settings(str(tmp_path)), "router-1", silent)
    with pytest.raises(JournalUnavailable, match="TimeoutError"):
        async with asyncio.timeout(120):
            await log.append(record())
    await log.stop()


async def test_a_lost_record_is_told_of(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[bytes] = []
    monkeypatch.setattr("serve_app.usage_log.STOP_TIMEOUT_S", 300.0)
    log = UsageLog(Settings(str(tmp_path)), "router-1", ledger, lost.extend)
    real = Journal.submit

    def some(journal: Journal, payload: bytes) -> asyncio.Future[int]:
        if decode(payload) != record(charge(1)):
            return real(journal, payload)
        written: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        written.set_exception(JournalUnavailable("no disk"))
        return written

    monkeypatch.setattr(Journal, "submit", some)
    log.note(record(charge(1)))
    log.note(record(charge(2)))
    await log.stop()
    assert [decode(p) for p in lost] == [record(charge(1))]
    assert [decode(p) for p in ledger.payloads] == [record(charge(2))]


async def test_records_nobody_waits_for_share_a_sync(
    log: UsageLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[bytes] = []
    done = asyncio.Event()
    real = Journal.submit

    def spy(journal: Journal, payload: bytes) -> asyncio.Future[int]:
        submitted.append(payload)
        done.set()
        return real(journal, payload)

    monkeypatch.setattr(Journal, "submit", spy)
    for number in range(30):
        log.note(record(charge(number)))
    assert submitted == []
    await done.wait()
    assert [decode(p).charge for p in submitted] == [charge(n) for n in range(30)]


def test_the_folder_is_the_one_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_JOURNAL", raising=False)
    assert journal_folder(Settings(None)) == Path(".headrace/journal")
    monkeypatch.setenv("HEADRACE_JOURNAL", "/srv/books.journal")
    assert journal_folder(Settings(None)) == Path("/srv/books.journal")
    assert journal_folder(Settings("/var/own")) == Path("/var/own")
