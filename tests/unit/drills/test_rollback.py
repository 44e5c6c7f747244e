"""The drill of a bad update goes back to the good one, however it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from serve_app.drills import rollback
from serve_app.drills.frame import Stage, Verdict
from serve_app.drills.target import Deployment, Names, Target

GOOD = {"applications": [{"args": {"name": "sim", "engine": {"max_model_len": 100}}}]}


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Deploy nothing; return the context lengths that were."""
    lengths: list[int] = []

    async def note(_: Deployment, document: Any) -> None:
        await asyncio.sleep(0)
        lengths.append(document["applications"][0]["args"]["engine"]["max_model_len"])

    monkeypatch.setattr(rollback, "_deploy", note)
    return lengths


def stage(ready: Callable[[], httpx.Response]) -> Stage:
    now = [0.0]

    async def sleep(seconds: float) -> None:
        now[0] += seconds
        await asyncio.sleep(0)

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/ready":
            return ready()
        return httpx.Response(200, json={"usage": {"completion_tokens": 10}})

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://stack")
    deployment = Deployment("http://dashboard", GOOD, {}, Path())
    target = Target(client, Names(), deployment=deployment)
    said: list[str] = []
    return Stage(target, Verdict("rollback"), said.append, lambda: now[0], sleep)


def answering(*others: httpx.Response | Exception) -> Callable[[], httpx.Response]:
    """Say that two replicas are there: once, then the others, then for good."""
    good = httpx.Response(200, json={"pools": {"sim": {"replicas": 2}}})
    answers = [good, *others]

    def ready() -> httpx.Response:
        found = answers.pop(0) if answers else good
        if isinstance(found, Exception):
            raise found
        return found

    return ready


async def test_an_answer_that_is_missing_is_no_missing_replica(deployed: list[int]) -> None:
    acted = stage(answering(httpx.ReadTimeout("slow"), httpx.ConnectError("refused")))
    await rollback.run(acted)
    assert acted.verdict.passed, acted.verdict
    assert acted.verdict.figures["least_replicas"] == 2
    assert deployed == [rollback.TOO_LONG, 100]


async def test_a_drill_that_breaks_off_goes_back_all_the_same(deployed: list[int]) -> None:
    with pytest.raises(ValueError, match="Expecting value"):
        await rollback.run(stage(answering(httpx.Response(200, text="<html>"))))
    assert deployed == [rollback.TOO_LONG, 100]


async def test_a_drill_that_is_cancelled_goes_back_even_if_it_is_again(
    deployed: list[int],
) -> None:
    acted = stage(answering())
    running = asyncio.create_task(rollback.run(acted))

    def end_it() -> httpx.Response:
        running.cancel()
        asyncio.get_running_loop().call_soon(running.cancel)
        return httpx.Response(200, json={"pools": {"sim": {"replicas": 2}}})

    asked = answering()
    acted.target.client._transport = httpx.MockTransport(
        lambda request: end_it() if deployed and request.url.path == "/ready" else asked()
    )
    with pytest.raises(asyncio.CancelledError):
        await running
    assert deployed == [rollback.TOO_LONG, 100]


async def test_the_configuration_is_in_a_file_of_the_user_alone_that_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Path, int, str]] = []

    def look(file: Path) -> None:
        seen.append((file, file.stat().st_mode & 0o777, file.read_text()))

    def left(file: Path) -> list[Path]:
        return [*([file] if file.exists() else []), *tmp_path.iterdir()]

    async def start(_serve: str, _deploy: str, name: str, *_: str, **__: Any) -> Any:
        look(Path(name))

        async def communicate() -> tuple[bytes, None]:
            return b"", None

        return SimpleNamespace(communicate=communicate, returncode=0)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    await rollback._deploy(Deployment("http://dashboard", GOOD, {}, tmp_path), GOOD)
    [(file, mode, text)] = seen
    assert (mode, "max_model_len: 100" in text) == (0o600, True)
    assert left(file) == []
