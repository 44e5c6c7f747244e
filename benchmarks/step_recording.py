"""What recording every step's composition costs vLLM, in tokens per second.

    python -m benchmarks.step_recording                # the real engine, about three minutes
    python -m benchmarks.step_recording --micro        # the log and the reader alone, seconds

One engine serves a closed loop of streams all the time; recording is switched on and off in
its own process every few seconds, in the order on, off, off, on, so that a trend cancels. A
window's rate is its tokens over the time between its first and its last step. The result is
the ratio of the rates, on over off, with the 95 % interval over the blocks of four windows.
Reading the records and splitting the steps in the replica is switched with it.

On a CPU vLLM resolves to its synchronous scheduler, whose engine process then does in the
step what it does beside the step on a GPU: the dearer case. ``--asynchronous`` is for GPUs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import aclosing
from math import exp, log, sqrt
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from serve_app import models
from serve_app.config import VllmSettings
from serve_app.core.cost_meter import CostMeter
from serve_app.core.types import PoolName, PriorityClass, ReplicaId, RequestId
from serve_app.engine.api import Endpoint, GenerateCall
from serve_app.engine.step_log import StepLog
from serve_app.engine.step_reader import StepReader
from serve_app.engine.step_records import StepInbox, StepSender
from serve_app.engine.vllm import VllmEngine

SWITCH_VARIABLE = "BENCHMARK_STEP_SWITCH"
SETTLE_STEPS = 2
ORDER = (True, False, False, True)
# Student's t, 97.5 %, by degrees of freedom; normal beyond.
T_975 = {3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 14: 2.14, 19: 2.09}


class Switch:
    """A byte of shared memory: 1 while steps are to be recorded."""

    def __init__(self, file: Path) -> None:
        with file.open("r+b") as opened:
            self._byte = mmap.mmap(opened.fileno(), 1)

    @property
    def on(self) -> bool:
        return self._byte[0] == 1

    @on.setter
    def on(self, value: bool) -> None:
        self._byte[0] = int(value)


def switched(recording: type[Any]) -> type[Any]:
    """Return a recording scheduler that records only the steps begun while switched on.

    Who comes and goes is always noted, so that it can be switched on in the middle.
    """
    bases = recording.__mro__
    plain = bases[bases.index(_mixin()) + 1]

    class Switched(recording):  # type: ignore[misc,valid-type]  # built at run time
        def __init__(self, *args: Any, **options: Any) -> None:
            self._switch = Switch(Path(os.environ[SWITCH_VARIABLE]))
            self._recorded: deque[bool] = deque()
            super().__init__(*args, **options)

        def schedule(self, *args: Any, **options: Any) -> Any:
            self._recorded.append(self._switch.on)
            if self._recorded[-1]:
                return super().schedule(*args, **options)
            self.steps.preempted("", 0)  # what follows is not the same again
            return plain.schedule(self, *args, **options)

        def update_from_output(self, *args: Any, **options: Any) -> Any:
            if self._recorded.popleft():
                return super().update_from_output(*args, **options)
            return plain.update_from_output(self, *args, **options)

    return Switched


def _mixin() -> type[Any]:
    from serve_app.engine.vllm_scheduler import RecordsSteps

    return RecordsSteps


def __getattr__(name: str) -> Any:
    """Make the schedulers when vLLM asks for them by name: only then is it imported."""
    from serve_app.engine import vllm_scheduler

    kinds = {
        "SwitchedScheduler": vllm_scheduler.RecordingScheduler,
        "SwitchedAsyncScheduler": vllm_scheduler.RecordingAsyncScheduler,
    }
    if name not in kinds:
        raise AttributeError(name)
    return switched(kinds[name])


# ---- the real engine ---------------------------------------------------------------


class Bench:
    """A closed loop of streams on one engine, and the steps it took."""

    def __init__(self, engine: VllmEngine, streams: int, output_tokens: int) -> None:
        self._engine = engine
        self._streams = streams
        self._output_tokens = output_tokens
        self._asked = 0
        self.steps: list[tuple[float, int]] = []

    async def measure(self, switch: Switch, *, blocks: int, window_s: float) -> list[list[float]]:
        """Return the rates of every block's windows, tokens/s, in the order of ``ORDER``."""
        self._watch()
        rates: list[list[float]] = []
        clients = [asyncio.create_task(self._client(place)) for place in range(self._streams)]
        try:
            await self._window(4 * window_s)
            for block in range(blocks):
                row = []
                for on in ORDER:
                    self._turn(switch, on)
                    row.append(await self._window(window_s))
                rates.append(row)
                print(f"block {block}: " + " ".join(f"{rate:.1f}" for rate in row), flush=True)
        finally:
            for client in clients:
                client.cancel()
            await asyncio.wait(clients)
        return rates

    def _watch(self) -> None:
        load = self._llm.load
        record = load.record

        def watching(scheduler_stats: Any, iteration_stats: Any, *args: Any, **more: Any) -> None:
            record(scheduler_stats, iteration_stats, *args, **more)
            if iteration_stats is not None and iteration_stats.num_generation_tokens:
                step = (time.monotonic(), iteration_stats.num_generation_tokens)
                self.steps.append(step)

        load.record = watching
        self._reader = load.steps

    def _turn(self, switch: Switch, on: bool) -> None:
        switch.on = on
        self._llm.load.steps = self._reader if on else None

    async def _window(self, window_s: float) -> float:
        self.steps.clear()
        await asyncio.sleep(window_s)
        steps = self.steps[SETTLE_STEPS:]
        return sum(tokens for _, tokens in steps[1:]) / (steps[-1][0] - steps[0][0])

    async def _client(self, place: int) -> None:
        while True:
            self._asked += 1
            body = {
                "prompt": f"{self._asked} boats went down the river " * 8,
                "max_tokens": self._output_tokens + place * 7,
                "temperature": 0,
                "ignore_eos": True,
            }
            call = GenerateCall(
                request_id=RequestId(f"bench-{self._asked}"),
                endpoint=Endpoint.COMPLETIONS,
                body=json.dumps(body).encode(),
                stream=True,
                tenant=f"tenant-{place}",
                cache_salt="",
                priority_class=PriorityClass.STANDARD,
            )
            async with aclosing(self._engine.generate(call)) as items:
                async for _ in items:
                    pass

    @property
    def _llm(self) -> Any:
        return self._engine._llm


