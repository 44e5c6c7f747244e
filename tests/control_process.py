"""Control's granting code in a process of its own, to be stopped, continued and killed.

    python -m tests.control_process DATABASE_URL SOCKET [--dies-after-grants N]

It answers on a Unix socket what the deployment answers through Serve: the ledger's writes,
parts of limits, money. With ``--dies-after-grants`` it kills itself between the commit and the
reply of the N-th message that it grants something on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from serve_app.core.budget import Account, Line
from serve_app.core.slice_messages import Bell, Message, Reply
from serve_app.granter import GrantDesk
from serve_app.ledger.budgets import BudgetStore
from serve_app.ledger.database import Database
from serve_app.ledger.grants import GrantStore
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.usage import UsageLedger
from serve_app.ledger.writer import LedgerWriter
from serve_app.treasury import MoneyBell, Treasury

FOLLOW_S = 0.3
_SIZE = struct.Struct("!I")


class Office:
    """What Control does for routers, without Ray."""

    def __init__(self, url: str, wall_s: int, dies_after: int | None) -> None:
        self._database = Database(url)
        self._wall_s = wall_s
        self._dies_after = dies_after
        ledger = UsageLedger(self._database, PriceStore(self._database))
        self._writer = LedgerWriter(ledger)
        self._desk = GrantDesk(GrantStore(self._database), time.monotonic, 30.0)

    async def begin(self) -> None:
        await self._desk.begin()
        granter = self._desk.granter
        budgets = BudgetStore(self._database, lambda: self._wall_s)
        self._treasury = Treasury(budgets, time.monotonic, granter.routers, lambda: granter.epoch)

    async def follow(self) -> None:
        while True:
            await asyncio.sleep(FOLLOW_S)
            with contextlib.suppress(Exception):  # a database that is busy; Control logs it
                await self._desk.follow()

    async def lend(self, router: str, accounts: list[Account]) -> list[Line]:
        lines = await self._treasury.lend(router, accounts)
        self._count(any(account.need for account in accounts))
        return lines

    async def money_bell(self, router: str) -> MoneyBell:
        return await self._treasury.bell(router)

    async def exchange_slices(self, message: Message) -> Reply:
        return await self._desk.exchange(message)

    async def slices_bell(self, router: str) -> Bell:
        return await self._desk.bell(router)

    async def record_usage(self, payloads: list[bytes]) -> None:
        await self._writer.write(payloads)

    async def epoch(self) -> int:
        return self._desk.granter.epoch

    def _count(self, grants: bool) -> None:
        if self._dies_after is not None and grants:
            self._dies_after -= 1
            if self._dies_after <= 0:
                os.kill(os.getpid(), signal.SIGKILL)


async def serve(url: str, socket: str, wall_s: int, dies_after: int | None) -> None:
    """Answer one call per connection until the process ends."""
    office = Office(url, wall_s, dies_after)
    await office.begin()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            method, arguments = pickle.loads(await _receive(reader))
            try:
                result = (True, await getattr(office, method)(*arguments))
            except Exception as error:  # noqa: BLE001  # the caller's to hear of
                result = (False, f"{type(error).__name__}: {error}")
            _send(writer, pickle.dumps(result))
            await writer.drain()
        finally:
            writer.close()

    # While it is stopped nobody takes what comes: without room a connection would be refused.
    server = await asyncio.start_unix_server(answer, socket, backlog=4096)
    async with server, asyncio.TaskGroup() as tasks:
        tasks.create_task(office.follow())
        tasks.create_task(server.serve_forever())


def _state(thread: Path) -> str:
    """Return a thread's state as the kernel names it, T when it is stopped or gone."""
    try:
        return (thread / "stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return "T"


class ControlProcess:
    """Such a process, from outside."""

    def __init__(
        self, url: str, folder: Path, name: str, wall_s: int, dies_after: int | None = None
    ) -> None:
        self.socket = str(folder / f"{name}.sock")
        words = ["-m", "tests.control_process", url, self.socket, str(wall_s)]
        if dies_after is not None:
            words.append(f"--dies-after-grants={dies_after}")
        self._log = (folder / f"{name}.log").open("wb")
        self.process = subprocess.Popen([sys.executable, *words], stderr=self._log)

    async def ready(self) -> None:
        """Return when it has become the Control that grants."""
        async with asyncio.timeout(240):
            while True:
                assert self.process.poll() is None, f"see {self._log.name}"
                with contextlib.suppress(OSError):
                    await self.call("epoch")
                    return
                await asyncio.sleep(0.05)

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the Office; whatever goes wrong there raises ConnectionError here."""
        reader, writer = await asyncio.open_unix_connection(self.socket)
        try:
            _send(writer, pickle.dumps((method, arguments)))
            try:
                done, result = pickle.loads(await _receive(reader))
            except asyncio.IncompleteReadError as error:
                raise ConnectionError("it died before it replied") from error
        finally:
            writer.close()
        if not done:
            raise ConnectionError(result)
        return result

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def pause(self) -> None:
        """Stop it, and return when its last thread stands still: that takes a moment."""
        self.signal(signal.SIGSTOP)
        threads = Path(f"/proc/{self.process.pid}/task")
        while any(_state(thread) != "T" for thread in threads.iterdir()):
            time.sleep(0.001)

    def close(self) -> None:
        """End it, stopped or not."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(120)
        self._log.close()


def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(_SIZE.pack(len(data)) + data)


async def _receive(reader: asyncio.StreamReader) -> bytes:
    (size,) = _SIZE.unpack(await reader.readexactly(_SIZE.size))
    return await reader.readexactly(size)


def main() -> None:
    """Run one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("socket")
    parser.add_argument("wall_s", type=int)
    parser.add_argument("--dies-after-grants", type=int)
    args = parser.parse_args()
    asyncio.run(serve(args.url, args.socket, args.wall_s, args.dies_after_grants))


if __name__ == "__main__":
    main()
