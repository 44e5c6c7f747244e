"""What clients say, and their keys, stay out of everything that is written down or shown."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import orjson

from tests.e2e.canaries import files_with, request_lines
from tests.e2e.keys import make_key
from tests.e2e.waiting import is_idle, until
from tests.stack import KEY, Stack

PROMPT = "zebra-4711-crosses-nobodys-business"
WRONG_KEY = "hr-abcdefgh-" + "z" * 43
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CLIENTS, ROUNDS, LONG_TOKENS = 8, 4, 2000
LABEL = "secrets-test"


def chat(model: str, **fields: Any) -> bytes:
    messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": [text(PROMPT)]}]
    return orjson.dumps({"model": model, "messages": messages, "max_tokens": 4, **fields})


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def requests_of_every_kind(model: str) -> list[tuple[str, bytes, dict[str, str]]]:
    """Return path, body and headers: good ones, and every way to be refused with content."""
    call = {
        "type": "function",
        "function": {"name": "f", "arguments": orjson.dumps(PROMPT).decode()},
    }
    bodies: list[tuple[str, bytes]] = [
        (CHAT, chat(model)),
        (CHAT, chat(model, stream=True, max_tokens=40)),
        (COMPLETIONS, orjson.dumps({"model": model, "prompt": PROMPT, "max_tokens": 3})),
        (CHAT, chat(model)[:-3]),
        (CHAT, b'{"messages": NaN, "x": "' + PROMPT.encode() + b'"}'),
        (CHAT, PROMPT.encode() + b"\xff"),
        (CHAT, orjson.dumps(PROMPT)),
        (CHAT, chat(model, messages=PROMPT)),
        (CHAT, chat(model, messages=[{"role": PROMPT, "content": "x"}])),
        (CHAT, chat(model, messages=[{"role": "user", "content": [{"type": PROMPT}]}])),
        (CHAT, chat(model, messages=[{"role": "assistant", "tool_calls": [call | {"id": 7}]}])),
        (CHAT, chat(model, temperature=PROMPT)),
        (CHAT, chat(model, stop=[PROMPT] * 17)),
        (CHAT, chat(model, tools=[{"type": PROMPT}])),
        (CHAT, chat(model, tools=[{"type": "function", "function": {"name": f"{PROMPT} !"}}])),
        (CHAT, chat(model, tool_choice=PROMPT)),
        (CHAT, chat(model, response_format={"type": "json_schema", "json_schema": PROMPT})),
        (CHAT, chat(model, logit_bias={"7": PROMPT})),
        (CHAT, chat(model, chat_template=PROMPT)),
        (CHAT, chat("none-of-ours")),
        (COMPLETIONS, orjson.dumps({"model": model, "prompt": [PROMPT, 7]})),
        (COMPLETIONS, orjson.dumps({"model": model, "prompt": f"{PROMPT} " * 60_000})),
    ]
    headers = {"content-type": "application/json"}
    found = [(path, body, headers) for path, body in bodies]
    found.append((CHAT, chat(model), {"content-type": "text/plain"}))
    found.append((CHAT, chat(model), headers | {"authorization": f"Bearer {WRONG_KEY}"}))
    found.append((CHAT, chat(model), headers | {"authorization": "", "x-api-key": WRONG_KEY}))
    found.append((f"{CHAT}?api_key={WRONG_KEY}", chat(model), headers))
    found.append((f"/v1/nothing?api_key={WRONG_KEY}", chat(model), headers))
    return found


async def send_all(
    stack: Stack,
    key: str,
    model: str,
    meanwhile: Callable[[], None] = lambda: None,
    *,
    rounds: int = ROUNDS,
) -> list[httpx.Response]:
    """Send each kind ``rounds`` times, many at once, beside streams that are left at the end.

    ``meanwhile`` is called while the streams run. Returns what was answered to the others.
    """
    kinds = requests_of_every_kind(model)
    open_streams, leave = asyncio.Semaphore(0), asyncio.Event()
    async with httpx.AsyncClient(
        base_url=stack.url,
        headers={"authorization": f"Bearer {key}", "x-request-id": LABEL},
        timeout=240,
        limits=httpx.Limits(max_connections=2 * CLIENTS),
    ) as client:

        async def long() -> None:
            body = chat(model, stream=True, max_tokens=LONG_TOKENS)
            headers = {"content-type": "application/json"}
            async with client.stream("POST", CHAT, content=body, headers=headers) as answer:
                await anext(answer.aiter_bytes())
                open_streams.release()
                await leave.wait()

        async def one(path: str, body: bytes, headers: dict[str, str]) -> httpx.Response:
            return await client.post(path, content=body, headers=headers)

        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(long())
            for _ in range(CLIENTS):
                await open_streams.acquire()
            await asyncio.to_thread(meanwhile)
            answers = await asyncio.gather(*(one(*kind) for kind in kinds for _ in range(rounds)))
            leave.set()
    return answers


def nothing_is_told(stack: Stack, key: str, answers: list[httpx.Response]) -> None:
    """Look for the canaries in every refusal, every file of the stack and what it shows."""
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {400, 401, 404, 415} <= {answer.status_code for answer in refused}
    assert any(answer.status_code == 200 for answer in answers)
    words = (PROMPT, WRONG_KEY, key, KEY)
    for answer in refused:
        shown = answer.text + str(answer.headers)
        assert not any(word in shown for word in words), shown
    served = [answer for answer in answers if answer.url.path in (CHAT, COMPLETIONS)]
    until(
        lambda: (
            sum(e.get("client_request_id") == LABEL for e in request_lines(stack))
            >= len(served) + CLIENTS
        ),
        "the log is written",
    )
    with stack.http() as client:
        for path in ("/metrics", "/ready", "/v1/models", "/admin/keys", "/admin/usage"):
            shown = client.get(path).text
            assert not any(word in shown for word in words), path
    written = [path for path in files_with(stack.folder, *words) if "planted" not in path]
    assert written == []
    planted = stack.folder / "r" / "planted.log"
    planted.write_text(f"... {PROMPT} ...")
    assert files_with(stack.folder, *words) == [str(planted)], "the search finds what is there"
    planted.unlink()


async def test_under_load_and_at_an_engines_death_nothing_is_told(fleet_stack: Stack) -> None:
    def kill_an_engine() -> None:
        victim, *_ = fleet_stack.processes("pool-wide", "Engine")
        victim.kill()

    key = await asyncio.to_thread(make_key, fleet_stack)
    answers = await send_all(fleet_stack, key, "wide", kill_an_engine)
    await asyncio.to_thread(until, lambda: is_idle(fleet_stack), "all has ended")
    await asyncio.to_thread(nothing_is_told, fleet_stack, key, answers)


async def test_the_real_engine_tells_nothing_either(local_stack: Stack) -> None:
    """vLLM has lines of its own, and refuses in its own words."""
    key = await asyncio.to_thread(make_key, local_stack)
    answers = await send_all(local_stack, key, "smollm2", rounds=1)
    await asyncio.to_thread(until, lambda: is_idle(local_stack), "all has ended")
    await asyncio.to_thread(nothing_is_told, local_stack, key, answers)
