"""The vLLM engine's own bookkeeping, with a stand-in for everything of vLLM's."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.config import VllmSettings
from serve_app.core.types import Outcome, PoolName, PriorityClass, ReplicaId, RequestId
from serve_app.engine.api import (
    Endpoint,
    EngineDead,
    Final,
    Frame,
    GenerateCall,
    GenerateItem,
    GenerationFailed,
    Metered,
    Refusal,
)
from serve_app.engine.meter import ChoiceStep
from serve_app.engine.vllm import VllmEngine
from serve_app.engine.vllm_args import (
    _check_extra,
    _engine_fields,
    prepare_environment,
    served_name,
)
from serve_app.engine.vllm_generation import Generation
from tests.generate_calls import generate_call

Script = Callable[[Generation], Awaitable[None]]


class FakeLLM:
    """What the engine asks of AsyncLLM; an abort ends the fake's script."""

    def __init__(self) -> None:
        self.aborted: list[str] = []
        self.abort_seen = asyncio.Event()
        self.unfinished = 0
        self.prefill_tokens = 0
        self.load = SimpleNamespace(waiting=0, kv_usage_ratio=0.5, preemptions_total=3)
        self.tokens: dict[str, int] = {}
        self.errored = False
        self.closed = 0

    async def abort(self, ids: list[str]) -> None:
        self.aborted += ids
        self.abort_seen.set()

    def tokens_of_unfinished(self) -> dict[str, int]:
        return self.tokens

    def stop_listening(self) -> None:
        return None

    def close(self) -> None:
        self.closed += 1


class FakeLayer:
    def __init__(self, script: Script) -> None:
        self.run = script


class Bench:
    """An engine whose generations run ``script``."""

    def __init__(self, script: Script) -> None:
        settings = VllmSettings(model="smollm2", max_num_seqs=2)
        self.engine = VllmEngine(
            settings, Path("/models/x"), PoolName("p"), ReplicaId("r"), time.monotonic
        )
        self.llm = FakeLLM()
        self.engine._llm = self.llm  # type: ignore[assignment]  # a fake
        self.engine._openai = FakeLayer(script)  # type: ignore[assignment]  # a fake
        self.metered: list[Metered] = []
        self.engine.on_metered(self.metered.append)

    async def items(self, call: GenerateCall) -> list[GenerateItem]:
        return [item async for item in self.engine.generate(call)]


def _call(name: str = "one", **changes: Any) -> GenerateCall:
    return generate_call(name, **({"endpoint": Endpoint.CHAT} | changes))


def _step(generation: Generation, token_id: int) -> None:
    if not generation.started:
        generation.opened(f"chatcmpl-{generation.call.request_id}", object())
        generation.meter.open_prompt(cumulative=False)
    prompt = generation.meter._prompts[0]
    prompt.observe([ChoiceStep(0, [token_id])], prompt_tokens=4, cached_prompt_tokens=0)
    generation.write("data: {}\n\n")
    generation.complete_step([token_id])


async def _two_tokens(generation: Generation) -> None:
    _step(generation, 1)
    await asyncio.sleep(0)
    _step(generation, 2)


async def _one_token_then_wait(generation: Generation) -> None:
    _step(generation, 1)
    await asyncio.Event().wait()


async def test_a_generation_ends_with_the_engines_account_of_it() -> None:
    bench = Bench(_two_tokens)
    *frames, final = await bench.items(_call())
    assert all(isinstance(frame, Frame) for frame in frames)
    assert isinstance(final, Final)
    assert final.frames == len(frames)
    assert final.usage.completion_tokens == 2
    assert [m.outcome for m in bench.metered] == [Outcome.COMPLETED]
    assert bench.metered[0].usage == final.usage


async def test_a_request_is_accounted_for_before_its_final_is_seen() -> None:
    bench = Bench(_two_tokens)
    async for item in bench.engine.generate(_call()):
        if isinstance(item, Final):
            assert len(bench.metered) == 1
            assert bench.engine.snapshot().waiting == 0


async def test_closing_a_stream_cancels_its_work_and_counts_it_once() -> None:
    bench = Bench(_one_token_then_wait)
    stream = bench.engine.generate(_call())
    await anext(stream)
    await stream.aclose()
    assert [(m.outcome, m.usage.completion_tokens) for m in bench.metered] == [
        (Outcome.CANCELLED, 1)
    ]


async def test_cancelling_before_the_first_frame_counts_as_cancelled() -> None:
    started = asyncio.Event()

    async def wait(generation: Generation) -> None:
        started.set()
        await asyncio.Event().wait()

    bench = Bench(wait)
    reader = asyncio.create_task(bench.items(_call()))
    await started.wait()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert [m.outcome for m in bench.metered] == [Outcome.CANCELLED]


