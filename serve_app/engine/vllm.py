"""The vLLM engine: AsyncLLM and vLLM's OpenAI layer in the replica's own process.

    generate(call) -> Generation (task, meter, frames)      vllm_generation.py
                         |
                      OpenAILayer: vLLM's serving classes   vllm_serving.py
                         |
                      MeteredAsyncLLM: AsyncLLM + meter     vllm_core.py
                         |
                      EngineCore and its workers: child processes of vLLM

Importing this module does not import vLLM: that takes seconds, needs its environment
set first, and happens in ``start``.
"""

from __future__ import annotations

import asyncio
import logging
import os
from argparse import Namespace
from collections.abc import AsyncGenerator, Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app.config import VllmSettings
from serve_app.core.cost_meter import EngineCosts
from serve_app.core.progress import Progress
from serve_app.core.types import Outcome, PoolName, ReplicaId, ReplicaView, RequestId
from serve_app.engine import vllm_fork
from serve_app.engine.api import (
    RESUME_UNSUPPORTED,
    EngineDead,
    EngineInfo,
    Final,
    GenerateCall,
    GenerateItem,
    Metered,
    Refusal,
)
from serve_app.engine.meter import RequestMeter
from serve_app.engine.start_stages import StartStages, warm_up
from serve_app.engine.step_records import StepInbox
from serve_app.engine.vllm_args import (
    engine_and_frontend_args,
    prepare_environment,
    served_name,
)
from serve_app.engine.vllm_costs import VllmCosts
from serve_app.engine.vllm_generation import Generation
from serve_app.engine.vllm_output import OwnOutput, root_cause
from serve_app.engine.vllm_resume import resume_problem
from serve_app.engine.vllm_wire import most_tokens

if TYPE_CHECKING:
    import psutil

    from serve_app.engine.vllm_core import MeteredAsyncLLM
    from serve_app.engine.vllm_serving import OpenAILayer

logger = logging.getLogger("headrace.engine")

ABORT_TIMEOUT_S = 2.0


