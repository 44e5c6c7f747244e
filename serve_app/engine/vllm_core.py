"""vLLM's AsyncLLM with a meter in it.

Importing this module imports vLLM and torch (seconds): only a replica's engine does so.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

import psutil
from pydantic import ValidationError
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

from serve_app.engine.api import RESUME_UNSUPPORTED, Refusal
from serve_app.engine.meter import ChoiceStep, PromptMeter
from serve_app.engine.step_reader import StepReader
from serve_app.engine.step_records import SOCKET_VARIABLE, StepInbox
from serve_app.engine.vllm_executor import attached_executor
from serve_app.engine.vllm_extension import extension
from serve_app.engine.vllm_generation import Generation
from serve_app.engine.vllm_resume import replay, sampling_problem
from serve_app.engine.vllm_scheduler import recording_scheduler

SHUTDOWN_TIMEOUT_S = 10.0
REPLAYED_AT_ONCE = 32


class Load(StatLoggerBase):  # type: ignore[misc]  # vLLM is untyped here
    """The last step's load, as the scheduler reported it.

    ``record`` runs on the event loop after every engine step: it only copies numbers, and
    reads what the scheduler wrote of its steps, so that it need not keep it.
    """

    def __init__(self, vllm_config: Any = None, engine_index: int = 0) -> None:
        self.steps: StepReader | None = None
        self.waiting = 0
        self.kv_usage_ratio = 0.0
        self.preemptions_total = 0

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is not None:
            self.waiting = (
                scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            )
            self.kv_usage_ratio = scheduler_stats.kv_cache_usage
        if iteration_stats is not None:
            self.preemptions_total += iteration_stats.num_preempted_reqs
        if self.steps is not None:
            self.steps.read()

    def log_engine_initialized(self) -> None:
        """Nothing to say: the Prometheus logger beside this one publishes the config."""

    def forget(self) -> None:
        """Drop numbers of a step that is over: an idle engine does not report."""
        self.waiting = 0
        self.kv_usage_ratio = 0.0


class MeteredAsyncLLM(AsyncLLM):  # type: ignore[misc]  # vLLM is untyped here
    """AsyncLLM that reports every output step to the generation that asked for it.

    vLLM's OpenAI layer calls ``generate`` somewhere below a handler that knows nothing
    of ours, so the generation is found through the context of the running task.
    """

    load: Load
    generation: ContextVar[Generation | None]
    processes: list[psutil.Process]
    records_steps: bool
    steps: int

    @classmethod
    def build(cls, engine_args: AsyncEngineArgs, inbox: StepInbox | None = None) -> MeteredAsyncLLM:
        """Start the engine's processes and return when the model is loaded; blocks.

        With an ``inbox`` the scheduler sends there what each step contains, if it can:
        ``records_steps``.

        Raises:
            ValueError: vLLM cannot serve this model with these settings.
            RuntimeError: a process of the engine failed.
        """
        load = Load()
        usage_context = UsageContext.OPENAI_API_SERVER
        try:
            vllm_config = engine_args.create_engine_config(usage_context)
        except ValidationError as error:
            raise ValueError(_problems(error)) from error
        scheduler = None if inbox is None else recording_scheduler(vllm_config)
        if inbox is not None and scheduler is not None:
            vllm_config.scheduler_config.scheduler_cls = scheduler
            # The engine process begins with this environment.
            os.environ[SOCKET_VARIABLE] = inbox.path
        engine = cls(
            vllm_config=vllm_config,
            executor_class=attached_executor(vllm_config),
            log_requests=engine_args.enable_log_requests,
            log_stats=not engine_args.disable_log_stats,
            usage_context=usage_context,
            stat_loggers=[lambda vllm_config, engine_index: load],
        )
        engine.load = load
        engine._replay_resumed()
        engine.records_steps = scheduler is not None
        engine.generation = ContextVar("generation", default=None)
        engine.count_steps()
        engine.processes = _descendants(engine.engine_core.resources.engine_manager.processes)
        return engine

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Return vLLM's stream, metered if a generation is under way in this context."""
        generation = self.generation.get()
        if generation is None:
            stream: AsyncGenerator[RequestOutput, None] = super().generate(
                prompt, sampling_params, request_id, **options
            )
            return stream
        resumed = generation.call.resume_token_ids
        problem = sampling_problem(sampling_params, len(resumed)) if resumed else None
        if problem is not None:
            generation.refusal = Refusal(400, problem, code=RESUME_UNSUPPORTED)
            raise VLLMValidationError(problem)
        cumulative = sampling_params.output_kind != RequestOutputKind.DELTA
        prompt_meter = generation.meter.open_prompt(cumulative=cumulative)
        stream = super().generate(prompt, sampling_params, request_id, **options)
        return _metered(stream, generation, prompt_meter, request_id)

    async def add_request(self, request_id: str, *args: Any, **options: Any) -> Any:
        """Hand a request to the engine, and keep the collector of its outputs for the meter."""
        if not self.output_processor.has_unfinished_requests():
            self.load.forget()
        generation = self.generation.get()
        try:
            collector = await super().add_request(request_id, *args, **options)
        except asyncio.CancelledError:
            # vLLM registers a request before it sends it, and aborts only what was sent.
            await self.abort(request_id)
            raise
        if generation is not None:
            generation.opened(request_id, collector)
            if generation.aborted:
                await self.abort(request_id)
        return collector

    def _replay_resumed(self) -> None:
        """Register requests that another replica began as such; see vllm_resume."""
        register = self.output_processor.add_request
        states = self.output_processor.request_states

        def add_request(request: Any, *args: Any, **options: Any) -> None:
            generation = self.generation.get()
            resumed = () if generation is None else generation.call.resume_token_ids
            if generation is None or not resumed:
                register(request, *args, **options)
                return
            usual = partial(register, request, *args, **options)
            generation.replayed = replay(usual, states, request, resumed)

        self.output_processor.add_request = add_request

    def read_steps_with(self, steps: StepReader) -> None:
        """Have ``steps`` know whose every request is before the engine has it, and read on.

        vLLM gives a request its own ids, one to each choice, and registers each with its
        output processor just before it sends it.
        """
        register = self.output_processor.add_request

        def add_request(request: Any, *args: Any, **options: Any) -> None:
            generation = self.generation.get()
            if generation is not None and generation.meter.account is not None:
                steps.expect(request.request_id, generation.meter.account)
            register(request, *args, **options)

        self.output_processor.add_request = add_request
        self.load.steps = steps

    def count_steps(self) -> None:
        """Count from now on in ``steps`` what the engine reports, once per step of its own."""
        self.steps = 0
        report = self.output_processor.update_scheduler_stats

        def counted(stats: Any) -> None:
            self.steps += 1
            report(stats)

        self.output_processor.update_scheduler_stats = counted

    async def extend(self, request_id: str, output_tokens: int) -> None:
        """Let a request that runs go on to ``output_tokens``; what has ended has ended."""
        internal_ids = self.output_processor.external_req_ids.get(request_id, ())
        told = [extension(each, output_tokens) for each in internal_ids]
        await self.engine_core.abort_requests_async(told)

    def stop_listening(self) -> None:
        """Stop reading the engine's output, so that its end is not taken for its death."""
        if self.output_handler is not None:
            self.output_handler.cancel()

    def close(self) -> None:
        """End the engine's processes and return when they are gone; blocks, at most 30 s.

        Workers outlive a dead engine core by seconds: they are not waited for but killed.
        """
        died: bool = self.engine_core.resources.engine_dead
        self.shutdown(timeout=SHUTDOWN_TIMEOUT_S)
        _, alive = psutil.wait_procs(self.processes, timeout=0 if died else SHUTDOWN_TIMEOUT_S)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=SHUTDOWN_TIMEOUT_S)

    @property
    def unfinished(self) -> int:
        """Sequences the engine has, running or waiting; a request with n=2 has two."""
        count: int = self.output_processor.get_num_unfinished_requests()
        return count

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens of sequences without an output token yet, cached ones included."""
        tokens: int = self.output_processor.get_num_queued_tokens()
        return tokens

    def tokens_of_unfinished(self) -> dict[str, int]:
        """Return tokens of context, prompt and output so far, by external request id."""
        tokens: dict[str, int] = {}
        for state in self.output_processor.request_states.values():
            generated = state.stats.num_generation_tokens if state.stats is not None else 0
            held = tokens.get(state.external_req_id, 0)
            tokens[state.external_req_id] = held + state.prompt_len + generated
        return tokens


def _problems(error: ValidationError) -> str:
    """Return what is wrong with a configuration of vLLM's: the first line of each problem."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    texts = [str(problem["msg"]).removeprefix("Value error, ") for problem in problems]
    return "; ".join(text.strip().partition("\n")[0] for text in texts)