async def test_a_second_cancellation_does_not_interrupt_the_first_ones_cleanup() -> None:
    started, cleaning, finish = asyncio.Event(), asyncio.Event(), asyncio.Event()
    cleaned: list[bool] = []

    async def slow_to_clean(generation: Generation) -> None:
        started.set()
        try:
            await _one_token_then_wait(generation)
        finally:
            cleaning.set()
            await finish.wait()
            cleaned.append(True)

    bench = Bench(slow_to_clean)
    reader = asyncio.create_task(bench.items(_call()))
    await started.wait()
    reader.cancel()
    await cleaning.wait()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    finish.set()
    await bench.engine.drain(10)
    assert cleaned == [True]
    assert len(bench.metered) == 1


async def test_a_refusal_is_the_only_item_and_is_not_metered() -> None:
    async def refuse(generation: Generation) -> None:
        generation.refusal = Refusal(400, "no")

    bench = Bench(refuse)
    assert await bench.items(_call()) == [Refusal(400, "no")]
    assert bench.metered == []


@pytest.mark.parametrize("error", [EngineDead("gone"), GenerationFailed("broken")])
async def test_a_failure_comes_after_the_frames_that_were_real(error: Exception) -> None:
    async def fail(generation: Generation) -> None:
        _step(generation, 1)
        raise error

    bench = Bench(fail)
    stream = bench.engine.generate(_call())
    assert isinstance(await anext(stream), Frame)
    with pytest.raises(type(error)):
        await anext(stream)
    assert [(m.outcome, m.usage.completion_tokens) for m in bench.metered] == [(Outcome.FAILED, 1)]


async def test_abort_reaches_vllm_and_ends_the_stream_as_aborted() -> None:
    async def until_aborted(generation: Generation) -> None:
        _step(generation, 1)
        await bench.llm.abort_seen.wait()

    bench = Bench(until_aborted)
    stream = bench.engine.generate(_call())
    await anext(stream)
    await bench.engine.abort(RequestId("one"))
    await bench.engine.abort(RequestId("unknown"))
    final = await anext(stream)
    assert isinstance(final, Final)
    assert final.finish_reason == "abort"
    assert bench.llm.aborted == ["chatcmpl-one"]
    assert [m.outcome for m in bench.metered] == [Outcome.CANCELLED]


async def test_the_same_id_cannot_run_twice_at_once() -> None:
    bench = Bench(_one_token_then_wait)
    stream = bench.engine.generate(_call())
    await anext(stream)
    (refusal,) = await bench.items(_call())
    assert isinstance(refusal, Refusal)
    assert refusal.status == 409
    await stream.aclose()
    assert bench.engine._in_flight == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"stream": False},
        {"endpoint": Endpoint.COMPLETIONS, "body": b'{"prompt":["a","b"]}'},
        {"endpoint": Endpoint.COMPLETIONS, "body": b'{"prompt":[[1,2],[3]]}'},
    ],
)
async def test_going_on_with_what_is_no_single_stream_is_refused(changes: dict[str, Any]) -> None:
    (refusal,) = await Bench(_two_tokens).items(_call(resume_token_ids=(1,), **changes))
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.code) == (400, "resume_unsupported")


async def test_a_resumed_stream_bears_the_time_of_its_beginning() -> None:
    async def chunk(generation: Generation) -> None:
        _step(generation, 1)
        generation.write('data: {"created":200,"choices":[{"delta":"\\"created\\":7"}]}\n\n')
        generation.complete_step([2])

    *frames, _ = await Bench(chunk).items(_call(resume_token_ids=(9,), resume_created_s=100))
    data = b"".join(frame.data for frame in frames if isinstance(frame, Frame))
    assert data.endswith(b'{"created":100,"choices":[{"delta":"\\"created\\":7"}]}\n\n')


async def test_draining_takes_no_new_work_and_waits_for_old() -> None:
    release = asyncio.Event()

    async def until_released(generation: Generation) -> None:
        _step(generation, 1)
        await release.wait()

    bench = Bench(until_released)
    stream = bench.engine.generate(_call())
    await anext(stream)
    draining = asyncio.create_task(bench.engine.drain(60))
    await asyncio.sleep(0)
    assert bench.engine.snapshot().draining
    with pytest.raises(EngineDead, match="draining"):
        await bench.items(_call("two"))
    assert not draining.done()
    release.set()
    assert await draining == 0
    assert isinstance(await anext(stream), Final)


async def test_a_drains_deadline_cuts_what_runs_and_it_counts_as_failed() -> None:
    bench = Bench(_one_token_then_wait)
    metered: list[Metered] = []
    bench.engine.on_metered(metered.append)
    stream = bench.engine.generate(_call())
    await anext(stream)
    assert await bench.engine.drain(0) == 1
    with pytest.raises(EngineDead, match="time was over"):
        await anext(stream)
    [each] = metered
    assert (each.outcome, each.usage.completion_tokens) == (Outcome.FAILED, 1)


