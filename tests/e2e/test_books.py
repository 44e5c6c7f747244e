"""The books of a whole stack: every response is in the ledger, once, whatever is killed."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from sqlalchemy import create_engine, text

from tests.e2e.waiting import until
from tests.postgres import fresh_database, running_postgres
from tests.stack import ROOT, Stack, running_stack

PRICES = "currency: USD\ncards:\n  all: {input: 1, cached_input: 0.1, output: 10, request: 0.001}\n"
REQUEST, INPUT, CACHED, OUTPUT = 1_000_000, 1000, 100, 10_000
QUESTION = {"model": "sim", "messages": [{"role": "user", "content": "tell me a story"}]}


def document() -> dict[str, Any]:
    """Two routers and two engines that take a few milliseconds a token."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "sim.yaml").read_text())
    _, pool, gateway = found["applications"]
    pool["args"]["engine"] |= {"weights_s": 0.005, "max_num_seqs": 64}
    pool["args"]["replicas"] |= {"num_replicas": 2, "health_check_period_s": 1}
    gateway["args"]["replicas"] |= {"num_replicas": 2, "health_check_period_s": 1}
    gateway["deployments"][0]["user_config"]["pools"]["sim"] |= {"queue_timeout_s": 60}
    return found


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(document()) as running:
        yield running


def config(stack: Stack) -> Path:
    return stack.folder / "stack.yaml"


def rows(stack: Stack, query: str, *values: object) -> list[Any]:
    """Ask the ledger itself; reading does not disturb its writer."""
    file = f"file:{stack.folder}/.headrace/sim.db?mode=ro"
    with contextlib.closing(sqlite3.connect(file, uri=True, timeout=30)) as database:
        return database.execute(query, values).fetchall()


def count(stack: Stack, where: str, *values: object) -> int:
    [[found]] = rows(stack, f"SELECT COUNT(*) FROM usage_event WHERE {where}", *values)
    return int(found)


def adds_up(stack: Stack) -> str:
    """Verify the books; return what the command says of them."""
    done = stack.headrace("usage", "--verify", "--config", config(stack))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def import_prices(stack: Stack, text: str = PRICES) -> None:
    file = stack.folder / "prices.yaml"
    file.write_text(text)
    done = stack.headrace("prices", "import", file, "--config", config(stack))
    assert done.returncode == 0, done.stderr


def test_a_price_book_is_in_force_soon_and_a_request_costs_what_it_says(stack: Stack) -> None:
    import_prices(stack)

    def priced() -> bool:
        headers = {"x-request-id": "priced"}
        answer = stack.http().post("/v1/chat/completions", json=QUESTION, headers=headers)
        answer.raise_for_status()
        known = answer.headers["x-headrace-request-id"]
        until(lambda: count(stack, "request_id = ?", known) == 2, "both witnesses' records")
        [found] = rows(
            stack,
            "SELECT price_version, card, amount_nanousd, prompt_tokens, cached_prompt_tokens, "
            "output_tokens FROM usage_event WHERE request_id = ? AND witness = 'router'",
            known,
        )
        [[amount]] = rows(
            stack, "SELECT SUM(amount_nanousd) FROM usage_event WHERE request_id = ?", known
        )
        if found[0] == 0:
            return False
        usage = answer.json()["usage"]
        cached = found[4]
        assert (found[3], found[5]) == (usage["prompt_tokens"], usage["completion_tokens"])
        fresh = found[3] - cached
        assert amount == REQUEST + fresh * INPUT + cached * CACHED + found[5] * OUTPUT
        assert found[1] == "all"
        return True

    until(priced, "the routers using the new prices")
    adds_up(stack)


def test_a_hundred_requests_with_one_label_make_a_hundred_bills(stack: Stack) -> None:
    client = stack.openai(default_headers={"x-request-id": "one-label"})

    def ask(_: int) -> None:
        client.chat.completions.create(**QUESTION, max_tokens=3)  # type: ignore[call-overload]  # a mapping

    with ThreadPoolExecutor(10) as threads:
        list(threads.map(ask, range(100)))
    mine = "client_label = 'one-label' AND witness = ?"
    for witness in ("router", "engine"):
        until(lambda w=witness: count(stack, mine, w) == 100, f"the {witness}'s records")  # type: ignore[misc]  # a default
    billed = rows(
        stack,
        "SELECT request_id, SUM(billed_requests) FROM usage_event "
        "WHERE client_label = 'one-label' GROUP BY request_id",
    )
    assert len(billed) == 100
    assert {times for _, times in billed} == {1}
    adds_up(stack)


