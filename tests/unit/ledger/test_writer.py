"""The one writer: senders that come together share a commit, and each learns how it went."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence

import pytest

from serve_app.errors import StoreUnavailable
from serve_app.ledger.usage import Committed, UsageLedger
from serve_app.ledger.writer import LedgerWriter
from serve_app.usage import UsageRecord, encode
from tests.usage_records import charge, record


class Ledger(UsageLedger):
    """Keeps batches; the first waits until it is let go."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.go = threading.Event()
        self.fails = False

    def commit(self, records: Sequence[UsageRecord]) -> Committed:
        assert self.go.wait(120)
        if self.fails:
            raise StoreUnavailable("no database")
        self.batches.append(len(records))
        return Committed(len(records), 0)


def payload(number: int) -> bytes:
    return encode(record(charge(number)))


async def test_what_arrives_while_a_commit_runs_is_committed_together() -> None:
    ledger = Ledger()
    writer = LedgerWriter(ledger)
    tasks = [asyncio.create_task(writer.write([payload(0)]))]
    await asyncio.sleep(0)
    tasks += [asyncio.create_task(writer.write([payload(n)] * 2)) for n in range(1, 6)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    ledger.go.set()
    await asyncio.gather(*tasks)
    assert sum(ledger.batches) == 11
    assert len(ledger.batches) <= 2


async def test_senders_hear_that_nothing_was_committed_and_may_send_again() -> None:
    ledger = Ledger()
    ledger.go.set()
    ledger.fails = True
    writer = LedgerWriter(ledger)
    results = await asyncio.gather(
        *(writer.write([payload(n)]) for n in range(3)), return_exceptions=True
    )
    assert all(isinstance(result, StoreUnavailable) for result in results)
    ledger.fails = False
    await writer.write([payload(0)])
    assert ledger.batches == [1]


async def test_a_record_that_cannot_be_read_holds_up_nobody_and_is_kept_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ledger = Ledger()
    ledger.go.set()
    with caplog.at_level(logging.ERROR, "headrace.ledger"):
        await LedgerWriter(ledger).write([b"\xc1", payload(1)])
    assert ledger.batches == [1]
    assert "cannot be read" in caplog.text


def test_a_record_comes_back_as_it_was_written_and_a_newer_field_is_ignored() -> None:
    import msgspec

    from serve_app.usage import decode

    written = record(charge(user="ann"), reason="x", queued_s=0.5)
    assert decode(encode(written)) == written
    newer = msgspec.msgpack.decode(encode(written)) | {"colour": "red"}
    assert decode(msgspec.msgpack.encode(newer)) == written