async def test_stop_ends_open_streams_and_is_idempotent() -> None:
    async def until_aborted(generation: Generation) -> None:
        _step(generation, 1)
        await bench.llm.abort_seen.wait()

    bench = Bench(until_aborted)
    stream = bench.engine.generate(_call())
    await anext(stream)
    await asyncio.gather(bench.engine.stop(), bench.engine.stop())
    await bench.engine.stop()
    assert bench.llm.closed == 1
    assert isinstance(await anext(stream), Final)
    with pytest.raises(EngineDead):
        await bench.engine.check_health()


async def test_an_idle_engine_reports_no_load_whatever_vllm_said_last() -> None:
    bench = Bench(_two_tokens)
    bench.llm.load.waiting = 7
    view = bench.engine.snapshot()
    assert (view.running, view.waiting, view.kv_usage_ratio) == (0, 0, 0.0)
    assert view.preemptions_total == 3


@pytest.mark.parametrize(
    ("unfinished", "reported_waiting", "running", "waiting"),
    [(1, 0, 1, 0), (2, 1, 1, 1), (5, 0, 2, 3), (5, 4, 1, 4), (1, 6, 0, 1)],
)
async def test_load_adds_up_to_what_the_engine_holds(
    unfinished: int, reported_waiting: int, running: int, waiting: int
) -> None:
    bench = Bench(_two_tokens)
    bench.llm.unfinished = unfinished
    bench.llm.load.waiting = reported_waiting
    view = bench.engine.snapshot()
    assert (view.running, view.waiting, view.slots) == (running, waiting, 2)
    assert view.sequence == 1
    assert bench.engine.snapshot().sequence == 2


async def test_in_flight_tokens_are_split_by_class() -> None:
    bench = Bench(_one_token_then_wait)
    bench.llm.tokens = {"chatcmpl-a": 10, "chatcmpl-b": 7, "stray": 99}
    streams = []
    for name, cls in (("a", PriorityClass.CRITICAL), ("b", PriorityClass.SHEDDABLE)):
        streams.append(bench.engine.generate(_call(name, priority_class=cls)))
        await anext(streams[-1])
    assert bench.engine.snapshot().in_flight_tokens == (10, 0, 7)
    for stream in streams:
        await stream.aclose()


def test_the_environment_keeps_what_the_user_set() -> None:
    environment = {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}
    prepare_environment(environment, on_cpu=False)
    assert environment["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert "TORCH_COMPILE_DISABLE" not in environment


def test_nothing_is_compiled_on_a_cpu_unless_the_user_says_so() -> None:
    environment: dict[str, str] = {}
    prepare_environment(environment, on_cpu=True)
    assert environment["TORCH_COMPILE_DISABLE"] == "1"
    environment = {"TORCH_COMPILE_DISABLE": "0"}
    prepare_environment(environment, on_cpu=True)
    assert environment["TORCH_COMPILE_DISABLE"] == "0"


def test_the_served_name_is_the_last_part_of_the_path() -> None:
    assert served_name(VllmSettings(model="smollm2")) == "smollm2"
    assert served_name(VllmSettings(model="/srv/models/llama-8b/")) == "llama-8b"


def test_cpu_engines_run_eagerly_with_a_cache_of_the_size_asked_for() -> None:
    settings = VllmSettings(model="m", cpu_kv_cache_gib=0.5, max_model_len=64)
    on_cpu = _engine_fields(settings, Path("/m"), on_cpu=True)
    on_gpu = _engine_fields(settings, Path("/m"), on_cpu=False)
    assert (on_cpu["enforce_eager"], on_cpu["kv_cache_memory_bytes"]) == (True, 2**29)
    assert not on_gpu["enforce_eager"]
    assert "kv_cache_memory_bytes" not in on_gpu
    assert on_gpu["scheduling_policy"] == "priority"
    assert on_gpu["max_model_len"] == 64


def test_extra_arguments_are_checked_with_a_hint() -> None:
    known = {"stream_interval", "model", "max_num_seqs"}
    _check_extra("stream_interval", {"model"}, known)
    with pytest.raises(ValueError, match="did you mean 'stream_interval'"):
        _check_extra("stream_intervall", {"model"}, known)
    with pytest.raises(ValueError, match=r"set engine\.max_num_seqs"):
        _check_extra("max_num_seqs", {"max_num_seqs"}, known)


def test_importing_the_engine_imports_neither_vllm_nor_torch() -> None:
    code = (
        "import sys, serve_app.engine.vllm; "
        "sys.exit(any(name.split('.')[0] in ('vllm', 'torch') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=240).returncode == 0