def _descendants(processes: list[Any]) -> list[psutil.Process]:
    """Return the engine's processes with their own children, the workers."""
    found: list[psutil.Process] = []
    for child in processes:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(child.pid)
            found += [process, *process.children(recursive=True)]
    return found


async def _metered(
    stream: AsyncGenerator[RequestOutput, None],
    generation: Generation,
    prompt: PromptMeter,
    request_id: str,
) -> AsyncGenerator[RequestOutput, None]:
    try:
        async for output in stream:
            if generation.replayed:
                generation.mute()
                for number, replayed in enumerate(_take_replayed(generation, output), 1):
                    yield replayed
                    if number % REPLAYED_AT_ONCE == 0:
                        # Thousands of tokens in one go would hold up every other stream here.
                        await asyncio.sleep(0)
                generation.unmute()
            token_ids = _observe(output, generation, prompt)
            yield output
            # vLLM's OpenAI layer wants the next step: it has written this one's text.
            if output.finished:
                generation.hold(token_ids)
            else:
                generation.complete_step(token_ids)
    except Exception as error:
        generation.engine_errors.append(error)
        raise
    finally:
        await stream.aclose()
        # What the engine had generated and nobody had fetched when the stream was closed.
        collector = generation.collectors.get(request_id)
        if collector is not None and isinstance(collector.output, RequestOutput):
            _observe(collector.output, generation, prompt)
        generation.closed(request_id)