def test_who_leaves_pays_for_what_was_generated_and_the_report_shows_the_waste(
    stack: Stack,
) -> None:
    stream = stack.openai(default_headers={"x-request-id": "left"}).chat.completions.create(
        **QUESTION, max_tokens=200, stream=True
    )  # type: ignore[call-overload]  # a mapping
    for received, _ in enumerate(stream):
        if received == 5:
            break
    stream.close()
    until(lambda: count(stack, "client_label = 'left'") == 2, "both witnesses' records")
    [[outcome, delivered, generated, wasted, price, amount]] = rows(
        stack,
        "SELECT outcome, delivered_tokens, generated_tokens, wasted_tokens, wasted_nanousd, "
        "amount_nanousd FROM usage_reconciliation WHERE request_id = (SELECT request_id FROM "
        "usage_event WHERE client_label = 'left' AND witness = 'router')",
    )
    assert outcome == "cancelled"
    assert 5 <= delivered <= generated < 200
    assert (wasted, price) == (generated - delivered, wasted * OUTPUT)
    assert amount >= REQUEST + generated * OUTPUT
    answer = stack.http().get("/admin/usage", params={"by": "tenant,model"})
    [row] = answer.raise_for_status().json()["data"]
    assert (row["tenant"], row["model"]) == ("default", "sim")
    assert row["wasted_tokens"] >= wasted
    shown = stack.headrace("usage", "--by", "tenant,model", "--config", config(stack))
    assert row["amount_usd"] in shown.stdout


async def completed_under(stack: Stack, lasting_s: float, seed: int, kill: Any) -> set[str]:
    """Ask for ``lasting_s`` while ``kill`` does its work; return who got a whole answer."""
    chance = random.Random(seed)
    whole: set[str] = set()
    ends_at_s = time.monotonic() + lasting_s

    async def client(http: httpx.AsyncClient, streamed: bool) -> None:
        while time.monotonic() < ends_at_s:
            body = {**QUESTION, "max_tokens": chance.randint(1, 30), "stream": streamed}
            try:
                answer = await http.post("/v1/chat/completions", json=body)
            except httpx.HTTPError:
                await asyncio.sleep(0.05)
                continue
            ended = answer.text.endswith("data: [DONE]\n\n") if streamed else _is_whole(answer)
            if answer.status_code == 200 and ended:
                whole.add(answer.headers["x-headrace-request-id"])
            else:
                await asyncio.sleep(0.05)

    headers = {"authorization": f"Bearer {stack.key}"}
    async with (
        httpx.AsyncClient(base_url=stack.url, headers=headers, timeout=60) as http,
        asyncio.TaskGroup() as group,
    ):
        for index in range(16):
            group.create_task(client(http, streamed=index % 2 == 0))
        await asyncio.sleep(chance.uniform(0.3, 0.7) * lasting_s)
        await asyncio.to_thread(kill)
    return whole


def _is_whole(answer: httpx.Response) -> bool:
    try:
        return "usage" in answer.json()
    except json.JSONDecodeError:
        return False


def is_ready(stack: Stack) -> bool:
    try:
        ready = stack.http(key=None).get("/ready").json()
        return bool(ready["pools"]["sim"]["replicas"] == 2) and not ready.get("control_away")
    except (httpx.HTTPError, KeyError, ValueError):
        return False


def kill_one(*words: str) -> Callable[[Stack], None]:
    """Return what kills one of the processes that have these words."""

    def kill(stack: Stack) -> None:
        stack.processes(*words)[0].send_signal(signal.SIGKILL)

    return kill


def kill_routers_with_their_disk(stack: Stack) -> None:
    """Kill every router and delete its journal before anybody finds it."""
    for router in stack.processes("gateway", "Router"):
        router.send_signal(signal.SIGKILL)
    for journal in (stack.folder / ".headrace" / "sim.journal").glob("router-*"):
        shutil.rmtree(journal)


KILLS = {
    "router": kill_one("gateway", "Router"),
    "engine": kill_one("pool-sim", "Engine"),
    "control": kill_one("control", "Control"),
    "routers with their disk": kill_routers_with_their_disk,
}