async def run_engine(args: argparse.Namespace) -> dict[str, Any]:
    """Start an engine, measure, and return the figures."""
    with tempfile.NamedTemporaryFile(prefix="step-switch-") as file:
        file.write(b"\x01")
        file.flush()
        os.environ[SWITCH_VARIABLE] = file.name
        kind = "SwitchedAsyncScheduler" if args.asynchronous else "SwitchedScheduler"
        settings = VllmSettings(
            model="smollm2",
            dtype="bfloat16",
            max_model_len=1024,
            max_num_seqs=args.streams,
            cpu_kv_cache_gib=0.5,
            extra={"scheduler_cls": f"benchmarks.step_recording.{kind}"},
        )
        path = models.resolve(settings.model, models.default_cache_dir())
        engine = VllmEngine(settings, path, PoolName("bench"), ReplicaId("bench-0"), time.monotonic)
        await engine.start()
        try:
            bench = Bench(engine, args.streams, args.output_tokens)
            switch = Switch(Path(file.name))
            rates = await bench.measure(switch, blocks=args.blocks, window_s=args.window_s)
            costs = engine.costs()
            assert costs is not None
        finally:
            await engine.stop()
    found = interval(rates)
    found |= {
        "tokens_per_s_on": median([row[at] for row in rates for at in (0, 3)]),
        "tokens_per_s_off": median([row[at] for row in rates for at in (1, 2)]),
        "streams": args.streams,
        "fitted_steps": costs.fitted_steps,
        "fit_error_ratio": costs.fit_error_ratio,
        "rates": rates,
    }
    return found