def _take_replayed(generation: Generation, first: RequestOutput) -> list[RequestOutput]:
    """Return what another replica delivered, with what only the ``first`` own output tells."""
    outputs, generation.replayed = generation.replayed, []
    for output in outputs:
        output.num_cached_tokens = _cached_prompt_tokens(first)
    return outputs


def _cached_prompt_tokens(output: RequestOutput) -> int:
    """Return the cached tokens of the client's prompt; resumed tokens may be cached too."""
    return min(output.num_cached_tokens or 0, len(output.prompt_token_ids or ()))


def _observe(output: RequestOutput, generation: Generation, prompt: PromptMeter) -> list[int]:
    times = output.metrics
    if times is not None and times.first_token_ts:
        generation.meter.observe_times(
            queued_s=times.scheduled_ts - times.queued_ts,
            first_token_s=times.first_token_ts - times.queued_ts,
        )
    steps = [ChoiceStep(o.index, o.token_ids, o.finish_reason) for o in output.outputs]
    if not prompt.completion_tokens and all(
        not step.token_ids and step.finish_reason in (None, "abort") for step in steps
    ):
        # Aborted before its first token: vLLM does not say how much it had prefilled.
        return []
    return prompt.observe(
        steps,
        prompt_tokens=len(output.prompt_token_ids or ()),
        cached_prompt_tokens=_cached_prompt_tokens(output),
    )
