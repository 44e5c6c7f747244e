"""One budget through three routers: nearly all of it can be spent, and never more."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.e2e.keys import ASKED_IN_A_ROW, EACH_ITS_OWN, make_key
from tests.e2e.waiting import patiently, until
from tests.stack import Stack

PRICES = "currency: USD\ncards:\n  all: {input: 1, cached_input: 0.1, output: 10, request: 0.001}\n"
NANO = 10**9


@pytest.fixture(scope="module")
def stack(fleet_stack: Stack) -> Stack:
    file = fleet_stack.folder / "prices.yaml"
    file.write_text(PRICES)
    headrace(fleet_stack, "prices", "import", file)
    return fleet_stack


def headrace(stack: Stack, *words: str | Path) -> str:
    done = stack.headrace(*words, "--config", stack.folder / "stack.yaml")
    assert done.returncode == 0, done.stderr
    return done.stdout


def spent(stack: Stack, tenant: str) -> int:
    """Return what the ledger itself says."""
    file = f"file:{stack.folder}/.headrace/sim.db?mode=ro"
    query = "SELECT COALESCE(SUM(amount_nanousd), 0) FROM usage_event WHERE tenant = ?"
    with contextlib.closing(sqlite3.connect(file, uri=True, timeout=30)) as database:
        return int(database.execute(query, (tenant,)).fetchone()[0])


async def spend(stack: Stack, key: str, clients: int, **fields: Any) -> list[dict[str, Any]]:
    """Ask from many clients at once until the budget is spent; return the last refusals."""
    body = {"model": "quick", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    headers = {"authorization": f"Bearer {key}"}

    async def one() -> dict[str, Any]:
        while True:
            answer = await client.post("/v1/chat/completions", json=body | fields)
            if answer.status_code == 200:
                continue
            error: dict[str, Any] = answer.json()["error"]
            if error["code"] == "insufficient_quota":
                assert answer.status_code == 429
                assert answer.headers["x-should-retry"] == "false"
                return error
            assert error["code"] in ("budget_reserved", "limits_unavailable"), error
            await asyncio.sleep(0.2)

    async with httpx.AsyncClient(
        base_url=stack.url, headers=headers, timeout=240, limits=EACH_ITS_OWN
    ) as client:
        return list(await asyncio.gather(*(one() for _ in range(clients))))


def settled(stack: Stack, tenant: str) -> bool:
    """Whether nothing of the tenant's budget is at a router any more."""
    for line in headrace(stack, "budgets", "list").splitlines():
        words = line.split()
        if words[:2] == ["tenant", tenant]:
            return float(words[4]) * NANO == spent(stack, tenant)
    return False


async def test_a_budget_is_spent_nearly_whole_and_never_over(stack: Stack) -> None:
    headrace(stack, "budgets", "set", "tenant", "acme", "0.3", "--window", "month")
    key = make_key(stack, tenant="acme")
    errors = await spend(stack, key, 48)
    assert {error["type"] for error in errors} == {"insufficient_quota"}
    until(lambda: settled(stack, "acme"), "the ledger has everything")
    assert 0.99 * 0.3 * NANO <= spent(stack, "acme") <= 0.3 * NANO
    headrace(stack, "usage", "--verify")

    with pytest.raises(openai.RateLimitError) as refused:
        stack.openai(api_key=key, max_retries=3).completions.create(model="quick", prompt="x")
    assert refused.value.code == "insufficient_quota"

    headrace(stack, "budgets", "add", "tenant", "acme", "0.1")

    def served() -> bool:
        with stack.http(key) as client:
            body = {"model": "quick", "prompt": "x", "max_tokens": 1}
            return client.post("/v1/completions", json=body).status_code == 200

    until(served, "what was added can be spent")


