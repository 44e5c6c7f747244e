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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from sqlalchemy import create_engine, text

from serve_app.core.pricing import dollars
from serve_app.treasury import ABANDON_S
from tests.e2e import fleet, policies
from tests.e2e.fleet import ENGINES
from tests.e2e.keys import make_key
from tests.e2e.traffic import Load, wait_s
from tests.e2e.waiting import until
from tests.postgres import Server, fresh_database, running_server
from tests.stack import ROOT, Stack, running_stack

PRICES = "currency: USD\ncards:\n  all: {input: 1, cached_input: 0.1, output: 10, request: 0.001}\n"
REQUEST, INPUT, CACHED, OUTPUT = 1_000_000, 1000, 100, 10_000
KILL_EVERY_S = 8
# A minute and a half: nobody who leaves is so slow about it.
GENERATED_MOST = 18_000
# So many answers are asked for, however slow they are.
WHOLE_LEAST = 21
# What sixteen clients would spend in a second is more.
A_SECOND_NANOUSD = 20_000_000
QUESTION = {"model": "quick", "messages": [{"role": "user", "content": "tell me a story"}]}


@pytest.fixture(scope="module")
def stack(fleet_stack: Stack) -> Stack:
    return fleet_stack


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
        **QUESTION, max_tokens=GENERATED_MOST, stream=True
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
    assert 5 <= delivered <= generated < GENERATED_MOST
    assert (wasted, price) == (generated - delivered, wasted * OUTPUT)
    assert amount >= REQUEST + generated * OUTPUT
    answer = stack.http().get("/admin/usage", params={"by": "tenant,model"})
    rows_by_name = {
        (each["tenant"], each["model"]): each for each in answer.raise_for_status().json()["data"]
    }
    row = rows_by_name["default", "quick"]
    assert row["wasted_tokens"] >= wasted
    shown = stack.headrace("usage", "--by", "tenant,model", "--config", config(stack))
    assert row["amount_usd"] in shown.stdout


async def completed_under(
    stack: Stack,
    lasting_s: float,
    seed: int,
    kill: Any,
    *,
    model: str = "quick",
    kills: int = 1,
    key: str | None = None,
) -> set[str]:
    """Ask for ``lasting_s`` or more while ``kill`` does its work; return who got a whole answer.

    Every request ends, well or badly, before its client's patience does (httpx.ReadTimeout).
    """
    chance = random.Random(seed)
    whole: set[str] = set()
    begun_at_s = time.monotonic()
    ends_at_s = begun_at_s + lasting_s

    async def client(http: httpx.AsyncClient, streamed: bool) -> None:
        while time.monotonic() < ends_at_s or len(whole) < WHOLE_LEAST:
            asked = {"model": model, "max_tokens": chance.randint(1, 30), "stream": streamed}
            try:
                answer = await http.post("/v1/chat/completions", json=QUESTION | asked)
            except (httpx.NetworkError, httpx.ProtocolError):
                await asyncio.sleep(0.05)
                continue
            ended = answer.text.endswith("data: [DONE]\n\n") if streamed else _is_whole(answer)
            if answer.status_code == 200 and ended:
                whole.add(answer.headers["x-headrace-request-id"])
            else:
                await asyncio.sleep(0.05)

    headers = {"authorization": f"Bearer {key or stack.key}"}
    async with (
        httpx.AsyncClient(base_url=stack.url, headers=headers, timeout=60) as http,
        asyncio.TaskGroup() as group,
    ):
        for index in range(16):
            group.create_task(client(http, streamed=index % 2 == 0))
        # Once: in the middle, so that there are answers before and after it.
        first, last = (0.3, 0.7) if kills == 1 else (0.0, 1.0)
        for after_s in sorted(chance.uniform(first, last) * lasting_s for _ in range(kills)):
            await asyncio.sleep(max(0.0, begun_at_s + after_s - time.monotonic()))
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
        return bool(ready["pools"]["quick"]["replicas"] == ENGINES) and not ready.get(
            "control_away"
        )
    except (httpx.HTTPError, KeyError, ValueError):
        return False


def kill_one(*words: str) -> Callable[[Stack], None]:
    """Return what kills one of the processes that have these words."""

    def kill(stack: Stack) -> None:
        stack.processes(*words)[0].send_signal(signal.SIGKILL)

    return kill


