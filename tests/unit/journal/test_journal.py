"""The journal: durable when it says so, whatever is killed, torn, damaged or full."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serve_app.errors import JournalUnavailable
from serve_app.journal import Journal, JournalSize, Shipper, Sweeper, abandoned
from serve_app.journal.frames import Entry, read_segment, segments

SMALL = JournalSize(segment_bytes=4096, segments=8, tail_records=50)


class Ledger:
    """A sink that keeps what it was sent, and fails when told to."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []
        self.fails = False
        self.arrived = asyncio.Event()

    async def __call__(self, payloads: list[bytes]) -> None:
        if self.fails:
            raise ConnectionError("away")
        self.payloads += payloads
        self.arrived.set()

    async def has(self, count: int) -> None:
        """Return when that many records have come."""
        while len(self.payloads) < count:
            self.arrived.clear()
            await self.arrived.wait()


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    made = Journal(tmp_path, "mine", SMALL)
    yield made
    await made.close()


def left_behind(root: Path, name: str = "mine") -> tuple[list[bytes], list[str]]:
    """Return what a journal without an owner holds, and what could not be read."""
    with abandoned(root / name) as found:
        assert found is not None, "nobody owns it"
        payloads = [entry.payload for batch in found.batches() for entry in batch]
        return payloads, found.problems


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def payload(number: int) -> bytes:
    return b"record %d " % number + b"x" * (number % 200)


async def test_a_record_is_in_the_file_when_append_returns(journal: Journal) -> None:
    assert await journal.append(b"one") == 1
    assert await asyncio.gather(journal.append(b"two"), journal.append(b"three")) == [2, 3]
    [first] = segments(journal.path)
    assert read_segment(first).entries == (Entry(1, b"one"), Entry(2, b"two"), Entry(3, b"three"))


async def test_append_returns_after_the_sync_and_what_waits_shares_the_next_one(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, syncs, began, go = os.fdatasync, 0, asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def held(file: int) -> None:
        nonlocal syncs
        syncs += 1
        loop.call_soon_threadsafe(began.set)
        assert go.wait(120)
        real(file)

    monkeypatch.setattr(os, "fdatasync", held)
    first = asyncio.create_task(journal.append(b"first"))
    await began.wait()
    others = [asyncio.create_task(journal.append(payload(number))) for number in range(20)]
    await asyncio.sleep(0)
    assert not first.done()
    go.set()
    assert await asyncio.gather(first, *others) == list(range(1, 22))
    assert syncs == 2


async def test_records_come_out_oldest_first_until_they_are_acknowledged(journal: Journal) -> None:
    for number in range(10):
        await journal.append(payload(number))
    assert [e.payload for e in await journal.unacknowledged(3)] == list(map(payload, range(3)))
    journal.acknowledge(4)
    assert journal.backlog == 6
    assert [e.sequence for e in await journal.unacknowledged(100)] == [5, 6, 7, 8, 9, 10]


async def test_who_waits_for_records_gets_the_next_one(journal: Journal) -> None:
    waiting = asyncio.create_task(journal.unacknowledged(10))
    await asyncio.sleep(0)
    await journal.append(b"one")
    assert await waiting == [Entry(1, b"one")]


async def test_segments_are_deleted_when_all_in_them_is_acknowledged(journal: Journal) -> None:
    for number in range(100):
        await journal.append(payload(number))
    assert len(segments(journal.path)) > 1
    journal.acknowledge(100)
    await journal.append(b"the thread deletes before it writes what comes after")
    await journal.append(b"so now it has")
    assert len(segments(journal.path)) == 1


async def test_what_memory_has_no_room_for_is_read_from_the_disk(journal: Journal) -> None:
    written = [payload(number) for number in range(130)]
    for each in written:
        await journal.append(each)
    found: list[bytes] = []
    while journal.backlog:
        entries = await journal.unacknowledged(17)
        assert entries[0].sequence == len(found) + 1
        found += [entry.payload for entry in entries]
        journal.acknowledge(entries[-1].sequence)
    assert found == written
    # Having caught up, it goes on from memory.
    await journal.append(b"next")
    assert await journal.unacknowledged(5) == [Entry(131, b"next")]


async def test_what_comes_after_a_gap_in_memory_waits_for_what_is_before_it(
    journal: Journal,
) -> None:
    written = [payload(number) for number in range(150)]
    for each in written[:100]:
        await journal.append(each)
    journal.acknowledge(20)
    for each in written[100:]:
        await journal.append(each)
    found: list[int] = []
    while journal.backlog:
        entries = await journal.unacknowledged(40)
        found += [entry.sequence for entry in entries]
        journal.acknowledge(entries[-1].sequence)
    assert found == list(range(21, 151))


async def test_a_cancelled_caller_takes_nothing_back(journal: Journal) -> None:
    task = asyncio.create_task(journal.append(b"one"))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await journal.append(b"two")
    assert [e.payload for e in await journal.unacknowledged(5)] == [b"one", b"two"]


async def test_a_journal_with_nothing_left_is_deleted_when_it_is_closed(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "mine", SMALL)
    await journal.append(b"one")
    journal.acknowledge(1)
    await journal.close()
    assert names(tmp_path) == []
    with pytest.raises(JournalUnavailable, match="closed"):
        await journal.append(b"two")


async def test_what_was_submitted_before_the_end_is_written_and_found(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "mine", SMALL)
    futures = [journal.submit(payload(number)) for number in range(60)]
    await journal.close()
    assert [await future for future in futures] == list(range(1, 61))
    assert left_behind(tmp_path) == ([payload(number) for number in range(60)], [])


async def test_a_journal_has_one_owner(journal: Journal, tmp_path: Path) -> None:
    await journal.append(b"one")
    with abandoned(journal.path) as found:
        assert found is None
    with pytest.raises(JournalUnavailable, match="no journal can be kept"):
        Journal(tmp_path, "mine", SMALL)
    assert [e.payload for e in await journal.unacknowledged(5)] == [b"one"]


async def test_of_two_finders_one_gets_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "mine", SMALL)
    await journal.append(b"one")
    await journal.close()
    with abandoned(tmp_path / "mine") as first, abandoned(tmp_path / "mine") as second:
        assert first is not None
        assert second is None
        first.discard()
    with abandoned(tmp_path / "mine") as third:
        assert third is None