async def test_control_that_is_killed_again_and_again_lends_nothing_twice(stack: Stack) -> None:
    headrace(stack, "budgets", "set", "tenant", "storm", "0.2")
    key = make_key(stack, tenant="storm")
    spending = asyncio.create_task(spend(stack, key, 24))
    for _ in range(2):
        await asyncio.sleep(2.0)
        for control in stack.processes("ServeReplica:control:Control"):
            with contextlib.suppress(psutil.NoSuchProcess):
                control.send_signal(signal.SIGKILL)
        await asyncio.to_thread(
            until, lambda: bool(stack.processes("ServeReplica:control:Control")), "Control"
        )
    await spending
    until(lambda: settled(stack, "storm"), "the ledger has everything")
    assert spent(stack, "storm") <= 0.2 * NANO


def test_an_answer_is_no_longer_than_its_budget_pays_for(stack: Stack) -> None:
    headrace(stack, "budgets", "set", "tenant", "small", "0.002")
    key = make_key(stack, tenant="small")
    with stack.http(key) as client:
        body = {"model": "quick", "prompt": "x", "max_tokens": 5000}
        answer = patiently(lambda: client.post("/v1/completions", json=body))
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-headrace-budget"].startswith("max_tokens=")
    [choice] = answer.json()["choices"]
    assert choice["finish_reason"] == "length"
    assert 16 <= answer.json()["usage"]["completion_tokens"] < 100
    until(lambda: spent(stack, "small") > 0, "the ledger has it")
    assert spent(stack, "small") <= 0.002 * NANO


def test_a_stream_goes_on_as_long_as_there_is_budget_and_lets_others_in(stack: Stack) -> None:
    headrace(stack, "budgets", "set", "tenant", "long", "0.012")
    key = make_key(stack, tenant="long")
    body = {"model": "quick", "prompt": "x", "max_tokens": 8}
    long = {**body, "max_tokens": 5000, "stream": True, "stream_options": {"include_usage": True}}
    with contextlib.ExitStack() as open_:
        client = open_.enter_context(stack.http(key))
        stream = patiently(
            lambda: open_.enter_context(client.stream("POST", "/v1/completions", json=long))
        )
        lines = stream.iter_lines()
        first = next(lines)
        # It asked for four times the budget; a short answer is paid for beside it.
        short = patiently(lambda: client.post("/v1/completions", json=body))
        assert short.status_code == 200, short.text
        events = [
            line.removeprefix("data: ") for line in (first, *lines) if line.startswith("data: ")
        ]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    reasons = [choice["finish_reason"] for each in chunks for choice in each["choices"]]
    assert reasons[-1] == "length"
    used = chunks[-1]["usage"]["completion_tokens"]
    assert used > 900, "more than the 512 tokens that were reserved at first"
    until(lambda: settled(stack, "long"), "the ledger has everything")
    assert 0.95 * 0.012 * NANO <= spent(stack, "long") <= 0.012 * NANO


def test_prices_corrections_and_who_changed_what_are_had_over_http(stack: Stack) -> None:
    with stack.http() as admin:
        *_, book = admin.get("/admin/prices").json()["data"]
        assert book["version"] >= 1
        assert book["in_force"]
        headrace(stack, "budgets", "set", "tenant", "taken", "1")
        body = {"model": "quick", "prompt": "x", "max_tokens": 4}
        with stack.http(make_key(stack, tenant="taken")) as client:
            served = patiently(lambda: client.post("/v1/completions", json=body))
        where = f"/admin/usage/{served.headers['x-headrace-request-id']}/reversal"
        reason = {"reason": "a test"}
        until(lambda: admin.post(where, json=reason).status_code != 404, "the ledger has it")
        assert admin.post(where, json=reason).json()["new"] is False
        until(lambda: spent(stack, "taken") == 0, "both witnesses have spoken, or one")

        def told(subject: str) -> list[dict[str, Any]]:
            found: list[dict[str, Any]]
            found = admin.get("/admin/audit", params={"subject": subject}).json()["data"]
            return found

        [imported, *_] = told("prices")
        assert (imported["action"], imported["via"]) == ("prices.import", "command")
        [reversal, *_] = told("request")
        assert (reversal["actor"], reversal["note"]) == ("key bootstrap", "a test")
        [key, *_] = told("key")
        assert (key["action"], key["via"]) == ("key.create", "http")
        [limits] = told("limits")
        assert limits["via"] == "configuration"
        assert limits["after"]["tenants.quiet.limits.concurrent"] == 5000
    verified = stack.headrace("usage", "--verify", "--config", stack.folder / "stack.yaml")
    assert verified.returncode == 0, verified.stdout


