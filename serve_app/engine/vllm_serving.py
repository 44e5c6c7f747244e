"""vLLM's own OpenAI layer, called in process: requests in, SSE text out.

Chat templates, tools, structured output and logprobs are vLLM's; this module hands it
the request that the router admitted, and words its refusals as OpenAI does. Importing
it imports vLLM (seconds): only a replica's engine does so.
"""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import Headers, State
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.exception_handling.utils import sanitize_message
from vllm.exceptions import VLLMClientError
from vllm.v1.engine.exceptions import EngineDeadError

from serve_app.engine.api import Endpoint, EngineDead, GenerateCall, GenerationFailed
from serve_app.engine.vllm_core import MeteredAsyncLLM
from serve_app.engine.vllm_generation import Generation, stream_error
from serve_app.engine.vllm_wire import refusal, request_body, validation_error

CLOSE_TIMEOUT_S = 5.0
_STREAM_LOGGERS = (
    "vllm.entrypoints.openai.chat_completion.serving",
    "vllm.entrypoints.openai.completion.serving",
)


@dataclass(frozen=True, slots=True)
class _Handler:
    request_type: type[Any]
    create: Callable[[Any, Any], Awaitable[Any]]


class OpenAILayer:
    """vLLM's serving objects of one engine, one per endpoint."""

    def __init__(self, engine: MeteredAsyncLLM, state: State, served_name: str) -> None:
        self._engine = engine
        self._served_name = served_name
        self._handlers: Mapping[Endpoint, _Handler] = {
            Endpoint.CHAT: _Handler(
                ChatCompletionRequest, state.openai_serving_chat.create_chat_completion
            ),
            Endpoint.COMPLETIONS: _Handler(
                CompletionRequest, state.openai_serving_completion.create_completion
            ),
        }

    @classmethod
    async def build(
        cls, engine: MeteredAsyncLLM, arguments: Namespace, served_name: str
    ) -> OpenAILayer:
        """Build vLLM's serving objects on a running engine."""
        for name in _STREAM_LOGGERS:
            logging.getLogger(name).addFilter(_is_not_known)
        state = State()
        await init_app_state(engine, state, arguments, await engine.get_supported_tasks())
        _name_answers(state.openai_serving_models, engine, served_name)
        return cls(engine, state, served_name)

    async def run(self, generation: Generation) -> None:
        """Serve one call, writing into ``generation``; runs in a task of its own.

        A refusal is left in ``generation.refusal``.

        Raises:
            EngineDead: the engine died.
            GenerationFailed: the engine or its OpenAI layer failed at this request.
        """
        self._engine.generation.set(generation)
        handler = self._handlers[generation.call.endpoint]
        try:
            context_tokens = self._engine.model_config.max_model_len
            body = request_body(generation.call, context_tokens)
            generation.model = str(body.get("model") or self._served_name)
            body["model"] = self._served_name
            request = handler.request_type.model_validate(body)
            result = await handler.create(request, _raw_request(generation.call))
            if isinstance(result, ErrorResponse):
                _raise_if_cancelled()
                error = result.error
                self._fail(generation, error.code, error.message, param=error.param)
            elif generation.call.stream:
                await self._relay(result, generation)
            else:
                generation.finish_reason = result.choices[0].finish_reason
                generation.write(result.model_dump_json())
        except EngineDead:
            raise
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            param, message = validation_error(first["loc"], first["msg"])
            self._fail(generation, 400, message, param=param)
        except Exception as error:  # noqa: BLE001 - the boundary of one request
            self._fail_with(generation, error)
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await generation.wait_closed()
        generation.complete_step([])

    async def _relay(self, stream: Any, generation: Generation) -> None:
        try:
            async for text in stream:
                error = stream_error(text)
                if error is None:
                    generation.write(text)
                elif generation.engine_errors:
                    self._fail_with(generation, generation.engine_errors[0])
                    return
                else:
                    self._fail(generation, *error)
                    return
        finally:
            await stream.aclose()

    def _fail_with(self, generation: Generation, error: BaseException) -> None:
        if isinstance(error, EngineDeadError) or self._engine.errored:
            raise EngineDead("vLLM's engine died; its log has the cause") from error
        info = create_error_response(error).error
        # The first argument, because str() of vLLM's errors appends the rejected value.
        message = str(error.args[0]) if info.code < 500 and error.args else info.message
        message = sanitize_message(message)
        self._fail(generation, info.code, message, param=info.param)

    def _fail(
        self, generation: Generation, status: int, message: str, param: str | None = None
    ) -> None:
        if self._engine.errored:
            raise EngineDead("vLLM's engine died; its log has the cause")
        if generation.has_output or not (400 <= status < 500 or status == 503):
            raise GenerationFailed(message)
        if generation.refusal is None:
            generation.refusal = refusal(generation.call.endpoint, status, message, param)


def _raise_if_cancelled() -> None:
    """Raise the cancellation that vLLM's OpenAI layer swallows when it does not stream."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _is_not_known(record: logging.LogRecord) -> bool:
    """Drop the stack traces vLLM logs for each stream it refuses, or that its engine's death cuts.

    The refusal reaches the client, and the death has one trace of its own.
    """
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, VLLMClientError | EngineDeadError)


def _name_answers(vllm_models: Any, engine: MeteredAsyncLLM, served_name: str) -> None:
    """Have answers carry the client's name of the model; vLLM's is the name it was started with.

    vLLM asks once per request, in the task that serves it.
    """

    def model_name(_lora_request: Any = None) -> str:
        generation = engine.generation.get()
        return generation.model if generation is not None else served_name

    vllm_models.model_name = model_name


def _raw_request(call: GenerateCall) -> Any:
    """Return what vLLM reads of an HTTP request: our id, and no header of the client's."""

    async def is_disconnected() -> bool:
        return False

    return SimpleNamespace(
        headers=Headers({"x-request-id": call.request_id}),
        state=State(),
        is_disconnected=is_disconnected,
    )
