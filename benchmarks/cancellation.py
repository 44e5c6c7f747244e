"""How long a client that leaves goes on holding its place.

    make bench

Through the whole stack (HAProxy, router, engine), on both engines, streamed and plain,
for requests that run in the engine and for requests queued in the router (which sends an
engine no more than it has slots for, so nothing waits there). The clock starts just
before the client closes its socket. It stops when the place is free by the word of
whoever gave it: the engine's log event of a generation that ended early, or the router's
line of a request that never left it. vLLM takes the cancelled sequence out of its batch
at its next step; that is not in the figure.

Both read the machine's one wall clock, and logs have milliseconds. Clients send headers
and body apart, as httpx and the openai client do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from tests.stack import ROOT, Stack, running_stack

TARGET_P99_S = 0.25
SLOTS = 4
VICTIMS_AT_ONCE = 4
OUTPUT_TOKENS = 1500
READY_TIMEOUT_S = 600.0
REPORT_TIMEOUT_S = 15.0
CONFIGS = {"sim": "sim.yaml", "vllm": "local.yaml"}
# How many other requests are under way decides where the next one ends up.
RUNNING, QUEUED = "running", "queued"
FILLERS = {RUNNING: 0, QUEUED: SLOTS}


@dataclass(frozen=True, slots=True)
class Departure:
    """A client that left: which request, and when on the wall clock."""

    label: str
    closed_at_s: float


@dataclass(frozen=True, slots=True)
class Freed:
    """A place that a departure freed: where it turned out to be, and when on the wall clock."""

    place: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Result:
    """Seconds from closed socket to free place, of one kind of request.

    ``departures`` were in this place when they left; ``elsewhere`` had moved on by then,
    and are not in the figures. ``unreported`` were not freed by anybody.
    """

    engine: str
    place: str
    streamed: bool
    departures: int
    elsewhere: int
    unreported: int
    p50_s: float
    p99_s: float
    most_s: float


def main() -> int:
    options = _options()
    results: list[Result] = []
    for engine in options.engines:
        with running_stack(_document(engine), ready_timeout_s=READY_TIMEOUT_S) as stack:
            results += asyncio.run(_measure(stack, engine, options.departures))
    options.out.mkdir(parents=True, exist_ok=True)
    document = json.dumps([asdict(result) for result in results], indent=2)
    (options.out / "cancellation.json").write_text(document + "\n")
    table = _table(results)
    (options.out / "cancellation.md").write_text(table)
    print(table)
    late = [r for r in results if not r.p99_s <= TARGET_P99_S or r.unreported]
    print(f"{len(late)} of {len(results)} kinds miss the target of {TARGET_P99_S * 1000:.0f} ms")
    return 1 if late else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cancellation")
    parser.add_argument("--out", type=Path, default=Path("out/cancellation"), metavar="FOLDER")
    parser.add_argument("--departures", type=int, default=100, metavar="N", help="of each kind")
    parser.add_argument("--engines", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    return parser.parse_args()


def _document(engine: str) -> dict[str, Any]:
    """One replica with few slots, so that few requests fill each place."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "configs" / CONFIGS[engine]).read_text())
    _, pool, gateway = found["applications"]
    pool["args"]["engine"]["max_num_seqs"] = SLOTS
    pool["args"]["replicas"]["num_replicas"] = 1
    if engine == "sim":
        pool["args"]["engine"]["weights_s"] = 0.02
    [policy] = gateway["deployments"][0]["user_config"]["pools"].values()
    policy |= {
        "max_concurrency_per_replica": SLOTS,
        "queue_timeout_s": 300,
        # All places may be taken, by requests that are slow on purpose.
        "critical_reserve_ratio": 0.0,
        "sparse_headroom_ratio": 0.0,
        "early_rejection": False,
        "client_throttle": False,
    }
    return found


async def _measure(stack: Stack, engine: str, departures: int) -> list[Result]:
    results = []
    model = stack.http().get("/v1/models").json()["data"][0]["id"]
    for place, fillers in FILLERS.items():
        for streamed in (True, False):
            async with _filled(stack, model, fillers):
                left = await _depart(stack, model, place, departures, streamed=streamed)
                freed = await _freed_at_s(stack, {one.label for one in left})
            result = _result(engine, place, streamed, left, freed)
            print(_row(result), flush=True)
            results.append(result)
    return results


@asynccontextmanager
async def _filled(stack: Stack, model: str, count: int) -> AsyncIterator[None]:
    """Keep ``count`` requests under way: each that ends is followed by another."""

    async def fill() -> None:
        while True:
            connection = await _Connection.open(
                stack, model, f"filler-{random.random()}", streamed=True
            )
            try:
                await connection.reader.read()
            finally:
                connection.close()

    tasks = []
    for _ in range(count):
        tasks.append(asyncio.create_task(fill()))
        await asyncio.sleep(0.2)
    try:
        if count:
            await asyncio.sleep(2.0)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(1.0)


