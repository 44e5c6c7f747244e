"""What recording every step's composition costs vLLM, in tokens per second.

    python -m benchmarks.step_recording                # the real engine, about three minutes
    python -m benchmarks.step_recording --micro        # the log and the reader alone, seconds

One engine serves a closed loop of streams all the time; recording is switched in its own
process every few steps, in the order on, off, off, on, so that a trend and a busy neighbour
hit both alike. Blocks in which nobody joined or left are compared: tokens over time while on,
over the same while off. The result is the trimmed mean of the blocks' ratios with its 95 %
bootstrap interval. A switch makes the next step dearer to record than a steady one is. What
the replica does with the records falls into the steps after them, on for the most part.

On a CPU vLLM resolves to its synchronous scheduler, whose engine process then does in the
step what it does beside the step on a GPU: the dearer case. ``--asynchronous`` is for GPUs.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from statistics import fmean, median
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

STEPS_VARIABLE = "BENCHMARK_STEPS_FILE"
SWITCH_STEPS = 4
ORDER = (True, False, False, True)
BLOCK_STEPS = SWITCH_STEPS * len(ORDER)
TRIM_RATIO = 0.1
RESAMPLES = 4000


def switched(recording: type[Any]) -> type[Any]:
    """Return a recording scheduler that is on and off in turn, and times its own steps.

    Who comes and goes is always noted, so that it can be switched on in the middle. A line
    of the file is one step: whether it was recorded, its tokens, its requests, its time in
    seconds since the end of the one before.
    """
    bases = recording.__mro__
    plain = bases[bases.index(_mixin()) + 1]

    class Switched(recording):  # type: ignore[misc,valid-type]  # built at run time
        def __init__(self, *args: Any, **options: Any) -> None:
            self._file = open(os.environ[STEPS_VARIABLE], "w", buffering=2**16)  # noqa: SIM115
            self._begun = 0
            self._under_way: deque[tuple[bool, int, int]] = deque()
            self._ended_s = 0.0
            super().__init__(*args, **options)

        def schedule(self, *args: Any, **options: Any) -> Any:
            on = ORDER[self._begun // SWITCH_STEPS % len(ORDER)]
            self._begun += 1
            if on:
                output = super().schedule(*args, **options)
            else:
                self._note("preempted", "", 0)  # what follows is not the same again
                output = plain.schedule(self, *args, **options)
            tokens = output.num_scheduled_tokens
            self._under_way.append((on, sum(tokens.values()), len(tokens)))
            return output

        def update_from_output(self, *args: Any, **options: Any) -> Any:
            on, tokens, requests = self._under_way.popleft()
            if on:
                outputs = super().update_from_output(*args, **options)
            else:
                outputs = plain.update_from_output(self, *args, **options)
            now_s = time.perf_counter()
            self._file.write(f"{int(on)} {tokens} {requests} {now_s - self._ended_s:.9f}\n")
            self._ended_s = now_s
            return outputs

        def shutdown(self) -> None:
            self._file.close()
            super().shutdown()

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


async def keep_busy(engine: VllmEngine, streams: int, output_tokens: int, for_s: float) -> None:
    """Ask for streams, ``streams`` at any time, until ``for_s`` seconds have passed."""
    asked = itertools.count()

    async def client(place: int) -> None:
        while True:
            number = next(asked)
            body = {
                "prompt": f"{number} boats went down the river " * 4,
                "max_tokens": output_tokens + place * 37,
                "temperature": 0,
                "ignore_eos": True,
            }
            call = GenerateCall(
                request_id=RequestId(f"bench-{number}"),
                endpoint=Endpoint.COMPLETIONS,
                body=json.dumps(body).encode(),
                stream=True,
                tenant=f"tenant-{place}",
                cache_salt="",
                priority_class=PriorityClass.STANDARD,
            )
            async with aclosing(engine.generate(call)) as items:
                async for _ in items:
                    pass

    clients = [asyncio.create_task(client(place)) for place in range(streams)]
    try:
        await asyncio.sleep(for_s)
    finally:
        for each in clients:
            each.cancel()
        await asyncio.wait(clients)


async def run_engine(args: argparse.Namespace) -> dict[str, Any]:
    """Start an engine, keep it busy, and return the figures."""
    with tempfile.TemporaryDirectory(prefix="step-recording-") as folder:
        steps = Path(folder) / "steps"
        os.environ[STEPS_VARIABLE] = str(steps)
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
            await keep_busy(engine, args.streams, args.output_tokens, args.for_s)
            costs = engine.costs()
            assert costs is not None
        finally:
            await engine.stop()
        found = compare(steps.read_text().splitlines())
    return found | {
        "streams": args.streams,
        "recorded_steps": costs.fitted_steps,
        "fit_error_ratio": costs.fit_error_ratio,
    }


def compare(lines: list[str]) -> dict[str, Any]:
    """Return tokens/s on over off, over the blocks of steps in which only decoding went on."""
    steps = [line.split() for line in lines if line.count(" ") == 3]
    ratios: list[float] = []
    rates: dict[bool, list[float]] = {True: [], False: []}
    for at in range(0, len(steps) - BLOCK_STEPS + 1, BLOCK_STEPS):
        block = steps[at : at + BLOCK_STEPS]
        if len({(tokens, requests) for _, tokens, requests, _ in block}) > 1:
            continue
        time_s = {"0": 0.0, "1": 0.0}
        for on, _, _, took_s in block:
            time_s[on] += float(took_s)
        tokens = int(block[0][1])
        if tokens != int(block[0][2]) or not tokens:
            continue
        half = tokens * BLOCK_STEPS / 2
        rates[True].append(half / time_s["1"])
        rates[False].append(half / time_s["0"])
        ratios.append(time_s["0"] / time_s["1"])
    low, high = resampled(ratios)
    return {
        "ratio": trimmed(ratios),
        "ratio_low": low,
        "ratio_high": high,
        "blocks": len(ratios),
        "steps": len(steps),
        "tokens_per_s_on": median(rates[True]),
        "tokens_per_s_off": median(rates[False]),
    }


def trimmed(values: Sequence[float]) -> float:
    """Return the mean without the lowest and the highest tenth."""
    cut = int(TRIM_RATIO * len(values))
    return fmean(sorted(values)[cut : len(values) - cut])


def resampled(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the trimmed mean."""
    dice = random.Random(1)
    means = sorted(trimmed(dice.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)]


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
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--output-tokens", type=int, default=600)
    parser.add_argument("--for-s", type=float, default=150.0, help="how long it is kept busy")
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
            f"tokens/s on / off: {found['ratio']:.4f} ({found['ratio_low']:.4f} to "
            f"{found['ratio_high']:.4f}, 95 %, {found['blocks']} blocks of {BLOCK_STEPS} steps), "
            f"{found['tokens_per_s_on']:.1f} and {found['tokens_per_s_off']:.1f} tokens/s"
        )
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
