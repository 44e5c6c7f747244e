"""What a drill sees of a stack, and which processes it may end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

import httpx
import pytest

from serve_app.drills.frame import DrillImpossible, NotMeasured, NotSeen
from serve_app.drills.load import Load, Stream, Streams
from serve_app.drills.target import Names, Target

METRICS = """\
# TYPE headrace_replica_up gauge
headrace_replica_up{pool="a",replica="1"} 1
headrace_replica_up{pool="b",replica="2"} 1
# TYPE headrace_engine_simulated gauge
headrace_engine_simulated{pool="a",replica="1"} 1
headrace_engine_simulated{pool="b",replica="2"} %d
# TYPE headrace_in_flight gauge
headrace_in_flight{pool="a"} %d
# TYPE headrace_queue_depth gauge
headrace_queue_depth{pool="a"} 0
# TYPE headrace_engine_running gauge
headrace_engine_running{pool="a"} 0
"""
ENGINE_WAITING = "# TYPE headrace_engine_waiting gauge\nheadrace_engine_waiting 0\n"


def target(simulated: int = 1, in_flight: int = 0, **routes: httpx.Response) -> Target:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            return httpx.Response(200, text=METRICS % (simulated, in_flight) + ENGINE_WAITING)
        return routes[request.url.path.rpartition("/")[2]]

    transport = httpx.MockTransport(answer)
    return Target(httpx.AsyncClient(transport=transport, base_url="http://stack"), Names())


async def test_a_stack_is_simulated_only_if_every_replica_is() -> None:
    assert await target(simulated=1).simulated()
    assert not await target(simulated=0).simulated()
    mute = httpx.MockTransport(lambda _: httpx.Response(200, text=""))
    nothing = Target(httpx.AsyncClient(transport=mute, base_url="http://stack"), Names())
    assert not await nothing.simulated(), "who says nothing is not taken for a simulation"


async def test_metrics_are_summed_by_labels_and_idle_means_nothing_held() -> None:
    assert await target().metric("headrace_replica_up") == 2
    assert await target().metric("headrace_replica_up", pool="a") == 1
    assert await target().metric("headrace_nothing_total") == 0
    with pytest.raises(NotMeasured, match="no headrace_nothing"):
        await target().metric("headrace_nothing")
    assert await target().idle()
    assert not await target(in_flight=1).idle()


async def test_who_says_nothing_of_a_number_is_not_taken_for_idle() -> None:
    mute = httpx.MockTransport(lambda _: httpx.Response(200, text=METRICS % (1, 0)))
    client = httpx.AsyncClient(transport=mute, base_url="http://stack")
    with pytest.raises(NotMeasured, match="no headrace_engine_waiting"):
        await Target(client, Names()).idle()


async def test_a_key_is_revoked_when_it_never_becomes_known_and_when_its_use_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve_app.drills.target.KEY_KNOWN_S", 0.0)
    known, revoked = [401], []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(201, json={"id": "k1", "key": "secret"})
        if request.method == "DELETE":
            revoked.append(request.url.path)
        return httpx.Response(known[0])

    transport = httpx.MockTransport(answer)
    stack = Target(httpx.AsyncClient(transport=transport, base_url="http://stack"), Names())
    with pytest.raises(TimeoutError):
        async with stack.key(tenant="acme"):
            pass
    known[0] = 200
    monkeypatch.setattr("serve_app.drills.target.KEY_KNOWN_S", 60.0)
    with pytest.raises(NotSeen):
        async with stack.key(tenant="acme"):
            raise NotSeen("the end")
    assert revoked == ["/admin/keys/k1"] * 2


def test_processes_that_are_not_here_are_said() -> None:
    client = httpx.AsyncClient()
    with pytest.raises(DrillImpossible, match="on this node: run the drill where it runs"):
        Target(client, Names(), root=os.getpid()).processes(":pool-none:", "Engine")


def test_without_a_root_no_process_is_found_whatever_runs_here() -> None:
    with pytest.raises(DrillImpossible, match="--root PID"):
        Target(httpx.AsyncClient(), Names()).processes()


def test_processes_are_those_below_the_root_with_the_title() -> None:
    sleeping = "import time; time.sleep(60)"
    title = "ServeReplica:pool-sim:Engine"
    child = subprocess.Popen([sys.executable, "-c", sleeping, title])
    try:
        found = Target(httpx.AsyncClient(), Names(), root=os.getpid()).processes(
            ":pool-sim:", "Engine"
        )
        assert [each.pid for each in found] == [child.pid]
    finally:
        child.kill()
        child.wait()


async def test_a_load_counts_what_was_answered_in_full_and_names_what_was_not() -> None:
    good = httpx.Response(200, json={"usage": {"completion_tokens": 10}})
    load = Load(target(completions=good), "sim")
    assert await load.ask()
    short = httpx.Response(200, json={"usage": {"completion_tokens": 4}})
    load.target = target(completions=short)
    assert not await load.ask()
    load.target = target(completions=httpx.Response(500))
    assert not await load.ask()
    assert load.answered == 1
    assert load.described() == "1 x 4 of 10 tokens, 1 x 500"


async def test_what_ends_a_drill_under_load_is_raised_as_it_is() -> None:
    good = httpx.Response(200, json={"usage": {"completion_tokens": 10}})
    load = Load(target(completions=good), "sim")

    async def under_load() -> None:
        async with load.at_rate(1000.0):
            await asyncio.sleep(0)
            raise NotSeen("the end")

    with pytest.raises(NotSeen):
        await under_load()


SSE: dict[str, tuple[list[str], tuple[str | None, int]]] = {
    "done": (
        [
            'data: {"choices":[{"text":" bab"}]}',
            'data: {"choices":[{"text":" bad bag"}]}',
            "data: [DONE]",
        ],
        ("done", 3),
    ),
    "error": (
        [
            'data: {"choices":[{"text":" bab"}]}',
            'data: {"error":{"code":"engine_error"}}',
            "data: [DONE]",
        ],
        ("error", 1),
    ),
    "cut": (['data: {"choices":[{"text":" bab"}]}'], ("cut", 1)),
}


@pytest.mark.parametrize("how", SSE)
async def test_streams_are_told_apart_by_their_end(how: str) -> None:
    lines, wanted = SSE[how]
    content = "\n\n".join([*lines, ""]).encode()
    streams = Streams(target(completions=httpx.Response(200, content=content)), "sim", 3)
    streams.open(1)
    assert await streams.ended(within_s=120)
    [stream] = streams.all
    assert (stream.ended, stream.tokens) == wanted


async def test_a_refused_stream_is_no_cut_one() -> None:
    streams = Streams(target(completions=httpx.Response(503)), "sim", 3)
    streams.open(2)
    assert await streams.ended(within_s=120)
    assert (streams.count("refused"), streams.began()) == (2, 0)
    assert isinstance(streams.all[0], Stream)


def test_names_have_the_simulated_stacks_own() -> None:
    names: Any = Names()
    assert (names.pool, names.tight, names.quota_tenant) == ("sim", "tight", "drill-quota")