async def _depart(
    stack: Stack, model: str, place: str, count: int, *, streamed: bool
) -> list[Departure]:
    """Send requests and leave each at a random moment once it is in its place."""
    kind = f"{place.replace(' ', '-')}-{'stream' if streamed else 'plain'}"
    left: list[Departure] = []
    waiting = list(range(count))

    async def leave() -> None:
        while waiting:
            label = f"leaver-{kind}-{waiting.pop()}"
            connection = await _Connection.open(stack, model, label, streamed=streamed)
            if streamed and place == RUNNING:
                await connection.first_event()
                await asyncio.sleep(random.uniform(0.0, 0.3))
            else:
                await asyncio.sleep(random.uniform(0.4, 0.7))
            closed_at_s = time.time()
            connection.close()
            left.append(Departure(label, closed_at_s))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(VICTIMS_AT_ONCE, count)):
            group.create_task(leave())
    return left


class _Connection:
    """One request on one socket, its body sent apart from its headers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, stack: Stack, model: str, label: str, *, streamed: bool) -> _Connection:
        where = urlsplit(stack.url)
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        request = {
            "model": model,
            "messages": [{"role": "user", "content": f"{label}: tell me about the sea."}],
            "max_tokens": OUTPUT_TOKENS,
            "ignore_eos": True,
            "stream": streamed,
        }
        body = json.dumps(request).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {where.netloc}\r\n"
            f"authorization: Bearer {stack.key}\r\ncontent-type: application/json\r\n"
            f"x-request-id: {label}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode())
        await asyncio.sleep(0.001)
        writer.write(body)
        return cls(reader, writer)

    async def first_event(self) -> None:
        """Return when the first event of a stream has come."""
        await self.reader.readuntil(b"data: ")

    def close(self) -> None:
        self._writer.close()


async def _freed_at_s(stack: Stack, labels: set[str]) -> dict[str, Freed]:
    """Return where each of these requests was and when its place was free, by label.

    A request without an entry was reported by nobody within REPORT_TIMEOUT_S.
    """
    deadline_s = time.monotonic() + REPORT_TIMEOUT_S
    while True:
        freed = _read_freed(stack.folder, labels)
        if len(freed) == len(labels) or time.monotonic() > deadline_s:
            return freed
        await asyncio.sleep(0.5)


def _read_freed(folder: Path, labels: set[str]) -> dict[str, Freed]:
    in_engine: dict[str, Freed] = {}
    in_router: dict[str, tuple[str, str, float]] = {}
    for event in _events(folder):
        at_s = datetime.fromisoformat(event["time"]).timestamp()
        if event["event"] == "generation ended early":
            in_engine[event["request_id"]] = Freed(RUNNING, at_s)
        elif event.get("client_request_id") in labels:
            entry = (event["request_id"], event["decision"], at_s)
            in_router[event["client_request_id"]] = entry
    freed = {}
    for label, (request_id, decision, at_s) in in_router.items():
        if request_id in in_engine:
            freed[label] = in_engine[request_id]
        elif decision != "dispatched":
            freed[label] = Freed(QUEUED, at_s)
    return freed


def _events(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the request lines of the router and the early ends of the engine."""
    for path in (folder / "r").glob("ray/session_2*/logs/worker-*.err"):
        for line in path.read_bytes().splitlines():
            if line.startswith(b"{") and (
                b'"event":"request"' in line or b'"event":"generation ended early"' in line
            ):
                with suppress(json.JSONDecodeError):
                    yield json.loads(line)


def _result(
    engine: str, place: str, streamed: bool, left: list[Departure], freed: dict[str, Freed]
) -> Result:
    reported = [(one, freed[one.label]) for one in left if one.label in freed]
    spans_s = sorted(end.at_s - one.closed_at_s for one, end in reported if end.place == place)

    def at(ratio: float) -> float:
        return spans_s[max(0, math.ceil(ratio * len(spans_s)) - 1)] if spans_s else math.nan

    return Result(
        engine=engine,
        place=place,
        streamed=streamed,
        departures=len(spans_s),
        elsewhere=len(reported) - len(spans_s),
        unreported=len(left) - len(reported),
        p50_s=at(0.5),
        p99_s=at(0.99),
        most_s=at(1.0),
    )


def _row(result: Result) -> str:
    figures = [f"{figure * 1000:.0f}" for figure in (result.p50_s, result.p99_s, result.most_s)]
    how = "streamed" if result.streamed else "plain"
    cells = [result.engine, result.place, how, str(result.departures), *figures]
    return "| " + " | ".join([*cells, str(result.elsewhere), str(result.unreported)]) + " |"


def _table(results: list[Result]) -> str:
    lines = [
        "# How soon a client that leaves frees its place",
        "",
        f"`make bench` on {time.strftime('%Y-%m-%d', time.gmtime())}: from the client's socket "
        f"closing to its place being free, through the whole stack on {os.cpu_count()} CPU cores, "
        f"{VICTIMS_AT_ONCE} clients leaving at a time. "
        f"The target is a p99 of {TARGET_P99_S * 1000:.0f} ms.",
        "",
        "| engine | place | response | departures | p50, ms | p99, ms | most, ms "
        "| elsewhere | unreported |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
        *map(_row, results),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
