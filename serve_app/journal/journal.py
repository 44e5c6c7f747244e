"""The journal that one process owns: records are on the disk when ``append`` returns.

A thread writes what has gathered meanwhile in one go and syncs it once (group commit), so
that the cost of a sync is shared by all who wait and the event loop never waits for a disk.

There is always a spare segment, made in advance. When none can be made (the disk is full,
or the journal has grown to its bound because the ledger is away), ``check`` raises: no new
request may begin, while those under way still have the room that is left in the last one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from serve_app.errors import JournalUnavailable
from serve_app.journal.folder import make_locked, sync_folder
from serve_app.journal.frames import (
    MAGIC,
    SEGMENT_SUFFIX,
    Entry,
    frame,
    read_segment,
    segments,
)

logger = logging.getLogger("headrace.journal")

SPARE: Final = "spare"
RETRY_S: Final = 1.0

_ZEROS_AT_ONCE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class JournalSize:
    """How large a journal gets. ``tail_records`` are kept in memory for the shipper."""

    segment_bytes: int = 4 << 20
    segments: int = 256
    tail_records: int = 20_000


@dataclass(slots=True)
class _Open:
    """The segment that is written. ``last`` is the sequence of its last record."""

    path: Path
    file: int
    at: int
    last: int


class Journal:
    """Records of one process, in a folder of its own below ``root``.

    Made and used on one event loop; ``check``, ``submit`` and ``acknowledge`` never block.
    """

    def __init__(self, root: Path, name: str, size: JournalSize | None = None) -> None:
        """Make and lock the folder and its first segments. Blocks for some milliseconds.

        Raises:
            JournalUnavailable: it cannot be made there; the message says why.
        """
        self._size = size or JournalSize()
        self._loop = asyncio.get_running_loop()
        self._wakeup = threading.Condition()
        self._pending: list[tuple[bytes, asyncio.Future[int]]] = []
        self._closing = False
        self._acknowledged = 0
        self._durable = 0
        self._tail: deque[Entry] = deque()
        self._arrived = asyncio.Event()
        # Below: the writing thread's, once it runs.
        self._written = 0
        self._count = 0
        self._full: list[_Open] = []
        self._current: _Open | None = None
        self._spare: Path | None = None
        self._refusal: str | None = None
        try:
            self._folder = make_locked(root, name)
        except OSError as error:
            raise JournalUnavailable(f"no journal can be kept in {root}: {error}") from error
        if not self._rotate():
            self._folder.remove()
            raise JournalUnavailable(f"no journal can be kept in {root}: {self._refusal}")
        self._thread = threading.Thread(target=self._write_on, name="journal", daemon=True)
        self._thread.start()

    @property
    def path(self) -> Path:
        """Where the journal is."""
        return self._folder.path

    @property
    def backlog(self) -> int:
        """How many records are on the disk and not acknowledged."""
        return self._durable - self._acknowledged

    def check(self) -> None:
        """Return if requests may begin whose records have to fit later.

        Raises:
            JournalUnavailable: only the room for what is under way is left.
        """
        if self._refusal is not None:
            raise JournalUnavailable(self._refusal)

    def submit(self, payload: bytes) -> asyncio.Future[int]:
        """Hand a record over; the future is its sequence once it is on the disk.

        The future fails with JournalUnavailable where there was no room, or no journal.
        """
        assert 2 * len(payload) < self._size.segment_bytes, "a segment takes several records"
        written: asyncio.Future[int] = self._loop.create_future()
        with self._wakeup:
            if self._closing:
                written.set_exception(JournalUnavailable("the journal is closed"))
                return written
            self._pending.append((payload, written))
            self._wakeup.notify()
        return written

    async def append(self, payload: bytes) -> int:
        """Return a record's sequence once it is on the disk.

        A caller that is cancelled meanwhile takes nothing back.

        Raises:
            JournalUnavailable: it could not be written.
        """
        return await self.submit(payload)

    def acknowledge(self, sequence: int) -> None:
        """Let go of every record up to ``sequence``: the ledger has committed them."""
        if sequence <= self._acknowledged:
            return
        assert sequence <= self._durable, "only what was written can be acknowledged"
        while self._tail and self._tail[0].sequence <= sequence:
            self._tail.popleft()
        with self._wakeup:
            self._acknowledged = sequence
            self._wakeup.notify()

    async def unacknowledged(self, limit: int) -> list[Entry]:
        """Wait until there are records that are not acknowledged; return the oldest."""
        while not self.backlog:
            self._arrived.clear()
            await self._arrived.wait()
        if self._tail:
            return [self._tail[index] for index in range(min(limit, len(self._tail)))]
        return await asyncio.to_thread(self._read, self._acknowledged, self._durable, limit)

    async def close(self) -> None:
        """Write what was submitted and end. A journal with nothing left is deleted."""
        with self._wakeup:
            self._closing = True
            self._wakeup.notify()
        await asyncio.to_thread(self._thread.join)
        # What the thread resolved last is still to be counted.
        await asyncio.sleep(0)
        if self.backlog:
            self._folder.release()
        else:
            await asyncio.to_thread(self._folder.remove)

    # On the event loop, told by the thread.

    def _settle(self, entries: list[tuple[Entry, asyncio.Future[int]]]) -> None:
        for entry, written in entries:
            self._remember(entry)
            if not written.done():
                written.set_result(entry.sequence)
        self._arrived.set()

    def _remember(self, entry: Entry) -> None:
        """Keep a record for the shipper, if the ones before it are all kept too."""
        self._durable = entry.sequence
        before = self._tail[-1].sequence if self._tail else self._acknowledged
        if before == entry.sequence - 1 and len(self._tail) < self._size.tail_records:
            self._tail.append(entry)

    @staticmethod
    def _fail(futures: list[asyncio.Future[int]], reason: str) -> None:
        for written in futures:
            if not written.done():
                written.set_exception(JournalUnavailable(reason))

    # On a thread.

    def _read(self, after: int, last: int, limit: int) -> list[Entry]:
        """Return records from the disk: those that memory had no room for."""
        found: list[Entry] = []
        for path in segments(self.path):
            with contextlib.suppress(FileNotFoundError):
                found += [e for e in read_segment(path).entries if after < e.sequence <= last]
            if len(found) >= limit:
                break
        return found[:limit]

    def _write_on(self) -> None:
        """Write until the journal is closed."""
        while True:
            with self._wakeup:
                while not (self._pending or self._closing or self._deletable()):
                    waited = None if self._spare is not None else RETRY_S
                    if not self._wakeup.wait(waited):
                        break
                batch, self._pending = self._pending, []
                closing = self._closing
            if batch:
                self._write(batch)
            self._delete_acknowledged()
            if self._spare is None and not closing:
                self._make_spare()
            if closing and not batch:
                self._close_files()
                return

    def _write(self, batch: list[tuple[bytes, asyncio.Future[int]]]) -> None:
        """Write a batch, in several syncs only where it spans segments."""
        rest = deque(batch)
        while rest:
            entries: list[tuple[Entry, asyncio.Future[int]]] = []
            data = bytearray()
            room = 0 if self._current is None else self._size.segment_bytes - self._current.at
            while rest:
                payload, written = rest[0]
                framed = frame(self._written + len(entries) + 1, payload)
                if len(data) + len(framed) > room:
                    break
                data += framed
                entries.append((Entry(self._written + len(entries) + 1, payload), written))
                rest.popleft()
            if entries and not self._put(bytes(data), entries):
                continue
            if rest and not self._rotate():
                reason = self._refusal or "there is no room"
                self._tell(self._fail, [written for _, written in rest], reason)
                return

    def _put(self, data: bytes, entries: list[tuple[Entry, asyncio.Future[int]]]) -> bool:
        """Bring bytes to the disk and tell those who wait; False if that failed."""
        current = self._current
        assert current is not None, "there is room only in a segment"
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(current.file, data[written:], current.at + written)
            os.fdatasync(current.file)
        except OSError as error:
            # What a failed sync has left on the disk is unknown: never write there again.
            logger.error("journal cannot be written", extra={"problem": str(error)})
            self._retire()
            reason = f"the journal cannot be written: {error.strerror}"
            self._tell(self._fail, [future for _, future in entries], reason)
            return False
        current.at += len(data)
        current.last = self._written = entries[-1][0].sequence
        self._tell(self._settle, entries)
        return True

    def _rotate(self) -> bool:
        """Go on in the spare segment and make another; False if there is none."""
        if self._spare is None:
            self._make_spare()
        if self._spare is None:
            return False
        self._retire()
        self._count += 1
        path = self.path / f"{self._count:010d}{SEGMENT_SUFFIX}"
        try:
            os.rename(self._spare, path)
            sync_folder(self.path)
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            self._refusal = f"the journal's next segment cannot be opened: {error.strerror}"
            return False
        self._spare = None
        self._current = _Open(path, file, len(MAGIC), self._written)
        self._make_spare()
        return True

    def _retire(self) -> None:
        """Close the current segment; it is deleted once it is acknowledged."""
        if self._current is not None:
            os.close(self._current.file)
            self._full.append(self._current)
            self._current = None

    def _make_spare(self) -> None:
        """Make the next segment in advance, or set the reason why it cannot be."""
        if len(self._full) + 2 > self._size.segments:
            self._refusal = "the journal is full: the ledger has not taken its records for long"
            return
        path = self.path / SPARE
        try:
            _write_zeros(path, self._size.segment_bytes)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            reason = f"the journal's disk has no room: {error.strerror}"
            if self._refusal != reason:
                logger.error("no new requests: %s", reason, extra={"journal": str(self.path)})
            self._refusal = reason
            return
        if self._refusal is not None:
            logger.warning("the journal has room again", extra={"journal": str(self.path)})
        self._spare, self._refusal = path, None

    def _deletable(self) -> bool:
        return bool(self._full) and self._full[0].last <= self._acknowledged

    def _delete_acknowledged(self) -> None:
        while self._deletable():
            with contextlib.suppress(FileNotFoundError):
                self._full[0].path.unlink()
            del self._full[0]

    def _close_files(self) -> None:
        self._retire()
        if self._spare is not None:
            with contextlib.suppress(OSError):
                self._spare.unlink()

    def _tell(self, what: Callable[..., None], *arguments: object) -> None:
        # The loop is gone when its process ends without closing the journal.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(what, *arguments)


def _write_zeros(path: Path, size_bytes: int) -> None:
    """Make a file of zeros with its magic, its blocks on the disk."""
    zeros = bytes(_ZEROS_AT_ONCE)
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        left = size_bytes
        while left > 0:
            left -= os.write(file, zeros[:left] if left < len(zeros) else zeros)
        os.pwrite(file, MAGIC, 0)
        os.fsync(file)
    finally:
        os.close(file)
