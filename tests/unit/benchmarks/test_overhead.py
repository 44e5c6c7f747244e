"""The load generator tells complete answers from broken ones, and counts what came."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import yaml

from benchmarks.overhead.config import stack
from benchmarks.overhead.load import Generator, Workload, check_stream, check_whole, percentile
from serve_app import config_file
from serve_app.load_client import BadAnswer, Connection, Exchange, LoadClient

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"
TOKENS = 3


def event(content: str, finish: str = "null") -> bytes:
    return (
        f'data: {{"choices":[{{"delta":{{"content":"{content}"}},"finish_reason":{finish}}}]}}\n\n'
    ).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


EVENTS = [
    event(""),
    *(event(f" w{number}") for number in range(TOKENS)),
    event("", '"length"'),
    b"data: [DONE]\n\n",
]


@asynccontextmanager
async def server(writes: Sequence[bytes]) -> AsyncIterator[str]:
    """Answer every request with these writes, each read by the client before the next."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                for data in writes:
                    writer.write(data)
                    await writer.drain()
                if not b"".join(writes).endswith(LAST):
                    break
        writer.close()

    listener = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"


def load(concurrency: int = 2, rate_per_s: float | None = None) -> Workload:
    return Workload("test", "sim", True, TOKENS, concurrency, rate_per_s)


async def test_complete_streams_are_counted_to_the_event() -> None:
    async with server([HEAD, *map(chunk, EVENTS), LAST]) as url:
        tally = await Generator(url, "key", load()).run(0.05)
    assert tally.errors == []
    assert tally.failures == 0
    streams = len(tally.latencies_s)
    assert streams > 0
    assert len(tally.first_s) == streams
    assert tally.chunks == tally.tokens == TOKENS * streams
    assert tally.events == len(EVENTS) * streams
    assert len(tally.gaps_s) == tally.reads - streams


async def test_an_open_loop_sends_at_its_rate_and_counts_from_when_a_request_was_due() -> None:
    async with server([HEAD, *map(chunk, EVENTS), LAST]) as url:
        tally = await Generator(url, "key", load(rate_per_s=100)).run(0.1)
    assert len(tally.latencies_s) == 10
    assert all(
        first <= whole for first, whole in zip(tally.first_s, tally.latencies_s, strict=True)
    )


@pytest.mark.parametrize(
    ("writes", "complaint"),
    [
        ([HEAD, *map(chunk, EVENTS[:-1]), LAST], "does not end with one"),
        ([HEAD, *map(chunk, EVENTS[:1] + EVENTS[2:]), LAST], "2 words"),
        ([HEAD, *map(chunk, EVENTS[:2] + EVENTS[1:]), LAST], "4 words"),
        ([HEAD, *map(chunk, EVENTS[:-2] + EVENTS[-1:]), LAST], "finish reason"),
        ([HEAD, *map(chunk, EVENTS)], "the connection ended"),
        ([HEAD, b"5\r\nabc\r\n", LAST], "does not end where it says"),
        ([HEAD.replace(b"200 OK", b"429 No"), chunk(b'{"error":1}'), LAST], "status 429"),
    ],
)
async def test_a_stream_that_is_not_whole_is_a_failure(
    writes: Sequence[bytes], complaint: str
) -> None:
    async with server(writes) as url:
        tally = await Generator(url, "key", load(concurrency=1)).run(0.03)
    assert len(tally.latencies_s) == 0
    assert tally.failures > 0
    assert complaint in tally.errors[0]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_an_answer_is_complete_however_its_bytes_are_cut(size: int) -> None:
    data = HEAD + b"".join(map(chunk, EVENTS)) + LAST
    reads = [data[at : at + size] for at in range(0, len(data), size)]
    exchange = _received(reads)
    assert exchange.reads == reads
    assert exchange.body() == (200, b"".join(EVENTS))
    assert check_stream(exchange.body()[1], TOKENS) == TOKENS


def test_tokens_merged_into_one_event_are_one_chunk_and_none_is_missing() -> None:
    merged = [EVENTS[0], event("w0 w1"), event(" w2"), *EVENTS[-2:]]
    assert check_stream(b"".join(merged), TOKENS) == 2


