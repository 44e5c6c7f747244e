"""The simulated engine: vLLM's scheduling physics in real time, answers made of words.

``core/engine_model.py`` decides when each token exists; this file waits until then and
renders it. It passes the same contract suite as the real engine, so that a cluster
without GPUs, a load test and a fault drill run the product's own code.

With ``zero_latency`` the model's time jumps instead of being waited for: one step per
turn of the event loop, for measuring what everything around an engine costs. Then no
engine time is attributed either: none passes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import cast

from serve_app.config import SimSettings
from serve_app.core.attribution import Account
from serve_app.core.cost_meter import CostMeter, EngineCosts
from serve_app.core.engine_model import EngineModel, EngineParams, Sequence
from serve_app.core.model_steps import ModelSteps
from serve_app.core.progress import Progress
from serve_app.core.types import Outcome, PoolName, ReplicaId, ReplicaView, RequestId
from serve_app.engine.api import (
    Endpoint,
    EngineDead,
    EngineInfo,
    EngineTimings,
    Final,
    Frame,
    GenerateCall,
    GenerateItem,
    Metered,
    Refusal,
)
from serve_app.engine.sim_generation import Generation
from serve_app.engine.sim_text import Job, read_job
from serve_app.engine.sim_wire import Header
from serve_app.engine.start_stages import warm_up

_log = logging.getLogger(__name__)

CUT_S = 1.0


def engine_params(settings: SimSettings) -> EngineParams:
    """Return the model's parameters for ``settings``.

    Raises:
        ValueError: fields contradict each other; the message says which and the fix.
    """
    capacity_tokens = settings.kv_blocks * settings.block_tokens
    if settings.max_model_len > capacity_tokens:
        raise ValueError(
            f"max_model_len ({settings.max_model_len}) exceeds the KV cache of "
            f"{capacity_tokens} tokens: lower it or raise kv_blocks"
        )
    return EngineParams(
        max_num_seqs=settings.max_num_seqs,
        token_budget=settings.token_budget,
        kv_blocks=settings.kv_blocks,
        block_tokens=settings.block_tokens,
        overhead_s=settings.overhead_s,
        weights_s=settings.weights_s,
        prefill_s_per_token=settings.prefill_s_per_token,
        context_s_per_token=settings.context_s_per_token,
        batch_s_per_request=settings.batch_s_per_request,
    )


class SimEngine:
    """An ``Engine`` without a model. ``clock`` returns monotonic seconds."""

    def __init__(
        self,
        settings: SimSettings,
        pool: PoolName,
        replica: ReplicaId,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._replica = replica
        self._clock = clock
        self._model = EngineModel(EngineParams())
        self._costs: CostMeter | None = None
        if not settings.zero_latency:
            known = settings.step_costs
            self._costs = CostMeter(
                clock(), settings.block_tokens, known.to_core() if known else None
            )
        self._origin_s = 0.0
        self._virtual_s = 0.0
        self._live: dict[RequestId, Generation] = {}
        self._listeners: list[Callable[[Metered], None]] = []
        self._snapshots = 0
        self._unavailable: str | None = "the engine has not started"
        self._draining = False
        self._dead = False
        self._pump: asyncio.Task[None] | None = None
        self._work = asyncio.Event()
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._frozen_at_s = 0.0
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> EngineInfo:
        """Be ready after the configured cold start and a first token; see ``Engine.start``."""
        settings = self._settings
        began_s = self._clock()
        on_run = on_freed = None
        if self._costs is not None:
            steps = ModelSteps(self._costs, self._wall_s, _account_of)
            on_run, on_freed = steps.stepped, steps.freed
        self._model = EngineModel(engine_params(settings), on_run=on_run, on_freed=on_freed)
        await asyncio.sleep(settings.start_delay_s)
        self._origin_s = loaded_s = self._clock()
        self._unavailable = None
        self._pump = asyncio.create_task(self._run(), name=f"sim engine {self._replica}")
        self._pump.add_done_callback(self._pump_ended)
        listeners, self._listeners = self._listeners, []
        try:
            await warm_up(self.generate)
        finally:
            self._listeners = listeners + self._listeners
        ready_s = self._clock()
        if self._costs is not None:
            self._costs.ready(ready_s)
        return EngineInfo(
            model=settings.model,
            revision=settings.revision,
            max_model_len=settings.max_model_len,
            kv_tokens_capacity=self._model.capacity_tokens,
            slots=settings.max_num_seqs,
            start_s=ready_s - began_s,
            stages_s={"load": loaded_s - began_s, "warm_up": ready_s - loaded_s},
        )

    async def generate(self, call: GenerateCall) -> AsyncGenerator[GenerateItem, None]:
        """Yield frames and a Final, or one Refusal; see ``Engine.generate``."""
        if self._dead:
            raise EngineDead("the simulated engine is dead")
        if self._unavailable is not None:
            raise EngineDead(self._unavailable)
        job = self._understand(call)
        if isinstance(job, Refusal):
            yield job
            return
        generation = self._begin(call, job)
        frames = 0
        try:
            while True:
                generation.cut(self._now_virtual_s())
                data, token_ids = generation.render()
                if data:
                    yield Frame(frames, data, token_ids)
                    frames += 1
                if generation.complete():
                    break
                if self._dead:
                    raise EngineDead("the simulated engine died")
                if generation.lost:
                    raise EngineDead("the replica's time was over")
                await generation.progress()
            self._settle(generation)
            yield Final(
                usage=generation.usage(),
                timings=self._timings(generation),
                frames=frames,
                finish_reason=generation.finish_reason(),
                replica=self._replica,
            )
        finally:
            self._settle(generation)

    async def abort(self, request_id: RequestId) -> None:
        """End a generation with finish reason ``abort``; unknown ids are ignored."""
        generation = self._live.get(request_id)
        if generation is not None:
            generation.abort(self._now_virtual_s())

    def extend(self, request_id: RequestId, paid_tokens: int) -> None:
        """See ``Engine.extend``."""
        generation = self._live.get(request_id)
        if generation is not None:
            generation.extend(paid_tokens)

    def snapshot(self) -> ReplicaView:
        """Return the load right now."""
        self._snapshots += 1
        model = self._model
        return ReplicaView(
            replica=self._replica,
            pool=self._pool,
            sequence=self._snapshots,
            slots=self._settings.max_num_seqs,
            running=model.running,
            waiting=model.waiting,
            kv_usage_ratio=model.kv_usage_ratio(),
            kv_tokens_capacity=model.capacity_tokens,
            preemptions_total=model.preemptions_total,
            in_flight_tokens=model.in_flight_tokens(),
            prefill_tokens=model.prefill_tokens(),
            draining=self._draining,
        )

    def on_metered(self, listener: Callable[[Metered], None]) -> None:
        """Call ``listener`` once for every generation that ends."""
        self._listeners.append(listener)

    def costs(self) -> EngineCosts | None:
        """Return where this replica's time went; None with ``zero_latency``."""
        if self._costs is None:
            return None
        now_s = self._clock()
        if self._pump is not None and not self._dead:
            self._advance(self._now_virtual_s())
            now_s = self._wall_s(self._virtual_s)
        return self._costs.read(now_s)

    def progress(self) -> Progress:
        """See ``Engine.progress``."""
        model = self._model
        return Progress(model.steps_total, busy=model.running + model.waiting > 0)

    async def check_health(self) -> None:
        """Return if the engine lives.

        Raises:
            EngineDead: it was killed, or its loop failed.
        """
        if self._dead:
            raise EngineDead("the simulated engine is dead")

    async def drain(self, deadline_s: float) -> int:
        """Take nothing new and end what runs, at the deadline by force; see ``Engine.drain``."""
        self._draining = True
        self._unavailable = "the engine is draining"
        if self._costs is not None:
            self._costs.drain(self._clock())
        try:
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
        except TimeoutError:
            return await self._cut()
        return 0

    async def stop(self) -> None:
        """Abort what runs and end the loop. Idempotent."""
        self._draining = True
        self._unavailable = "the engine has stopped"
        if self._costs is not None:
            self._costs.drain(self._clock())
        for generation in list(self._live.values()):
            generation.abort(self._now_virtual_s())
        pump, self._pump = self._pump, None
        if pump is not None:
            pump.cancel()
            await asyncio.wait([pump])

    def kill(self) -> None:
        """Die as a crashed engine does: open generations raise EngineDead. For fault tests."""
        self._dead = True
        if self._pump is not None:
            self._pump.cancel()
        for generation in self._live.values():
            generation.wake()

    def freeze(self) -> None:
        """Hang as an engine does whose kernel never returns: it answers and steps no more.

        For fault tests; ``thaw`` lets it go on where it was.
        """
        if self._thawed.is_set():
            self._now_virtual_s()
            self._frozen_at_s = self._clock()
            self._thawed.clear()

    def thaw(self) -> None:
        """Go on after ``freeze``, as if no time had passed."""
        if not self._thawed.is_set():
            self._origin_s += self._clock() - self._frozen_at_s
            self._thawed.set()

    async def _cut(self) -> int:
        """End what runs as lost; a reader that takes nothing is not waited for."""
        cut = list(self._live.values())
        for generation in cut:
            generation.lost = True
            generation.wake()
        with suppress(TimeoutError):
            async with asyncio.timeout(CUT_S):
                await self._idle.wait()
        return len(cut)

    # ---- one generation ------------------------------------------------------------

    def _understand(self, call: GenerateCall) -> Job | Refusal:
        if call.request_id in self._live:
            return Refusal(409, f"request {call.request_id} is running", code="duplicate_request")
        return read_job(
            call,
            served_model=self._settings.model,
            max_model_len=self._settings.max_model_len,
            default_output_tokens=self._settings.default_output_tokens,
            seed=self._settings.seed,
        )

    def _begin(self, call: GenerateCall, job: Job) -> Generation:
        header = Header(
            endpoint=call.endpoint,
            id=("chatcmpl-" if call.endpoint is Endpoint.CHAT else "cmpl-") + call.request_id,
            created_s=call.resume_created_s or int(time.time()),
            model=job.model,
        )
        account = None if self._costs is None else self._costs.open(call.tenant)
        generation = Generation(call, job, header, self._model, self._clock(), account)
        now_s = self._now_virtual_s()
        if self._costs is not None:
            # The time up to this request is idle if nothing else is there.
            self._advance(now_s)
            self._costs.occupied(self._wall_s(now_s))
        generation.submit(now_s, self._settings)
        self._live[call.request_id] = generation
        self._idle.clear()
        self._work.set()
        return generation

    def _settle(self, generation: Generation) -> None:
        """Free and meter a generation, once, however it ended."""
        if self._live.pop(generation.call.request_id, None) is None:
            return
        complete = generation.complete() and not generation.aborted
        generation.abort(self._now_virtual_s())
        if not self._live:
            self._idle.set()
        if complete:
            outcome = Outcome.COMPLETED
        else:
            failed = self._dead or generation.lost
            outcome = Outcome.FAILED if failed else Outcome.CANCELLED
        if self._costs is not None and generation.account is not None:
            self._costs.close(generation.account, outcome)
        metered = Metered(
            request_id=generation.call.request_id,
            tenant=generation.call.tenant,
            usage=generation.usage(),
            outcome=outcome,
            timings=self._timings(generation),
            charge=generation.call.charge,
            attempt=generation.call.attempt,
        )
        for listener in self._listeners:
            listener(metered)

    def _timings(self, generation: Generation) -> EngineTimings:
        queued_s, first_token_s = generation.virtual_timings_s()
        total_s = self._clock() - generation.began_s
        if self._settings.zero_latency:
            # The model's seconds did not pass; what passed is not worth telling apart.
            queued_s = None if queued_s is None else 0.0
            first_token_s = None if first_token_s is None else total_s
            return EngineTimings(queued_s, first_token_s, total_s)
        speed = self._settings.speed
        return EngineTimings(
            queued_s=None if queued_s is None else queued_s / speed,
            first_token_s=None if first_token_s is None else first_token_s / speed,
            total_s=total_s,
        )

    # ---- time ----------------------------------------------------------------------

    def _now_virtual_s(self) -> float:
        if not self._settings.zero_latency and self._thawed.is_set():
            elapsed_s = (self._clock() - self._origin_s) * self._settings.speed
            self._virtual_s = max(self._virtual_s, elapsed_s)
        return self._virtual_s

    def _wall_s(self, virtual_s: float) -> float:
        """Return when, on this engine's clock, the model's time is ``virtual_s``."""
        return self._origin_s + virtual_s / self._settings.speed

    def _advance(self, until_s: float) -> None:
        """Run the model up to ``until_s`` and notice when it has no work left."""
        self._model.advance(until_s)
        if self._costs is not None and not self._model.busy:
            self._costs.vacant()

    async def _run(self) -> None:
        """Complete each step when its time has come and wake who got tokens."""
        model = self._model
        while True:
            await self._thawed.wait()
            if not model.busy:
                self._work.clear()
                await self._work.wait()
                continue
            step_ends_s = model.next_step_s()
            if self._settings.zero_latency:
                await asyncio.sleep(0)
                self._virtual_s = max(self._virtual_s, step_ends_s)
            else:
                ahead_s = step_ends_s - self._now_virtual_s()
                await asyncio.sleep(max(0.0, ahead_s / self._settings.speed))
                self._now_virtual_s()
            self._advance(self._virtual_s)
            for generation in self._live.values():
                generation.wake_if_progressed()

    def _pump_ended(self, pump: asyncio.Task[None]) -> None:
        error = None if pump.cancelled() else pump.exception()
        if error is not None:
            _log.error("the simulated engine's loop failed", exc_info=error)
            self.kill()


def _account_of(sequence: Sequence) -> Account:
    # A generation names its sequences so; see Generation.submit.
    return cast(Account, sequence.name)
