"""What the books carry: events a second into the ledger, and what a journalled record costs.

    python -m benchmarks.ledger [--events N] [--folder DIR] [--database URL] [--report FILE]

The raw disk is measured beside each figure that waits for it: a 400-byte append and its
fdatasync, in the same folder. Events are both witnesses' records of random requests, in
batches as they come from routers and engines; every event is checked afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve_app.core.pricing import RateCard, Rates
from serve_app.journal import Journal
from serve_app.ledger.database import Database
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.usage import UsageLedger
from serve_app.ledger.verify import verify
from serve_app.ledger.writer import LedgerWriter
from serve_app.usage import UsageRecord, encode
from tests.usage_records import traffic

REPORT = Path("benchmarks/reports/ledger.md")
TARGET_PER_S = 5000
TARGET_P99_S = 0.010
RECORD_BYTES = 400
SYNCS = 500


@dataclass(frozen=True, slots=True)
class Timed:
    """How often something was done in how long, and how long the single ones took."""

    what: str
    count: int
    wall_s: float
    each_s: Sequence[float]

    def quantile_s(self, share: float) -> float:
        """Return a quantile of the single times."""
        ordered = sorted(self.each_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> int:
    """Measure, print and write the page. Returns 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger")
    parser.add_argument("--events", type=int, default=60_000, help="events (default: 60000)")
    parser.add_argument("--folder", type=Path, default=Path("out"), help="the disk to measure")
    parser.add_argument("--database", help="another database than SQLite in the folder")
    parser.add_argument("--report", type=Path, default=REPORT, help="the page to write")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name).resolve()
        url = args.database or f"sqlite:///{folder}/ledger.db"
        raw = raw_syncs(folder)
        ledger = [ledger_batches(url, args.events, size) for size in (100, 500, 2000)]
        ledger.append(asyncio.run(whole_path(url, args.events)))
        checked = check(url)
        journal = [asyncio.run(journal_appends(folder, at_once)) for at_once in (1, 32, 256)]
        raw_after = raw_syncs(folder)
    text = page(url, [raw, raw_after], ledger, journal, checked)
    print(text)
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(text, encoding="utf-8")
    slow = any(each.count / each.wall_s < TARGET_PER_S for each in ledger[1:])
    return 1 if slow or journal[1].quantile_s(0.99) > TARGET_P99_S else 0


def timed(what: str, parts: Sequence[int], do: Callable[[int], None]) -> Timed:
    """Do something for every index of ``parts``, which says how much each counts for."""
    each_s = []
    began_s = time.perf_counter()
    for index in range(len(parts)):
        at_s = time.perf_counter()
        do(index)
        each_s.append(time.perf_counter() - at_s)
    return Timed(what, sum(parts), time.perf_counter() - began_s, each_s)


