"""True cost of a whole stack: what engines measured is in the ledger and adds up."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import yaml

from tests.e2e.waiting import until
from tests.stack import ROOT, Stack, running_stack

QUESTION: dict[str, Any] = {
    "model": "sim",
    "messages": [{"role": "user", "content": "tell me a story"}],
}


def rows(stack: Stack, query: str) -> list[Any]:
    """Ask the ledger itself; reading does not disturb its writer."""
    file = f"file:{stack.folder}/.headrace/sim.db?mode=ro"
    with contextlib.closing(sqlite3.connect(file, uri=True, timeout=30)) as database:
        return database.execute(query).fetchall()


def usage(stack: Stack, by: str) -> dict[str, Any]:
    answer = stack.http().get("/admin/usage", params={"by": by}).raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def costs_of(report: dict[str, Any]) -> tuple[int, int]:
    """Return what rows and overheads cost together, and what the fleet did."""
    parts = [*report["data"], *report["overheads"]]
    return sum(part["cost_nanousd"] for part in parts), report["fleet"]["cost_nanousd"]


def test_measured_time_of_a_request_is_in_every_report_and_adds_up(sim_stack: Stack) -> None:
    client, user = sim_stack.openai(), f"cost-{time.monotonic_ns()}"
    for _ in range(3):
        client.chat.completions.create(**QUESTION, max_tokens=20, user=user)

    def measured() -> bool:
        report = usage(sim_stack, "user")
        mine = [row for row in report["data"] if row["user"] == user]
        if not mine or mine[0]["requests"] != 3:
            return False
        # An hour that has just begun has no price before its first account.
        return float(mine[0]["engine_s"]) > 0 == float(mine[0]["unpriced_s"])

    until(measured, "the ledger has the engine's word on three requests")
    report = usage(sim_stack, "user")
    (mine,) = [row for row in report["data"] if row["user"] == user]
    rate = Fraction(2_500_000_000, 3600)
    assert abs(mine["cost_nanousd"] - Fraction(mine["engine_s"]) * rate) <= 4
    assert float(mine["kv_block_s"]) > 0
    rest, fleet = costs_of(report)
    assert rest == fleet > 0
    # The start of both replicas is on their accounts from when they were ready.
    started = {row["what"]: float(row["time_s"]) for row in report["overheads"]}
    assert started["start_up"] > 0
    over_http = sim_stack.http().get("/admin/usage/economics").json()
    assert [pool["pool"] for pool in over_http["data"]][-1] == "sim"
    focus = sim_stack.http().get("/admin/usage?format=focus-allocation").text
    assert "AllocatedMethodDetails" in focus.splitlines()[0]


def test_what_vllm_measured_of_its_steps_is_in_the_report_to_the_nanosecond(
    local_stack: Stack,
) -> None:
    client, user = local_stack.openai(), f"cost-{time.monotonic_ns()}"
    question = QUESTION | {"model": "smollm2", "user": user}
    for _ in range(2):
        client.chat.completions.create(**question, max_tokens=8)

    def mine() -> list[dict[str, Any]]:
        return [row for row in usage(local_stack, "user")["data"] if row["user"] == user]

    until(lambda: [row["requests"] for row in mine()] == [2], "the ledger has both requests")
    until(lambda: float(mine()[0]["engine_s"]) > 0, "and what the engine measured of them")
    assert float(mine()[0]["kv_block_s"]) > 0
    report = usage(local_stack, "user")
    spent = [Fraction(row["engine_s"]) for row in report["data"]]
    rest = [Fraction(row["time_s"]) for row in report["overheads"]]
    assert sum(spent + rest) == Fraction(report["fleet"]["time_s"])
    # The configuration has no price for this machine, and the report says so.
    assert mine()[0]["unpriced_s"] == mine()[0]["engine_s"]


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """Run an OpenCost that takes every question and answers none."""
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(server.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    for each in held:
        each.close()


@pytest.mark.proof
async def test_accounts_agree_with_records_to_the_nanosecond_beside_a_silent_opencost() -> None:
    document: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "sim.yaml").read_text())
    with silent_server() as url:
        opencost = {"url": url, "period_s": 1, "timeout_s": 5}
        document["applications"][0]["args"]["costs"]["opencost"] = opencost
        with running_stack(document) as stack:
            cancelled = await drive(stack, 100)
            assert cancelled > 10
            # Nothing runs any more: the last piece of each account holds all that ended.
            await asyncio.sleep(65)
            accounts = rows(
                stack,
                "SELECT replica, SUM(useful_ns + cancelled_ns + preempted_ns + failed_ns), "
                "SUM(until_ns - from_ns), SUM(start_up_ns + useful_ns + cancelled_ns + "
                "preempted_ns + failed_ns + idle_ns + drain_ns + unattributed_ns + open_ns), "
                "SUM(unattributed_ns) FROM replica_hour GROUP BY replica",
            )
            recorded = dict(
                rows(stack, "SELECT replica, SUM(engine_ns) FROM engine_time GROUP BY replica")
            )
            assert len(accounts) == 2
            for replica, busy_ns, lived_ns, used_ns, unattributed_ns in accounts:
                late_ns = busy_ns - recorded[replica]
                print(f"{replica}: {busy_ns / 1e9:.3f} s busy, {late_ns / 1e6:.3f} ms cut off, ")
                print(f"{unattributed_ns / lived_ns:.4%} of {lived_ns / 1e9:.1f} s unattributed")
                assert used_ns == lived_ns
                # A cancelled request leaves at most the step it was in.
                assert 0 <= late_ns <= cancelled * 50_000_000
                assert unattributed_ns <= lived_ns // 1000
            rest, fleet = costs_of(usage(stack, "tenant"))
            assert rest == fleet > 0
            assert (
                stack.headrace(
                    "usage", "--verify", "--config", stack.folder / "stack.yaml"
                ).returncode
                == 0
            )


async def drive(stack: Stack, seconds: float) -> int:
    """Ask from twenty clients, some of whom leave in the middle; return how many left."""
    client, cancelled = stack.async_openai(), 0
    until_s = time.monotonic() + seconds

    async def ask(number: int) -> None:
        nonlocal cancelled
        while time.monotonic() < until_s:
            stream = await client.chat.completions.create(**QUESTION, max_tokens=60, stream=True)
            seen = 0
            async for _ in stream:
                seen += 1
                if number % 4 == 0 and seen > 20:
                    cancelled += 1
                    await stream.close()
                    break
            await asyncio.sleep(0.2)

    await asyncio.gather(*(ask(number) for number in range(20)))
    await client.close()
    return cancelled