def test_a_budget_that_would_be_too_large_is_refused_by_the_fields_name(stack: Stack) -> None:
    where = "/admin/budgets/tenant/vast"
    with stack.http() as admin:
        admin.put(where, json={"amount_usd": "1000000000"}).raise_for_status()
        refused = admin.post(f"{where}/credits", json={"amount_usd": "1"})
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["param"] == "amount_usd"
        assert "at most 1000000000" in refused.json()["error"]["message"]
        found = {each["id"]: each for each in admin.get("/admin/budgets").json()["data"]}
    assert found["vast"]["amount_usd"] == "1000000000"


def grants(stack: Stack, name: str) -> int:
    """Return what routers hold of a budget, whether it is still there or not."""
    file = f"file:{stack.folder}/.headrace/sim.db?mode=ro"
    query = "SELECT COALESCE(SUM(granted - released), 0) FROM budget_grant WHERE id = ?"
    with contextlib.closing(sqlite3.connect(file, uri=True, timeout=30)) as database:
        return int(database.execute(query, (name,)).fetchone()[0])


def refused_by_all(stack: Stack, key: str) -> bool:
    """Whether every router refuses a key: each is met, by connections of their own."""
    with stack.http(key, limits=EACH_ITS_OWN) as client:
        asked = (client.get("/v1/models") for _ in range(ASKED_IN_A_ROW))
        return all(answer.status_code == 401 for answer in asked)


def test_a_tenant_that_is_removed_ends_its_open_requests_and_leaves_nothing(stack: Stack) -> None:
    """Its key, its budget and the key's, revoked and removed while answers run."""
    with stack.http() as admin:
        secret = make_key(stack, tenant="leaving", name="leaving-1")
        keys = admin.get("/admin/keys").json()["data"]
        [name] = [each["id"] for each in keys if each["name"] == "leaving-1"]
        where = ("/admin/budgets/tenant/leaving", f"/admin/budgets/key/{name}")
        for each in where:
            admin.put(each, json={"amount_usd": "1", "window": "month"}).raise_for_status()
        # A router that knows a key that was made later knows the budgets.
        make_key(stack, tenant="leaving", name="leaving-2")
        body = {"model": "small", "prompt": "x", "max_tokens": 200, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        with contextlib.ExitStack() as open_:
            streams = []
            for _ in range(6):
                client = open_.enter_context(stack.http(secret))
                stream = patiently(
                    lambda by=client: open_.enter_context(  # type: ignore[misc]  # a default
                        by.stream("POST", "/v1/completions", json=body)
                    )
                )
                assert stream.status_code == 200
                lines = stream.iter_lines()
                assert next(lines).startswith("data: {")
                streams.append((stream.headers["x-headrace-request-id"], lines))
            assert grants(stack, "leaving") > 0
            for each in where:
                assert admin.delete(each).json()["deleted"]
            assert admin.delete(f"/admin/keys/{name}").json()["state"] == "revoked"
            until(lambda: refused_by_all(stack, secret), "no router takes the key")
            for _, lines in streams:
                assert [line for line in lines if line][-1] == "data: [DONE]"

    def billed() -> dict[str, int]:
        file = f"file:{stack.folder}/.headrace/sim.db?mode=ro"
        query = (
            "SELECT request_id, SUM(billed_requests) FROM usage_event "
            "WHERE tenant = 'leaving' GROUP BY 1"
        )
        with contextlib.closing(sqlite3.connect(file, uri=True, timeout=30)) as database:
            return dict(database.execute(query).fetchall())

    until(lambda: {each for each, _ in streams} <= set(billed()), "the ledger has them")
    assert set(billed().values()) == {1}
    until(lambda: grants(stack, "leaving") == 0, "routers hold nothing of the tenant's")
    until(lambda: grants(stack, name) == 0, "routers hold nothing of the key's")
    headrace(stack, "usage", "--verify")
