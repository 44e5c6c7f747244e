"""What a router refuses so that its own process lives."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.types import PriorityClass, TenantId
from serve_app.errors import ApiError, RateLimited
from serve_app.overload import LATE_PROBES, BodyMemory, Overload, Overloaded, open_descriptors
from tests.properties import examples

LAG_S = 0.5
STANDARD, CRITICAL = PriorityClass.STANDARD, PriorityClass.CRITICAL
ACME, OTHER = TenantId("acme"), TenantId("other")


def overload(descriptors: Callable[[], tuple[int, int]] = lambda: (10, 1000)) -> Overload:
    return Overload(LAG_S, descriptors)


def refused(guard: Overload, ceiling: PriorityClass = STANDARD) -> str | None:
    try:
        guard.check(ceiling)
    except Overloaded as error:
        return error.code
    return None


def test_a_loop_that_stays_late_turns_requests_away_until_one_probe_is_in_time() -> None:
    guard = overload()
    for _ in range(LATE_PROBES - 1):
        guard.note_lag(LAG_S)
        assert refused(guard) is None
    guard.note_lag(LAG_S)
    assert refused(guard) == "overloaded_loop"
    guard.note_lag(0.9 * LAG_S)
    assert refused(guard) is None


def test_one_long_pause_turns_nobody_away() -> None:
    guard = overload()
    for lag_s in (0.0, 30.0, 0.0, 30.0, 30.0, 0.0):
        guard.note_lag(lag_s)
        assert refused(guard) is None


def test_critical_is_let_in_until_it_is_four_times_as_late() -> None:
    guard = overload()
    for _ in range(2 * LATE_PROBES):
        guard.note_lag(3.9 * LAG_S)
    assert refused(guard, STANDARD) == "overloaded_loop"
    assert refused(guard, CRITICAL) is None
    for _ in range(LATE_PROBES):
        guard.note_lag(4 * LAG_S)
    assert refused(guard, CRITICAL) == "overloaded_loop"


@pytest.mark.parametrize(
    ("count", "standard", "critical"),
    [
        (899, None, None),
        (900, "overloaded_descriptors", None),
        (970, *["overloaded_descriptors"] * 2),
    ],
)
def test_descriptors_are_kept_for_what_runs(
    count: int, standard: str | None, critical: str | None
) -> None:
    guard = overload(lambda: (count, 1000))
    assert refused(guard, STANDARD) == standard
    assert refused(guard, CRITICAL) == critical


def test_descriptors_are_counted_again_as_probes_come() -> None:
    counts = [1000, 1000, 10]
    guard = overload(lambda: (counts.pop(0), 1000))
    seen = []
    for _ in range(8):
        guard.note_lag(0)
        seen.append(refused(guard))
    assert seen == ["overloaded_descriptors"] * 7 + [None]


def test_where_no_descriptor_is_left_to_count_with_it_refuses_until_there_are() -> None:
    """Counting opens one: at the limit it fails, and must not end the probes."""
    counts: list[int | None] = [10, None, 10]

    def count() -> tuple[int, int]:
        now = counts.pop(0)
        if now is None:
            raise OSError(errno.EMFILE, "Too many open files")
        return now, 1000

    guard = overload(count)
    seen = []
    for _ in range(8):
        guard.note_lag(0)
        seen.append(refused(guard))
    assert seen == [None] * 3 + ["overloaded_descriptors"] * 4 + [None]


def test_a_refused_clients_connection_is_closed() -> None:
    with pytest.raises(Overloaded) as caught:
        overload(lambda: (1, 1)).check(STANDARD)
    assert caught.value.status == 503
    assert caught.value.headers() == [(b"retry-after", b"1"), (b"connection", b"close")]


def test_this_processs_descriptors_are_counted() -> None:
    before, most = open_descriptors()
    with socket.socket(), socket.socket():
        assert open_descriptors() == (before + 2, most)


# Memory


def test_what_is_over_the_bound_is_refused_and_room_comes_back() -> None:
    memory = BodyMemory(100)
    with memory.of(ACME) as acme, memory.of(OTHER) as other, memory.of(TenantId("third")) as third:
        acme(50)
        other(30)
        with pytest.raises(Overloaded) as caught:
            third(21)
        assert caught.value.code == "overloaded_memory"
        third(20)
        assert memory.held_bytes == 100
    assert memory.held_bytes == 0


def test_one_tenant_gets_half_however_many_its_requests() -> None:
    memory = BodyMemory(100)
    with ExitStack() as requests:
        for _ in range(5):
            requests.enter_context(memory.of(ACME))(10)
        one_more = requests.enter_context(memory.of(ACME))
        with pytest.raises(RateLimited):
            one_more(1)
        requests.enter_context(memory.of(OTHER))(50)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 40))), max_size=20),
    st.randoms(use_true_random=False),
)
@examples(200)
def test_memory_is_never_over_its_bounds_and_never_leaks(
    requests: list[tuple[str, list[int]]], random: object
) -> None:
    memory = BodyMemory(100)
    open_requests = []
    held: dict[str, int] = {}
    for tenant, pieces in requests:
        request = ExitStack()
        more = request.enter_context(memory.of(TenantId(tenant)))
        own = 0
        for piece in pieces:
            try:
                more(piece)
            except ApiError:
                break
            own += piece
        held[tenant] = held.get(tenant, 0) + own
        open_requests.append((tenant, own, request))
        assert memory.held_bytes == sum(held.values()) <= 100
        assert max(held.values()) <= 50
        if random.random() < 0.5:  # type: ignore[attr-defined]
            gone, bytes_, ended = open_requests.pop(random.randrange(len(open_requests)))  # type: ignore[attr-defined]
            held[gone] -= bytes_
            ended.close()
    for _, _, each in open_requests:
        each.close()
    assert memory.held_bytes == 0
    assert memory._tenants == {}


# The server itself, with no descriptor left


FEW = 48
SERVER = """
import asyncio, resource, sys
import uvicorn
from serve_app.core.types import PriorityClass
from serve_app.errors import ApiError
from serve_app.gateway.http import send_error, send_json
from serve_app.overload import PROBES_PER_COUNT, Overload, open_descriptors

resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))
overload = Overload(1e9, open_descriptors)

async def app(scope, receive, send):
    for _ in range(PROBES_PER_COUNT):
        overload.note_lag(0.0)
    try:
        overload.check(PriorityClass.STANDARD)
    except ApiError as error:
        await send_error(send, error)
    else:
        await send_json(send, b"{}")

async def main():
    config = uvicorn.Config(app, port=0, loop="uvloop", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await serving

import uvloop
uvloop.run(main())
"""
ASK = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"


def asked(port: int) -> tuple[bytes, socket.socket]:
    """Ask on a connection of its own, and keep that."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=120)
    connection.sendall(ASK)
    answer = b""
    while not answer.endswith(b"}"):
        piece = connection.recv(4096)
        assert piece, f"the answer is whole: {answer!r}"
        answer += piece
    return answer, connection


def test_without_descriptors_it_refuses_by_503_and_serves_again_when_clients_leave() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(FEW)], stdout=subprocess.PIPE, env=environment
    ) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            answers = []
            kept = []
            for _ in range(2 * FEW):
                answer, connection = asked(port)
                answers.append(answer)
                kept.append(connection)
            served = [b"200 OK" in answer for answer in answers]
            assert served[0]
            first = served.index(False)
            assert not any(served[first:]), "clients that stay leave no room"
            assert all(b"overloaded_descriptors" in answer for answer in answers[first:])
            assert all(b"connection: close" in answer for answer in answers[first:])
            for connection in kept:
                connection.close()
            answer, connection = asked(port)
            connection.close()
            assert server.poll() is None
            again, connection = asked(port)
            connection.close()
            assert b"200 OK" in again
        finally:
            server.kill()