def kill_routers_with_their_disk(stack: Stack) -> None:
    """Kill every router and delete its journal before anybody finds it."""
    journals = list((stack.folder / ".headrace" / "sim.journal").glob("router-*"))
    for router in stack.processes("gateway", "Router"):
        router.send_signal(signal.SIGKILL)
    for journal in journals:
        # Somebody may have found it, and cleared it away.
        shutil.rmtree(journal, ignore_errors=True)


KILLS = {
    "router": kill_one("gateway", "Router"),
    "engine": kill_one("pool-quick", "Engine"),
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
        assert len(whole) >= WHOLE_LEAST
        # The engine's account of a request may die with it; the router's is durable before
        # its response ends, and lost only with its disk.
        are_billed_once(
            functools.partial(rows, stack), whole, "engine" if "disk" in victim else "router"
        )
    adds_up(stack)


def are_billed_once(ask: Callable[[str], Iterable[Any]], whole: set[str], witness: str) -> None:
    """Wait until ``witness`` has told the ledger of all these; nothing is in there twice.

    ``ask`` puts a query to the ledger.
    """
    expected = {(each, witness) for each in whole}

    def missing() -> set[tuple[str, str]]:
        return expected - {(*row,) for row in ask("SELECT request_id, witness FROM usage_event")}

    until(lambda: not missing(), "every completed response in the ledger")
    twice = ask(
        "SELECT request_id FROM usage_event GROUP BY request_id "
        "HAVING SUM(CASE WHEN witness = 'router' THEN 1 ELSE 0 END) > 1 "
        "OR SUM(billed_requests) > 1 OR SUM(requests) <> 1",
    )
    assert list(twice) == []
    query = "SELECT request_id, SUM(billed_requests) FROM usage_event GROUP BY 1"
    billed = dict(ask(query))
    assert [each for each in whole if billed[each] != 1] == []


@pytest.mark.proof
@pytest.mark.parametrize(
    "lasting_s",
    [
        pytest.param(60, id="1 minute"),
        pytest.param(900, id="15 minutes", marks=pytest.mark.timeout(1800)),
    ],
)
def test_whoever_is_killed_at_random_no_request_hangs_and_the_books_add_up(
    stack: Stack, lasting_s: int
) -> None:
    """A router, an engine or Control, every eight seconds or so; a budget that is spent meanwhile.

    In the end routers hold nothing of it: the living gave it back, and the dead are forgotten.
    """
    chance = random.Random(lasting_s)
    tenant, amount_nanousd = f"stormy-{lasting_s}", lasting_s * A_SECOND_NANOUSD
    import_prices(stack)
    set_budget(stack, tenant, amount_nanousd)
    key = make_key(stack, tenant=tenant)
    killed: Counter[str] = Counter()

    def kill() -> None:
        role = chance.choice(["router", "engine", "control"])
        # What is being replaced may not be there to be killed.
        with contextlib.suppress(IndexError, psutil.NoSuchProcess):
            KILLS[role](stack)
            killed[role] += 1

    whole = asyncio.run(
        completed_under(stack, lasting_s, lasting_s, kill, kills=lasting_s // KILL_EVERY_S, key=key)
    )
    print(f"{len(whole)} whole answers; killed: {dict(killed)}")
    assert len(whole) > lasting_s
    fleet.settle(stack)
    are_billed_once(functools.partial(rows, stack), whole, "router")
    # One that is made smaller is called back from whoever has it.
    set_budget(stack, tenant, 1)
    until(lambda: held(stack, tenant) == 0, "routers hold nothing", within_s=3 * ABANDON_S)
    [[spent]] = rows(stack, "SELECT SUM(amount_nanousd) FROM usage_event WHERE tenant = ?", tenant)
    print(f"{spent} of {amount_nanousd} nano-dollars spent")
    assert 0 < spent <= amount_nanousd
    adds_up(stack)


def set_budget(stack: Stack, tenant: str, amount_nanousd: int) -> None:
    words = ("budgets", "set", "tenant", tenant, dollars(amount_nanousd), "--window", "month")
    done = stack.headrace(*words, "--config", config(stack))
    assert done.returncode == 0, done.stderr


def held(stack: Stack, tenant: str) -> float:
    """Return the dollars at routers, as ``headrace budgets`` tells them."""
    done = stack.headrace("budgets", "list", "--config", config(stack))
    assert done.returncode == 0, done.stderr
    [line] = [each for each in done.stdout.splitlines() if f" {tenant} " in each]
    return float(line.split()[5])


@pytest.mark.proof
def test_a_ledger_that_is_away_for_long_stops_admission_and_loses_nothing() -> None:
    """The journal at its bound stands for a full disk: nothing unbilled is served."""
    found = fleet.document()
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


def test_a_whole_stack_keeps_its_books_in_postgresql(policies_stack: Stack) -> None:
    """Keys, prices, usage and reports, with the router killed on the way."""
    stack = policies_stack
    import_prices(stack)
    kill = functools.partial(KILLS["router"], stack)
    whole = asyncio.run(completed_under(stack, 4.0, 21, kill, model="chat"))
    assert len(whole) >= WHOLE_LEAST
    until(lambda: policies.is_whole(stack), "every pool's replicas known to the new router")
    with postgresql(stack) as ask:
        are_billed_once(ask, whole, "router")
    assert "no differences" in adds_up(stack)
    report = stack.http().get("/admin/usage", params={"by": "key"}).json()
    assert "bootstrap" in {row["key"] for row in report["data"]}
    assert report["total"]["requests"] >= len(whole)
    assert report["total"]["amount_nanousd"] > 0


@contextlib.contextmanager
def postgresql(stack: Stack) -> Iterator[Callable[[str], Iterable[Any]]]:
    """Yield what puts a query to the stack's PostgreSQL."""
    url = yaml.safe_load(config(stack).read_text())["applications"][0]["args"]["database"]
    assert url.startswith("postgresql")
    engine = create_engine(url)

    def ask(query: str) -> Iterable[Any]:
        with engine.connect() as connection:
            return connection.execute(text(query)).all()

    try:
        yield ask
    finally:
        engine.dispose()


@pytest.fixture
def postgres() -> Iterator[Server]:
    with running_server(durable=True) as server:
        yield server


@pytest.fixture
def stack_on(postgres: Server) -> Iterator[Stack]:
    """The simulated engines of configs/sim.yaml, their books in a PostgreSQL of their own."""
    found = yaml.safe_load((ROOT / "configs" / "sim.yaml").read_text())
    with fresh_database(postgres.url) as url:
        found["applications"][0]["args"]["database"] = url
        with running_stack(found, ready_timeout_s=480) as stack:
            yield stack


@pytest.mark.proof
async def test_the_ledgers_database_killed_under_load_fails_and_loses_nothing(
    postgres: Server, stack_on: Stack
) -> None:
    """Every process of it; the second time Control too, which cannot begin without it."""
    stack = stack_on
    import_prices(stack)
    load = Load(stack, "sim", words=10, rate_per_s=4)
    async with load.running():
        await wait_s(4)
        for victims in ([], stack.processes("control", "Control")):
            await asyncio.to_thread(postgres.kill)
            for victim in victims:
                victim.kill()
            await wait_s(10)
            assert await asyncio.to_thread(status, stack, "/ready") == 200
            assert await asyncio.to_thread(status, stack, "/admin/keys") == 503
            postgres.start()
            await asyncio.to_thread(postgres.wait)
            begun_s = time.monotonic()
            await asyncio.to_thread(
                until, lambda: status(stack, "/admin/keys") == 200, "Control is whole"
            )
            print(f"keys are listed {time.monotonic() - begun_s:.1f} s after the database")
    print(f"{len(load.answers)} requests")
    assert load.failures() == []
    whole = {answer.request_id for answer in load.answers if answer.request_id}
    assert len(whole) == len(load.answers) > 80, "the load was really sent"
    with postgresql(stack) as ask:
        await asyncio.to_thread(are_billed_once, ask, whole, "router")
    assert "no differences" in await asyncio.to_thread(adds_up, stack)


def status(stack: Stack, path: str) -> int:
    """Ask for a path; return the answer's status."""
    return stack.http().get(path).status_code
