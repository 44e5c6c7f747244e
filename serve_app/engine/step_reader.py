"""The replica's reading of its engine's step records: numbers become accounts.

``read`` takes in whatever has arrived. It is called before a request is settled, before
the figures are asked for, and now and then so that the socket does not fill.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from serve_app.core.attribution import Account
from serve_app.core.cost_meter import Chunk, CostMeter, Steps
from serve_app.core.types import Outcome
from serve_app.engine.step_records import (
    Joined,
    Left,
    Lost,
    Occupied,
    Record,
    Stepped,
    Stopped,
    Vacant,
)

EXPECTED_MAX = 10_000
_CHUNK_FIELDS = 5

_log = logging.getLogger("headrace.engine")


class Inbox(Protocol):
    """Where records come from; see ``StepInbox``."""

    def receive(self) -> Iterable[Record]: ...


class StepReader:
    """Feeds a meter with what an engine in another process wrote of its steps.

    Once the records have ended, whoever broke them, nobody knows what the engine does: all
    further time is unattributed, and never idle.
    """

    def __init__(
        self, inbox: Inbox, meter: CostMeter, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``clock`` gives the machine's monotonic seconds."""
        self._inbox = inbox
        self._meter = meter
        self._clock = clock
        self._expected: dict[str, Account] = {}
        self._accounts: dict[int, Account] = {}
        self._strangers: set[int] = set()
        self._decodes: tuple[tuple[Account, int], ...] = ()
        self._passed = 0
        self._ended = False
        self.lost_records = 0

    def expect(self, request_id: str, account: Account) -> None:
        """A request of this id is about to be handed to the engine."""
        expected = self._expected
        if len(expected) >= EXPECTED_MAX:
            # Aborted before it was sent: the engine will never mention it.
            del expected[next(iter(expected))]
        expected[request_id] = account

    def read(self) -> None:
        """Take in the records that have arrived; after one that makes no sense, none."""
        try:
            if not self._ended:
                self._read()
        except Exception:  # noqa: BLE001 - see below
            # A request must not fail, nor the engine end, for what is only measured.
            _log.exception("the records of the engine's steps are no longer read")
            self._ended = True
        if self._ended:
            now_s = self._clock()
            self._meter.occupied(now_s)
            self._meter.stepped(Steps(now_s, now_s))

    def _read(self) -> None:
        for record in self._inbox.receive():
            if isinstance(record, Stepped):
                self._meter.stepped(self._steps(record))
            elif isinstance(record, Joined):
                self._join(record)
            elif isinstance(record, Left):
                self._leave(record.number)
            elif isinstance(record, Occupied):
                self._meter.occupied(record.at_s)
            elif isinstance(record, Vacant):
                self._meter.vacant(record.since_s)
            elif isinstance(record, Stopped):
                self._ended = True
                return
            else:
                self._lose(record)

    def _steps(self, record: Stepped) -> Steps:
        accounts, decodes, prefills = self._accounts, record.decodes, record.prefills
        if decodes is not None:
            pairs = zip(decodes[::2], decodes[1::2], strict=True)
            self._decodes = tuple([(accounts[number], context) for number, context in pairs])
            self._passed = 0
        chunks = tuple(
            [
                Chunk(accounts[prefills[at]], *prefills[at + 1 : at + _CHUNK_FIELDS])
                for at in range(0, len(prefills), _CHUNK_FIELDS)
            ]
        )
        passed = self._passed
        self._passed += record.steps
        return Steps(record.start_s, record.end_s, self._decodes, chunks, passed, record.steps)

    def _join(self, record: Joined) -> None:
        account = self._expected.pop(record.request_id, None)
        if account is None:
            # Not a request of the replica's: a call of vLLM's own.
            account = self._meter.open("")
            self._strangers.add(record.number)
        self._accounts[record.number] = account

    def _leave(self, number: int) -> None:
        account = self._accounts.pop(number)
        if number in self._strangers:
            self._strangers.discard(number)
            self._meter.close(account, Outcome.COMPLETED)

    def _lose(self, record: Lost) -> None:
        self.lost_records += record.records
        _log.warning("steps were not recorded", extra={"records": record.records})