async def test_a_journal_that_is_deleted_while_it_is_taken_over_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening its lock and getting it, whoever had it may have finished."""
    journal = Journal(tmp_path, "mine", SMALL)
    await journal.append(b"one")
    await journal.close()
    real = fcntl.flock

    def late(file: int, how: int) -> None:
        shutil.rmtree(tmp_path / "mine")
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with abandoned(tmp_path / "mine") as found:
        assert found is None


async def test_a_folder_that_cannot_be_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalUnavailable, match="no journal can be kept in"):
        Journal(tmp_path / "file", "mine", SMALL)


# Shipping.


async def test_records_are_sent_on_and_acknowledged(journal: Journal) -> None:
    ledger = Ledger()
    shipper = Shipper(journal, ledger, gather_s=0)
    shipper.start()
    for number in range(30):
        await journal.append(payload(number))
    await ledger.has(30)
    await shipper.stop(5)
    assert ledger.payloads == list(map(payload, range(30)))
    assert journal.backlog == 0


async def test_a_ledger_that_is_away_gets_everything_later(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.journal.shipping.RETRY_S", 0)
    ledger = Ledger()
    ledger.fails = True
    shipper = Shipper(journal, ledger, gather_s=0)
    shipper.start()
    for number in range(100):
        await journal.append(payload(number))
    assert journal.backlog == 100
    ledger.fails = False
    await ledger.has(100)
    await shipper.stop(5)
    assert ledger.payloads == list(map(payload, range(100)))


async def test_what_cannot_be_sent_at_the_end_is_found_and_sent_by_the_next(
    tmp_path: Path,
) -> None:
    journal, ledger = Journal(tmp_path, "mine", SMALL), Ledger()
    ledger.fails = True
    shipper = Shipper(journal, ledger)
    shipper.start()
    await journal.append(b"one")
    await shipper.stop(0.01)
    await journal.close()
    sweeper = Sweeper(tmp_path, ledger)
    assert await sweeper.sweep() == 0
    assert names(tmp_path) == ["mine"]
    ledger.fails = False
    assert await sweeper.sweep() == 1
    assert ledger.payloads == [b"one"]
    assert await sweeper.sweep() == 0
    assert names(tmp_path) == []


async def test_a_sweeper_leaves_journals_that_have_owners_alone(journal: Journal) -> None:
    ledger = Ledger()
    await journal.append(b"one")
    assert await Sweeper(journal.path.parent, ledger).sweep() == 0
    assert ledger.payloads == []


async def test_a_sweeper_of_a_folder_that_is_not_there_finds_nothing(tmp_path: Path) -> None:
    assert await Sweeper(tmp_path / "nowhere", Ledger()).sweep() == 0


async def test_a_journal_that_cannot_be_read_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b", "c"):
        journal = Journal(tmp_path, name, SMALL)
        await journal.append(name.encode())
        await journal.close()

    real = Path.read_bytes

    def broken(path: Path) -> bytes:
        if path.parent.name == "b":
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", broken)
    ledger = Ledger()
    assert await Sweeper(tmp_path, ledger).sweep() == 2
    assert ledger.payloads == [b"a", b"c"]
    assert names(tmp_path) == ["b"]
    assert "journal b stays where it is: OSError: [Errno 5]" in caplog.text


# Damage.


async def torn(tmp_path: Path, count: int = 10) -> tuple[Path, bytes]:
    """Return the only segment of a journal that was left, and its bytes."""
    journal = Journal(tmp_path, "mine", SMALL)
    for number in range(count):
        await journal.append(payload(number))
    await journal.close()
    [segment] = segments(tmp_path / "mine")
    return segment, segment.read_bytes()


async def test_wherever_a_journal_is_cut_off_nothing_before_is_lost(tmp_path: Path) -> None:
    segment, data = await torn(tmp_path)
    end = len(data.rstrip(b"\0"))
    whole = read_segment(segment).entries
    ends = [data.index(entry.payload) + len(entry.payload) for entry in whole]
    for cut in range(end + 1):
        for tail in (b"", bytes(50)):
            segment.write_bytes(data[:cut] + tail)
            payloads, problems = left_behind(tmp_path)
            kept = sum(each <= cut for each in ends)
            # A payload may end in zeros' place: it never ends before its own end.
            assert payloads[:kept] == [entry.payload for entry in whole[:kept]]
            assert len(payloads) == kept
            clean = cut in ends or not data[:cut].removeprefix(data[:8]).strip(b"\0")
            assert clean or problems or not data[ends[kept - 1] if kept else 8 : cut].strip(b"\0")


async def test_a_damaged_record_is_reported_and_nothing_before_it_lost(tmp_path: Path) -> None:
    segment, data = await torn(tmp_path)
    entries = read_segment(segment).entries
    for index, entry in enumerate(entries):
        at = data.index(entry.payload)
        segment.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        payloads, problems = left_behind(tmp_path)
        assert payloads == [kept.payload for kept in entries[:index]]
        assert len(problems) == 1
        assert f"after record {index}" in problems[0]


async def test_a_damaged_file_is_kept_and_not_sent_again(tmp_path: Path) -> None:
    ledger = Ledger()
    sweeper = Sweeper(tmp_path, ledger)
    for sent in (3, 6):
        segment, data = await torn(tmp_path)
        at = data.index(payload(3))
        data = data[:at] + b"?" + data[at + 1 :]
        segment.write_bytes(data)
        assert await sweeper.sweep() == 3
        assert ledger.payloads[-3:] == [payload(number) for number in range(3)]
        assert await sweeper.sweep() == 0
        assert len(ledger.payloads) == sent
    kept = ["mine-0000000001-2.damaged", "mine-0000000001.damaged"]
    assert names(tmp_path) == kept
    assert all((tmp_path / name).read_bytes() == data for name in kept)


async def test_damage_in_one_segment_leaves_the_others(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "mine", SMALL)
    for number in range(100):
        await journal.append(payload(number))
    await journal.close()
    first, *others = segments(tmp_path / "mine")
    later = [entry.payload for path in others for entry in read_segment(path).entries]
    assert later
    first.write_bytes(b"garbage" * 100)
    payloads, problems = left_behind(tmp_path)
    assert payloads == later
    assert len(problems) == 1
    assert "no journal" in problems[0]


# Kills.

WRITER = """
import asyncio, sys
from pathlib import Path
from serve_app.journal import Journal, JournalSize