@pytest.mark.parametrize(
    ("rounds", "seed"),
    [
        pytest.param(1, 11, id="one round"),
        pytest.param(15, 12, id="15 rounds", marks=pytest.mark.proof),
    ],
)
@pytest.mark.parametrize("victim", KILLS)
def test_every_completed_response_is_in_the_ledger_once_whoever_is_killed(
    stack: Stack, victim: str, rounds: int, seed: int
) -> None:
    for number in range(rounds):
        until(lambda: is_ready(stack), "everything there")
        kill = functools.partial(KILLS[victim], stack)
        whole = asyncio.run(completed_under(stack, 6.0, seed + number, kill))
        assert len(whole) > 20
        # The engine's account of a request may die with it; the router's is durable before
        # its response ends, and lost only with its disk.
        witness = "engine" if "disk" in victim else "router"
        expected = {(each, witness) for each in whole}

        def missing(expected: set[tuple[str, str]] = expected) -> set[tuple[str, str]]:
            return expected - set(rows(stack, "SELECT request_id, witness FROM usage_event"))

        until(lambda: not missing(), "every completed response in the ledger")
        twice = rows(
            stack,
            "SELECT request_id FROM usage_event GROUP BY request_id "
            "HAVING SUM(CASE WHEN witness = 'router' THEN 1 ELSE 0 END) > 1 "
            "OR SUM(billed_requests) > 1 OR SUM(requests) <> 1",
        )
        assert twice == []
        unbilled = [
            request_id
            for request_id, times in rows(
                stack, "SELECT request_id, SUM(billed_requests) FROM usage_event GROUP BY 1"
            )
            if request_id in whole and times != 1
        ]
        assert unbilled == []
    adds_up(stack)


@pytest.mark.proof
def test_a_ledger_that_is_away_for_long_stops_admission_and_loses_nothing() -> None:
    """The journal at its bound stands for a full disk: nothing unbilled is served."""
    found = document()
    for application in found["applications"]:
        application["args"]["journal"] = {"segment_bytes": 65_536, "segments": 2}
    with running_stack(found) as stack:
        control = stack.processes("control", "Control")[0]
        control.send_signal(signal.SIGSTOP)
        whole: list[str] = []

        def refused() -> bool:
            answer = stack.http().post("/v1/chat/completions", json={**QUESTION, "max_tokens": 1})
            if answer.status_code == 200:
                whole.append(answer.headers["x-headrace-request-id"])
                return False
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "usage_unavailable"
            return True

        # Serve replaces a Control that does not answer: it is stopped again and again.
        give_up_at_s = time.monotonic() + 240
        while not refused():
            assert time.monotonic() < give_up_at_s
            for process in stack.processes("control", "Control"):
                process.send_signal(signal.SIGSTOP)
        for process in stack.processes("control", "Control"):
            process.send_signal(signal.SIGCONT)
        until(lambda: not refused(), "requests again")
        until(
            lambda: not set(whole) - {each for (each,) in rows(stack, _IDS)},
            "every completed response in the ledger",
        )
        adds_up(stack)


_IDS = "SELECT request_id FROM usage_event WHERE witness = 'router'"


def test_a_whole_stack_keeps_its_books_in_postgresql() -> None:
    """Keys, prices, usage and reports, with a router killed on the way."""
    found = document()
    with running_postgres() as cluster, fresh_database(cluster) as url:
        found["applications"][0]["args"]["database"] = url
        with running_stack(found) as stack:
            import_prices(stack)
            kill = functools.partial(KILLS["router"], stack)
            whole = asyncio.run(completed_under(stack, 4.0, 21, kill))
            assert len(whole) > 20
            engine = create_engine(url)

            def missing() -> set[str]:
                query = text("SELECT request_id FROM usage_event WHERE witness = 'router'")
                with engine.connect() as connection:
                    return whole - set(connection.execute(query).scalars())

            until(lambda: not missing(), "every completed response in the ledger")
            engine.dispose()
            assert "no differences" in adds_up(stack)
            report = stack.http().get("/admin/usage", params={"by": "key"}).json()
            assert report["data"][0]["key"] == "bootstrap"
            assert report["total"]["requests"] >= len(whole)
            assert report["total"]["amount_nanousd"] > 0
