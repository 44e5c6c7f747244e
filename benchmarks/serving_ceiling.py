"""How many tokens a second one engine replica's event loop carries.

    python -m benchmarks.serving_ceiling

vLLM's serving layer (detokenising, OpenAI's events, our meter and frames) runs in the
replica's one Python process, whatever the GPU could do. Here it gets its tokens from a stand-in
for EngineCore: so many sequences, each a token per step, a step every 20 ms as a GPU of that
speed makes them. What is found is the layer's own ceiling on this machine's cores:

- CPU per token, of the whole process;
- how late the loop is, which is what health probes, load reports and new requests wait for;
- the highest rate at which every token comes in time, and what ``stream_interval`` changes.

Not in it: decoding EngineCore's messages (a thread of vLLM's own), the token channel.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import orjson

from benchmarks.overhead.load import percentile
from serve_app import models
from serve_app.config import VllmSettings
from serve_app.core.types import PoolName, PriorityClass, ReplicaId, RequestId
from serve_app.engine.api import Endpoint, Frame, GenerateCall
from serve_app.engine.vllm import VllmEngine

STEP_S = 0.02
PROBE_S = 0.01
OUTPUT_TOKENS = 400
RATES_PER_S = (1_000, 2_500, 5_000, 7_500, 10_000, 15_000)
INTERVALS = (1, 4, 16)
KEEPS_UP_RATIO = 0.97
LAG_P99_MOST_S = 0.1


class PacedCore:
    """EngineCore's stand-in: every sequence it was given gets one token per step."""

    def __init__(self, vllm_config: Any, *_: object, **__: object) -> None:
        vllm_config.cache_config.num_gpu_blocks = 100_000
        self.resources = SimpleNamespace(
            engine_dead=False, engine_manager=SimpleNamespace(processes=[])
        )
        self.engine_ranks_managed = [0]
        self._left: dict[str, int] = {}
        self._due_s = 0.0
        self._busy = asyncio.Event()

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def add_request_async(self, request: Any) -> None:
        self._left[request.request_id] = request.sampling_params.max_tokens
        if not self._busy.is_set():
            self._due_s = time.perf_counter()
            self._busy.set()

    async def abort_requests_async(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._left.pop(request_id, None)

    async def get_output_async(self) -> Any:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

        await self._busy.wait()
        self._due_s += STEP_S
        # The engine waits for nobody: a step that is due has been made and lies there.
        await asyncio.sleep(max(0.0, self._due_s - time.perf_counter()))
        outputs = []
        for request_id, left in list(self._left.items()):
            ended = left == 1
            outputs.append(
                EngineCoreOutput(
                    request_id,
                    [1000 + left % 20_000],
                    finish_reason=FinishReason.LENGTH if ended else None,
                )
            )
            if ended:
                del self._left[request_id]
            else:
                self._left[request_id] = left - 1
        if not self._left:
            self._busy.clear()
        return EngineCoreOutputs(outputs=outputs)

    def dp_engines_running(self) -> bool:
        return False

    def shutdown(self, timeout: float | None = None) -> None:
        return


@dataclass(frozen=True, slots=True)
class Ceiling:
    """One rate at one ``stream_interval``. Times in seconds, lag of a 10 ms timer."""

    rate_per_s: int
    stream_interval: int
    tokens_per_s: float
    cpu_us_per_token: float
    lag_p50_s: float
    lag_p99_s: float
    events: int

    @property
    def keeps_up(self) -> bool:
        """Whether every token came in time and probes were answered."""
        enough = self.tokens_per_s >= KEEPS_UP_RATIO * self.rate_per_s
        return enough and self.lag_p99_s <= LAG_P99_MOST_S


async def build(stream_interval: int) -> VllmEngine:
    """Return an engine whose serving layer is vLLM's and whose tokens are made up."""
    settings = VllmSettings(
        model="smollm2",
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=1024,
        extra={"stream_interval": stream_interval},
    )
    path = models.resolve(settings.model, models.default_cache_dir())
    engine = VllmEngine(settings, path, PoolName("ceiling"), ReplicaId("r1"), time.monotonic)
    await engine.start()
    return engine


async def measure(engine: VllmEngine, rate_per_s: int, stream_interval: int) -> Ceiling:
    """Run as many streams side by side as give this rate, once, and look at the loop."""
    streams = max(1, int(rate_per_s * STEP_S))
    lags_s: list[float] = []
    frames: list[tuple[float, int]] = []
    begun_s: list[float] = []
    ended_s: list[float] = []
    events = 0

    async def read(number: int) -> None:
        nonlocal events
        began = False
        async for item in engine.generate(_call(number)):
            if isinstance(item, Frame):
                frames.append((time.perf_counter(), len(item.token_ids)))
                events += item.data.count(b"\n\n")
                if not began:
                    began = True
                    begun_s.append(frames[-1][0])
        ended_s.append(time.perf_counter())

    async def probe() -> None:
        while True:
            due_s = time.perf_counter() + PROBE_S
            await asyncio.sleep(PROBE_S)
            lags_s.append(max(0.0, time.perf_counter() - due_s))

    probing = asyncio.create_task(probe())
    cpu_s = time.process_time()
    await asyncio.gather(*(read(number) for number in range(streams)))
    cpu_s = time.process_time() - cpu_s
    probing.cancel()
    tokens = sum(count for _, count in frames)
    # The rate while all streams run: neither their start nor their end.
    from_s, to_s = max(begun_s), min(ended_s)
    in_full = sum(count for at_s, count in frames if from_s < at_s <= to_s)
    assert tokens == streams * OUTPUT_TOKENS, f"{tokens} of {streams * OUTPUT_TOKENS} tokens came"
    return Ceiling(
        rate_per_s=rate_per_s,
        stream_interval=stream_interval,
        tokens_per_s=in_full / (to_s - from_s),
        cpu_us_per_token=1e6 * cpu_s / tokens,
        lag_p50_s=percentile(lags_s, 0.5) or 0.0,
        lag_p99_s=percentile(lags_s, 0.99) or 0.0,
        events=events,
    )


def _call(number: int) -> GenerateCall:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": f"Tell me story number {number}."}],
        "max_tokens": OUTPUT_TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    return GenerateCall(
        request_id=RequestId(f"q{number}-{time.monotonic_ns()}"),
        endpoint=Endpoint.CHAT,
        body=orjson.dumps(body),
        stream=True,
        tenant="t",
        cache_salt="s",
        priority_class=PriorityClass.STANDARD,
    )


async def run(options: argparse.Namespace) -> list[Ceiling]:
    """Measure every rate at every interval, printing each row as it comes."""
    found: list[Ceiling] = []
    print(ROW_HEAD)
    target = "vllm.v1.engine.core_client.EngineCoreClient.make_async_mp_client"
    for interval in options.intervals:
        with mock.patch(target, PacedCore):
            engine = await build(interval)
        for rate_per_s in options.rates:
            found.append(await measure(engine, rate_per_s, interval))
            print(row(found[-1]), flush=True)
            if found[-1].tokens_per_s < 0.7 * rate_per_s:
                break  # Higher rates only make the same tokens later.
        await engine.stop()
    return found


ROW_HEAD = (
    "| stream_interval | offered tokens/s | tokens/s | CPU us per token | loop lag p50, ms "
    "| p99, ms | keeps up |\n|---:|---:|---:|---:|---:|---:|---|"
)


def row(each: Ceiling) -> str:
    """Return one line of the table."""
    return (
        f"| {each.stream_interval} | {each.rate_per_s:,} | {each.tokens_per_s:,.0f} "
        f"| {each.cpu_us_per_token:.0f} | {1e3 * each.lag_p50_s:.1f} | {1e3 * each.lag_p99_s:.1f} "
        f"| {'yes' if each.keeps_up else 'no'} |"
    )


def main() -> int:
    """Run and print; returns 1 if not even the lowest rate was kept up with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--rates", type=int, nargs="+", default=RATES_PER_S, metavar="TOKENS/S")
    parser.add_argument("--intervals", type=int, nargs="+", default=INTERVALS, metavar="N")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    found = asyncio.run(run(options))
    for interval in options.intervals:
        kept = [
            each.rate_per_s for each in found if each.keeps_up and each.stream_interval == interval
        ]
        print(f"stream_interval {interval}: keeps up with {max(kept, default=0):,} tokens/s")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(each) for each in found], indent=1))
    return 0 if any(each.keeps_up for each in found) else 1


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines."""


if __name__ == "__main__":
    sys.exit(main())