def raw_syncs(folder: Path) -> Timed:
    """Append to a file and sync it, again and again, as the disk alone allows."""
    file = os.open(folder / "raw", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    data = bytes(RECORD_BYTES)

    def append(_: int) -> None:
        os.write(file, data)
        os.fdatasync(file)

    try:
        return timed("append and fdatasync", [1] * SYNCS, append)
    finally:
        os.close(file)


def ledger_batches(url: str, events: int, size: int) -> Timed:
    """Commit events in batches of one size."""
    database, ledger, version = opened(url)
    records = list(itertools.islice(traffic(events, seed=size, price_version=version), events))
    batches = [records[start : start + size] for start in range(0, len(records), size)]

    def commit(index: int) -> None:
        ledger.commit(batches[index])

    try:
        return timed(f"commits of {size} events", [len(batch) for batch in batches], commit)
    finally:
        database.close()


async def whole_path(url: str, events: int) -> Timed:
    """Send encoded batches as eight processes do, each waiting for its acknowledgement."""
    database, ledger, version = opened(url)
    writer = LedgerWriter(ledger)
    records: list[UsageRecord] = list(
        itertools.islice(traffic(events, seed=7, price_version=version), events)
    )
    payloads = [encode(record) for record in records]
    batches = iter([payloads[start : start + 100] for start in range(0, len(payloads), 100)])
    each_s: list[float] = []

    async def send() -> None:
        for batch in batches:
            at_s = time.perf_counter()
            await writer.write(batch)
            each_s.append(time.perf_counter() - at_s)

    began_s = time.perf_counter()
    await asyncio.gather(*(send() for _ in range(8)))
    wall_s = time.perf_counter() - began_s
    await writer.close()
    database.close()
    return Timed("8 senders of 100, decoded and grouped", len(payloads), wall_s, each_s)


def opened(url: str) -> tuple[Database, UsageLedger, int]:
    """Open a ledger with prices."""
    database = Database(url)
    prices = PriceStore(database)
    cards = [
        RateCard("all", Rates(100, 10, 400, 1000)),
        RateCard("large", Rates(500, 50, 2000, 1000), model="large"),
    ]
    version = prices.replace(cards, "benchmark")
    return database, UsageLedger(database, prices), version


def check(url: str) -> str:
    """Return what the verification of everything says."""
    database = Database(url)
    began_s = time.perf_counter()
    findings = verify(database)
    wall_s = time.perf_counter() - began_s
    database.close()
    return (
        f"`headrace usage --verify` of {findings.events:,} events: {findings.differences} "
        f"differences, {wall_s:.1f} s."
    )


async def journal_appends(folder: Path, at_once: int) -> Timed:
    """Append records by so many requests at once, each waiting until its own is durable."""
    journal = Journal(folder / "journals", f"of-{at_once}")
    data = bytes(range(1, 201)) * 2
    each_s: list[float] = []

    async def request() -> None:
        for _ in range(max(8, 4000 // at_once)):
            at_s = time.perf_counter()
            await journal.append(data)
            each_s.append(time.perf_counter() - at_s)

    began_s = time.perf_counter()
    await asyncio.gather(*(request() for _ in range(at_once)))
    wall_s = time.perf_counter() - began_s
    journal.acknowledge(len(each_s))
    await journal.close()
    return Timed(f"appends, {at_once} at once", len(each_s), wall_s, each_s)


def page(
    url: str, raw: list[Timed], ledger: list[Timed], journal: list[Timed], checked: str
) -> str:
    """Return the report."""
    kind = url.partition(":")[0]
    lines = [
        "# The books",
        "",
        "Produced by `python -m benchmarks.ledger`: what the ledger commits a second, and how "
        "long a record takes to be durable in the journal, beside the disk's own sync.",
        "",
        f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} CPUs, "
        f"{kind}" + (" (WAL, synchronous=FULL)." if kind == "sqlite" else "."),
        "",
        "| what | count | a second | p50 ms | p99 ms | target | kept |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [row(each, "-", None) for each in raw]
    lines.append(row(ledger[0], "-", None))
    for each in ledger[1:]:
        kept = each.count / each.wall_s >= TARGET_PER_S
        lines.append(row(each, f">= {TARGET_PER_S:,}/s", kept))
    for index, each in enumerate(journal):
        kept = each.quantile_s(0.99) <= TARGET_P99_S
        lines.append(row(each, "p99 <= 10 ms", kept) if index == 1 else row(each, "-", None))
    return "\n".join([*lines, "", checked, ""])


def row(each: Timed, target: str, kept: bool | None) -> str:
    """Return a line of the table."""
    verdict = "-" if kept is None else "yes" if kept else "no"
    return (
        f"| {each.what} | {each.count:,} | {each.count / each.wall_s:,.0f} | "
        f"{1000 * each.quantile_s(0.5):.2f} | {1000 * each.quantile_s(0.99):.2f} | {target} | "
        f"{verdict} |"
    )


if __name__ == "__main__":
    sys.exit(main())