async def main():
    journal = Journal(Path(sys.argv[1]), "mine", JournalSize(segment_bytes=4096, segments=64))
    async def one(number):
        await journal.append(b"record %d " % number + b"x" * (number % 200))
        sys.stdout.buffer.write(b"%d\\n" % number)
        sys.stdout.buffer.flush()
    number = 0
    while True:
        await asyncio.gather(*(one(number + index) for index in range(5)))
        number += 5
        if number > 400:
            journal.acknowledge(number - 200)

asyncio.run(main())
"""


@pytest.mark.parametrize("seed", range(5))
def test_a_writer_killed_at_any_moment_loses_no_record_that_was_durable(
    tmp_path: Path, seed: int
) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    said: list[int] = []
    kill_after = random.Random(seed).randint(1, 900)
    for line in writer.stdout:
        said.append(int(line))
        if len(said) == kill_after:
            writer.send_signal(signal.SIGKILL)
    writer.wait(120)
    said = said if len(said) >= kill_after else []
    assert said, "it was killed while it wrote"
    payloads, problems = left_behind(tmp_path)
    numbers = [int(each.split()[1]) for each in payloads]
    assert [payload(number) for number in numbers] == payloads
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    # The writer acknowledges all but the last 200.
    assert numbers[0] <= max(0, max(said) - 200)
    assert numbers[-1] >= max(said)
    assert len(problems) <= 1


# Full disks.


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of its own of 64 KiB; without the right to mount, the test is skipped."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    return disk


FULL = """
import asyncio, sys
from pathlib import Path
from serve_app.errors import JournalUnavailable
from serve_app.journal import Journal, JournalSize