class VllmEngine:
    """One model on one replica, served by vLLM. See ``serve_app.engine.api.Engine``.

    With several choices or prompts in a request, ``Frame.token_ids`` holds the ids of
    all of them: choice after choice, or when streaming in the order of generation; of
    several prompts they may come one frame after their text. ``GenerateCall.max_tokens``
    caps each choice. An aborted generation ends with the finish reason ``abort``.

    ``generate`` raises ``GenerationFailed`` when vLLM fails at this one request.
    """

    def __init__(
        self,
        settings: VllmSettings,
        model_path: Path,
        pool: PoolName,
        replica: ReplicaId,
        clock: Callable[[], float],
    ) -> None:
        """Keep the settings; nothing is started.

        ``clock`` gives the machine's monotonic seconds, as vLLM's processes read them too.
        """
        self._settings = settings
        self._model_path = model_path
        self._pool = pool
        self._replica = replica
        self._clock = clock
        self._listeners: list[Callable[[Metered], None]] = []
        self._in_flight: dict[RequestId, Generation] = {}
        self._extending: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._loading: asyncio.Future[tuple[MeteredAsyncLLM, Namespace]] | None = None
        self._llm: MeteredAsyncLLM | None = None
        self._openai: OpenAILayer | None = None
        self._info: EngineInfo | None = None
        self._snapshots = 0
        self._costs = VllmCosts(
            clock,
            measure=settings.measure_cost,
            coefficients=settings.step_costs.to_core() if settings.step_costs else None,
        )
        self._draining = False
        self._stopping = asyncio.Lock()

    async def start(self) -> EngineInfo:
        """Import vLLM, load the model, generate once; the loop stays free meanwhile.

        Raises:
            ValueError: the settings are wrong; the message names the field and the fix.
            EngineDead: the engine came up and died, or could not generate.
        """
        if self._info is not None:
            return self._info
        output = OwnOutput()
        stages = StartStages(self._pool, self._clock)
        on_cpu = vllm_fork.is_cpu_build()
        prepare_environment(os.environ, on_cpu=on_cpu)
        if on_cpu:
            vllm_fork.start_fork_server()
        with stages.stage("import", "importing torch and vLLM"):
            await asyncio.to_thread(_import_vllm)
        with stages.stage("load", "loading the model"):
            await self._load(output)
        with stages.stage("warm_up", "generating for the first time"):
            await self._warm_up()
        self._info = self._describe(stages)
        self._costs.ready()
        return self._info

    async def generate(self, call: GenerateCall) -> AsyncGenerator[GenerateItem, None]:
        """Yield frames and then one Final, or a single Refusal; see ``Engine.generate``."""
        if self._draining or self._openai is None:
            why = "draining" if self._draining else "not started"
            raise EngineDead(f"the engine is {why}")
        refusal = self._refuse(call)
        if refusal is not None:
            yield refusal
            return
        generation = self._begin(call)
        try:
            while (frame := await generation.next_frame()) is not None:
                yield frame
            final = self._finish(generation)
            if final is not None:
                yield final
        finally:
            await _cancel(generation)

    async def abort(self, request_id: RequestId) -> None:
        """Stop a generation at the next step; unknown ids are ignored."""
        generation = self._in_flight.get(request_id)
        if generation is None or self._llm is None:
            return
        if generation.collectors or not generation.started:
            generation.aborted = True
            await self._llm.abort(list(generation.collectors))

    def extend(self, request_id: RequestId, paid_tokens: int) -> None:
        """See ``Engine.extend``. With a scheduler that is not ours nothing happens."""
        generation = self._in_flight.get(request_id)
        if generation is None or self._llm is None or generation.call.paid_tokens is None:
            return
        most = most_tokens(generation.call)
        tokens = paid_tokens if most is None else min(paid_tokens, most)
        tokens -= len(generation.call.resume_token_ids)
        for name in list(generation.collectors):
            task = asyncio.create_task(self._llm.extend(name, tokens))
            self._extending.add(task)
            task.add_done_callback(self._extending.discard)

    def snapshot(self) -> ReplicaView:
        """Return the load right now.

        vLLM reports only when it steps, so what it holds is counted here, in this
        process; its last report says how much of that is waiting. In-flight tokens are
        prompt and output so far of every sequence.
        """
        self._snapshots += 1
        info = self._info
        llm = self._llm
        unfinished = llm.unfinished if llm is not None else 0
        slots = self._settings.max_num_seqs
        rendering = sum(not generation.started for generation in self._in_flight.values())
        reported = min(llm.load.waiting, unfinished) if llm is not None else 0
        waiting = max(reported, unfinished - slots)
        return ReplicaView(
            replica=self._replica,
            pool=self._pool,
            sequence=self._snapshots,
            slots=slots,
            running=unfinished - waiting,
            waiting=waiting + rendering,
            kv_usage_ratio=llm.load.kv_usage_ratio if llm is not None and unfinished else 0.0,
            kv_tokens_capacity=info.kv_tokens_capacity if info is not None else 0,
            preemptions_total=llm.load.preemptions_total if llm is not None else 0,
            in_flight_tokens=self._in_flight_tokens(),
            prefill_tokens=llm.prefill_tokens if llm is not None else 0,
            draining=self._draining,
        )

    def on_metered(self, listener: Callable[[Metered], None]) -> None:
        """Call ``listener`` once for every request that the engine took and that ended."""
        self._listeners.append(listener)

    def costs(self) -> EngineCosts | None:
        """Return where this replica's time went; None if its steps are not recorded."""
        return self._costs.figures()

    @property
    def processes(self) -> list[psutil.Process]:
        """Return vLLM's processes: the engine core, then its workers. Empty once stopped."""
        return list(self._llm.processes) if self._llm is not None else []

    def progress(self) -> Progress:
        """See ``Engine.progress``. vLLM reports every step; without its statistics
        (``disable_log_stats``) only those that made output.
        """
        llm = self._llm
        if llm is None:
            return Progress(0, busy=False)
        return Progress(llm.steps, busy=llm.unfinished > 0)

    async def check_health(self) -> None:
        """Return if vLLM's processes live.

        Raises:
            EngineDead: they do not.
        """
        if self._info is None or self._llm is None:
            raise EngineDead("the engine is not started")
        if self._llm.errored:
            raise EngineDead("vLLM's engine died; its log has the cause")

    async def drain(self, deadline_s: float) -> int:
        """Take nothing new and end what runs, at the deadline by force; see ``Engine.drain``."""
        self._draining = True
        self._costs.drain()
        try:
            async with asyncio.timeout(max(0.0, deadline_s)):
                await self._idle.wait()
        except TimeoutError:
            cut = list(self._in_flight.values())
            for generation in cut:
                generation.lost = True
            await asyncio.gather(*(_cancel(generation) for generation in cut))
            return len(cut)
        return 0

    async def stop(self) -> None:
        """Abort what runs and end the engine's processes. Idempotent."""
        self._draining = True
        self._costs.drain()
        async with self._stopping:
            await self._abort_all()
            if self._loading is not None and self._llm is None:
                # A start was cancelled: the loading thread cannot be, so wait it out.
                await asyncio.wait({self._loading})
                if not self._loading.cancelled() and self._loading.exception() is None:
                    self._llm = self._loading.result()[0]
            llm, self._llm, self._openai, self._info = self._llm, None, None, None
            self._loading = None
            if llm is not None:
                llm.stop_listening()
                await asyncio.to_thread(llm.close)
            self._costs.shut()

    async def _abort_all(self) -> None:
        """Let what runs end as aborted, and cancel what does not end in time."""
        for request_id in list(self._in_flight):
            await self.abort(request_id)
        with suppress(TimeoutError):
            async with asyncio.timeout(ABORT_TIMEOUT_S):
                await self._idle.wait()
        for generation in list(self._in_flight.values()):
            await _cancel(generation)

    async def _load(self, output: OwnOutput) -> None:
        from serve_app.engine.vllm_serving import OpenAILayer

        self._loading = asyncio.ensure_future(
            asyncio.to_thread(_build, self._settings, self._model_path, self._costs.listen())
        )
        try:
            llm, arguments = await asyncio.shield(self._loading)
        except RuntimeError as error:
            cause = await asyncio.to_thread(lambda: root_cause(output.read()))
            if cause is not None and cause.startswith("ValueError: "):
                raise ValueError(cause.removeprefix("ValueError: ")) from error
            raise EngineDead(f"vLLM's engine did not start: {cause or error}") from error
        self._llm = llm
        self._costs.attach(llm)
        self._openai = await OpenAILayer.build(llm, arguments, served_name(self._settings))

    async def _warm_up(self) -> None:
        listeners, self._listeners = self._listeners, []
        try:
            await warm_up(self.generate)
        finally:
            self._listeners = listeners + self._listeners

    def _describe(self, stages: StartStages) -> EngineInfo:
        assert self._llm is not None
        config = self._llm.vllm_config
        return EngineInfo(
            model=served_name(self._settings),
            revision=self._settings.revision,
            max_model_len=config.model_config.max_model_len,
            kv_tokens_capacity=config.cache_config.num_gpu_blocks * config.cache_config.block_size,
            slots=self._settings.max_num_seqs,
            start_s=sum(stages.durations_s.values()),
            stages_s=stages.durations_s,
        )

    def _refuse(self, call: GenerateCall) -> Refusal | None:
        problem = resume_problem(call)
        if problem is not None:
            return Refusal(400, problem, code=RESUME_UNSUPPORTED)
        if call.request_id in self._in_flight:
            return Refusal(409, f"request {call.request_id} is running", code="duplicate_request")
        return None

    def _begin(self, call: GenerateCall) -> Generation:
        assert self._openai is not None
        meter = RequestMeter(call, self._clock(), self._costs.open(call.tenant))
        generation = Generation(call, meter)
        self._in_flight[call.request_id] = generation
        self._idle.clear()
        generation.task = asyncio.create_task(
            self._openai.run(generation), name=f"generate {call.request_id}"
        )
        generation.task.add_done_callback(lambda _: self._settle(generation))
        return generation

    def _settle(self, generation: Generation) -> None:
        """Account for a generation whose task has ended, in whichever way."""
        del self._in_flight[generation.call.request_id]
        if not self._in_flight:
            self._idle.set()
        task = generation.task
        assert task is not None
        outcome = _outcome(generation, task)
        self._costs.close(generation.meter.account, outcome)
        if generation.refusal is None:
            generation.meter.settle(outcome, self._clock(), self._listeners)
        generation.end()

    def _finish(self, generation: Generation) -> Final | Refusal | None:
        """Return the last item of a generation whose frames were all read.

        None if the engine was stopped under it.

        Raises:
            EngineDead: it was given up when the replica's time was over.
            EngineDead, GenerationFailed: what its task raised.
        """
        task = generation.task
        assert task is not None
        if task.cancelled():
            if generation.lost:
                raise EngineDead("the replica's time was over")
            return None
        task.result()
        if generation.refusal is not None:
            return generation.refusal
        finish_reason = generation.finish_reason or generation.meter.finish_reason
        return Final(
            usage=generation.meter.usage,
            timings=generation.meter.timings(self._clock()),
            frames=generation.frames,
            finish_reason="abort" if generation.aborted else finish_reason,
            replica=self._replica,
        )

    def _in_flight_tokens(self) -> tuple[int, int, int]:
        totals = [0, 0, 0]
        if self._llm is not None and self._in_flight:
            tokens = self._llm.tokens_of_unfinished()
            for generation in self._in_flight.values():
                held = sum(tokens.get(name, 0) for name in generation.collectors)
                totals[generation.call.priority_class] += held
        return totals[0], totals[1], totals[2]


async def _cancel(generation: Generation) -> None:
    """Cancel a generation's task if it runs, and return when the engine was told."""
    task = generation.task
    if task is not None and not task.done():
        task.cancel()
        await asyncio.wait({task})


def _outcome(generation: Generation, task: asyncio.Task[None]) -> Outcome:
    if task.cancelled():
        return Outcome.FAILED if generation.lost else Outcome.CANCELLED
    if task.exception() is not None or generation.refusal is not None:
        return Outcome.FAILED
    return Outcome.CANCELLED if generation.aborted else Outcome.COMPLETED


def _import_vllm() -> None:
    import serve_app.engine.vllm_serving  # noqa: F401


def _build(
    settings: VllmSettings, model_path: Path, inbox: StepInbox | None
) -> tuple[MeteredAsyncLLM, Namespace]:
    from serve_app.engine.vllm_core import MeteredAsyncLLM

    engine_args, arguments = engine_and_frontend_args(settings, model_path)
    started_by = vllm_fork.engine_from_fork_server if vllm_fork.is_cpu_build() else nullcontext
    with started_by():
        return MeteredAsyncLLM.build(engine_args, inbox), arguments