def test_a_real_models_tokens_are_counted_by_its_usage() -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3}}\n\n'
    said = [EVENTS[0], event("one"), event("two and a half"), EVENTS[-2]]
    assert check_stream(b"".join([*said, usage, EVENTS[-1]]), 3, words=False) == 2
    with pytest.raises(BadAnswer, match="3 tokens"):
        check_stream(b"".join([*said, usage, EVENTS[-1]]), 4, words=False)
    with pytest.raises(BadAnswer, match="0 tokens"):
        check_stream(b"".join([*said, EVENTS[-1]]), 3, words=False)
    body = b'{"choices":[{"message":{"content":"halfword"}}],"usage":{"completion_tokens":3}}'
    check_whole(body, 3, words=False)


def test_a_body_of_declared_length_ends_with_its_last_byte() -> None:
    body = b'{"choices":[{"message":{"content":"a b c"}}],"usage":{"completion_tokens":3}}'
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    exchange = _received([head[:20], head[20:] + body[:5], body[5:]])
    assert exchange.body() == (200, body)
    check_whole(body, 3)
    with pytest.raises(BadAnswer, match="3 tokens"):
        check_whole(body, 4)


async def test_a_connection_that_the_server_closed_while_it_was_idle_is_not_used_again() -> None:
    """As servers do that give idle connections a few seconds."""
    connections = 0

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        writer.write(HEAD + b"".join(map(chunk, EVENTS)) + LAST)
        writer.close()

    async with await asyncio.start_server(answer_once, "127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        generator = Generator(url, "key", load())
        for _ in range(3):
            await generator.one(0.0)
            async with asyncio.timeout(120):
                while generator.idle():  # noqa: ASYNC110 - nothing tells when it has noticed
                    await asyncio.sleep(0)
    assert generator.tally.errors == []
    assert len(generator.tally.latencies_s) == connections == 3


def test_events_that_share_a_read_are_one_arrival() -> None:
    exchange = Exchange([HEAD, EVENTS[0] + EVENTS[1], EVENTS[2]], [0.0, 1.0, 2.0])
    assert exchange.arrivals() == ([1.0, 2.0], 3)


@pytest.mark.parametrize("size", [1, 5, 10_000])
def test_the_first_text_came_with_the_read_that_completes_it(size: int) -> None:
    data = HEAD + b"".join(map(chunk, EVENTS)) + LAST
    reads = [data[at : at + size] for at in range(0, len(data), size)]
    exchange = Exchange(reads, [float(number) for number in range(len(reads))])
    ends = data.index(b'"content":" w0') + len(b'"content":"')
    assert exchange.first_text_s() == ends // size
    assert Exchange([HEAD + EVENTS[0]], [1.0]).first_text_s() is None


async def test_a_connection_whose_answer_nobody_awaits_any_more_is_not_used_again() -> None:
    async with server([HEAD, *map(chunk, EVENTS), LAST]) as url, LoadClient(url, None) as client:
        asking = asyncio.create_task(client.post("/v1/x", b"{}"))
        await asyncio.sleep(0)
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        assert client.idle() == 0
        exchange = await client.post("/v1/x", b"{}")
        assert exchange.body() == (200, b"".join(EVENTS))
        assert client.idle() == 1


def test_a_request_says_where_it_goes_and_who_sends_it() -> None:
    request = LoadClient("http://there:81/base/", "k").request("/v1/x", b"{}")
    assert request.startswith(b"POST /base/v1/x HTTP/1.1\r\nhost: there:81\r\n")
    assert b"authorization: Bearer k\r\n" in request
    assert request.endswith(b"content-length: 2\r\n\r\n{}")
    assert b"authorization" not in LoadClient("http://there", None).request("/", b"")


def test_a_percentile_of_nothing_is_nothing() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0


@pytest.mark.parametrize(
    "document",
    [
        stack(),
        stack(governance=False),
        stack(transport="handle"),
        stack(routers=2),
    ],
)
def test_every_configuration_that_is_measured_is_valid(document: Any, tmp_path: Any) -> None:
    file = tmp_path / "stack.yaml"
    file.write_text(yaml.safe_dump(document))
    config_file.load(file)


def _received(reads: Sequence[bytes]) -> Exchange:
    """Return the exchange of a connection that reads this."""

    async def run() -> Exchange:
        connection = Connection()
        connection.connection_made(_Sink())
        answer = asyncio.create_task(connection.exchange(b"", 1.0))
        await asyncio.sleep(0)
        for data in reads:
            assert not answer.done()
            connection.data_received(data)
        return await answer

    return asyncio.run(run())


class _Sink(asyncio.Transport):
    def write(self, data: Any) -> None:
        """Send nowhere."""