async def main():
    root = Path(sys.argv[1])
    journal = Journal(root, "mine", JournalSize(segment_bytes=8192, segments=64))
    written = 0
    while True:
        try:
            journal.check()
        except JournalUnavailable as error:
            print("refused:", error)
            break
        written = await journal.append(b"x" * 500)
    # What is under way still has room.
    for _ in range(5):
        written = await journal.append(b"y" * 500)
    try:
        while True:
            written = await journal.append(b"z" * 500)
    except JournalUnavailable as error:
        print("full:", error)
    journal.acknowledge(written)
    while True:
        try:
            journal.check()
            break
        except JournalUnavailable:
            await asyncio.sleep(0.05)
    await journal.append(b"again")
    print("again after", written)
    journal.acknowledge(written + 1)
    await journal.close()
    print("left:", [path.name for path in root.iterdir()])

asyncio.run(main())
"""


def run_until_full(root: Path, segments: int) -> list[str]:
    """Fill a journal of at most so many segments; return what its process says of it."""
    program = FULL.replace("segments=64", f"segments={segments}")
    done = subprocess.run(
        [sys.executable, "-c", program, str(root)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_full_disk_stops_what_is_new_before_what_is_under_way(small_disk: Path) -> None:
    try:
        refused, full, again, left = run_until_full(small_disk, 64)
    finally:
        subprocess.run(["umount", str(small_disk)], check=True)
    assert "no room: No space left on device" in refused
    assert "No space left on device" in full
    written = int(again.split()[-1])
    # 64 KiB hold at most eight segments, with room for all but the last spare.
    assert 80 <= written <= 120
    assert left == "left: []"


def test_a_journal_at_its_bound_stops_what_is_new_until_the_ledger_takes_some(
    tmp_path: Path,
) -> None:
    refused, full, again, left = run_until_full(tmp_path, 4)
    assert "the ledger has not taken its records" in refused
    assert "the ledger has not taken its records" in full
    assert int(again.split()[-1]) == 4 * 15
    assert left == "left: []"


async def test_a_file_that_cannot_be_made_is_a_refusal_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", no_space)
    with pytest.raises(JournalUnavailable, match="No space left"):
        Journal(tmp_path, "mine", SMALL)
    assert names(tmp_path) == []


async def test_a_failed_sync_fails_its_records_and_the_next_go_elsewhere(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a failed sync has left on the disk is unknown: that file is never written again."""
    await journal.append(b"one")
    real, failed = os.fdatasync, []

    def broken(file: int) -> None:
        if not failed:
            failed.append(file)
            raise OSError(5, "Input/output error")
        real(file)

    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(JournalUnavailable, match="Input/output error"):
        await journal.append(b"two")
    await journal.append(b"three")
    assert len(segments(journal.path)) == 2
    assert [e.payload for e in await journal.unacknowledged(9)] == [b"one", b"three"]