def interval(rates: list[list[float]]) -> dict[str, Any]:
    """Return the ratio of the rates, on over off, with its 95 % interval over the blocks."""
    logs = [log(row[0] * row[3] / (row[1] * row[2])) / 2 for row in rates]
    mean = fmean(logs)
    degrees = len(logs) - 1
    near = max((each for each in T_975 if each <= degrees), default=3)
    half = T_975[near] * stdev(logs) / sqrt(len(logs)) if degrees else float("inf")
    return {
        "ratio": exp(mean),
        "ratio_low": exp(mean - half),
        "ratio_high": exp(mean + half),
        "blocks": len(logs),
    }


# ---- the parts alone ---------------------------------------------------------------


class Request:
    """As much of a request as the log asks of vLLM's."""

    __slots__ = ("num_computed_tokens", "num_prompt_tokens")

    def __init__(self) -> None:
        self.num_prompt_tokens = 100
        self.num_computed_tokens = 101


def run_parts(sequences: int, churn_steps: int) -> dict[str, float]:
    """Return microseconds a step of writing and of reading, somebody joining now and then."""
    inbox = StepInbox()
    now_s = 0.0
    clock: Callable[[], float] = lambda: now_s  # noqa: E731
    log_ = StepLog(StepSender(inbox.path), clock)
    meter = CostMeter(0.0, 16)
    meter.ready(0.0)
    reader = StepReader(inbox, meter)
    names = deque(f"request-{number}" for number in range(sequences))
    requests = {name: Request() for name in names}
    for name in names:
        reader.expect(name, meter.open("tenant"))
        log_.joined(name)
    writing_s = reading_s = 0.0
    steps, number = 2000, sequences
    for step in range(steps):
        if step % churn_steps == 0:
            number += 1
            gone, new = names.popleft(), f"request-{number}"
            names.append(new)
            del requests[gone]
            requests[new] = Request()
            reader.expect(new, meter.open("tenant"))
            log_.left(gone)
            log_.joined(new)
        tokens = dict.fromkeys(names, 1)
        began_s = time.perf_counter()
        log_.scheduled(tokens, requests, now_s)  # type: ignore[arg-type]  # plain attributes
        now_s += 0.008
        log_.completed(busy=True)
        wrote_s = time.perf_counter()
        reader.read()
        reading_s += time.perf_counter() - wrote_s
        writing_s += wrote_s - began_s
    inbox.close()
    return {"writing_us": writing_s / steps * 1e6, "reading_us": reading_s / steps * 1e6}


def main() -> int:
    """Measure and print. Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_recording")
    parser.add_argument("--micro", action="store_true", help="the parts alone, without an engine")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=150)
    parser.add_argument("--blocks", type=int, default=15, help="of four windows each")
    parser.add_argument("--window-s", type=float, default=2.0)
    parser.add_argument("--asynchronous", action="store_true", help="on a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    found: dict[str, Any]
    if args.micro:
        found = {}
        for sequences in (16, 64, 256):
            for churn_steps in (1, 10, 10**9):
                key = f"{sequences} sequences, somebody new every {churn_steps} steps"
                found[key] = part = run_parts(sequences, churn_steps)
                print(key, {name: round(value, 1) for name, value in part.items()})
    else:
        found = asyncio.run(run_engine(args))
        print(
            f"on / off: {found['ratio']:.4f} ({found['ratio_low']:.4f} to "
            f"{found['ratio_high']:.4f}, 95 %, {found['blocks']} blocks), "
            f"{found['tokens_per_s_on']:.0f} and {found['tokens_per_s_off']:.0f} tokens/s"
        )
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
