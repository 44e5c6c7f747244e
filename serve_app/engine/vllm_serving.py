"""vLLM's own OpenAI layer, called in process: requests in, SSE text out.

Chat templates, tools, structured output and logprobs are vLLM's; this module hands it
the request that the router admitted, and words its refusals as OpenAI does. Importing
it imports vLLM (seconds): only a replica's engine does so.
"""

from __future__ import annotations

import logging
import re
from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import orjson
from pydantic import ValidationError
from starlette.datastructures import Headers, State
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMClientError
from vllm.v1.engine.exceptions import EngineDeadError

from serve_app.engine.api import Endpoint, EngineDead, GenerateCall, Refusal
from serve_app.engine.vllm_core import MeteredAsyncLLM
from serve_app.engine.vllm_generation import Generation, GenerationFailed, stream_error

# Fields of vLLM's request models that steer the engine and not the answer, or read what
# is not the caller's. The edge removes them too.
ENGINE_ONLY_FIELDS = frozenset(
    {
        "cache_salt",
        "chat_template",
        "ec_transfer_params",
        "kv_transfer_params",
        "media_io_kwargs",
        "mm_payload",
        "mm_processor_kwargs",
        "priority",
        "prompt_embeds",
        "request_id",
        "return_mm_kwargs",
        "routed_experts_prompt_start",
        "session_id",
        "stream_interval",
        "use_beam_search",
        "vllm_xargs",
        "watermarking",
    }
)
# What vLLM calls the prompt in its errors, whatever the client's field is called.
_PROMPT_PARAMS = frozenset({"input_text", "input_tokens"})
_PROMPT_FIELD = {Endpoint.CHAT: "messages", Endpoint.COMPLETIONS: "prompt"}
_CONTEXT_OVERFLOW = re.compile(r"maximum context length|cannot be greater than max_model_len")
_DEFAULT_COMPLETION_TOKENS = 16
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
            logging.getLogger(name).addFilter(_is_not_the_clients_fault)
        state = State()
        await init_app_state(engine, state, arguments, await engine.get_supported_tasks())
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
            request = self._request(handler, generation.call)
            result = await handler.create(request, _raw_request(generation.call))
            if isinstance(result, ErrorResponse):
                error = result.error
                self._fail(generation, error.code, error.message, param=error.param)
            elif generation.call.stream:
                await self._relay(result, generation)
            else:
                generation.finish_reason = result.choices[0].finish_reason
                generation.write(result.model_dump_json())
        except (EngineDead, GenerationFailed):
            raise
        except ValidationError as error:
            param, message = _validation_error(error)
            self._fail(generation, 400, message, param=param)
        except Exception as error:  # noqa: BLE001 - the boundary of one request
            self._fail_with(generation, error)
        generation.complete_step([])

    def _request(self, handler: _Handler, call: GenerateCall) -> Any:
        body = orjson.loads(call.body)
        if not isinstance(body, dict):
            raise ValueError("the request body must be a JSON object")
        for name in ENGINE_ONLY_FIELDS.intersection(body):
            del body[name]
        body["model"] = self._served_name
        body["stream"] = call.stream
        body["priority"] = int(call.priority_class)
        if call.cache_salt:
            body["cache_salt"] = call.cache_salt
        if call.max_tokens is not None:
            _cap_output(body, call.endpoint, call.max_tokens)
        return handler.request_type.model_validate(body)

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
        self._fail(generation, info.code, message, param=info.param)

    def _fail(
        self, generation: Generation, status: int, message: str, param: str | None = None
    ) -> None:
        if self._engine.errored:
            raise EngineDead("vLLM's engine died; its log has the cause")
        if generation.has_output or not (400 <= status < 500 or status == 503):
            raise GenerationFailed(message)
        if param in _PROMPT_PARAMS:
            param = _PROMPT_FIELD[generation.call.endpoint]
        generation.refusal = _refusal(status, message, param)


def _refusal(status: int, message: str, param: str | None) -> Refusal:
    if status == 503:
        return Refusal(status, message, type="server_error", code="engine_overloaded")
    if _CONTEXT_OVERFLOW.search(message):
        return Refusal(status, message, param=param, code="context_length_exceeded")
    return Refusal(status, message, param=param)


def _is_not_the_clients_fault(record: logging.LogRecord) -> bool:
    """Drop the stack traces that vLLM logs when it refuses a request while streaming."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, VLLMClientError)


def _raw_request(call: GenerateCall) -> Any:
    """Return what vLLM reads of an HTTP request: our id, and no header of the client's."""

    async def is_disconnected() -> bool:
        return False

    return SimpleNamespace(
        headers=Headers({"x-request-id": call.request_id}),
        state=State(),
        is_disconnected=is_disconnected,
    )


def _cap_output(body: dict[str, Any], endpoint: Endpoint, cap_tokens: int) -> None:
    """Lower the body's output limit to ``cap_tokens`` per choice; a wrong type stays wrong."""
    name = "max_tokens"
    if endpoint is Endpoint.CHAT and body.get("max_completion_tokens") is not None:
        name = "max_completion_tokens"
    wanted = body.get(name)
    if wanted is None:
        wanted = cap_tokens if endpoint is Endpoint.CHAT else _DEFAULT_COMPLETION_TOKENS
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        body[name] = min(wanted, cap_tokens)


def _validation_error(error: ValidationError) -> tuple[str | None, str]:
    """Return the field a request model refused, in OpenAI's spelling, and why."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ""
    for part in first["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part.isidentifier() and part.islower():
            param += f".{part}" if param else part
        else:
            # The name of a union's member: below it the path differs per member.
            break
    message = first["msg"].removeprefix("Value error, ")
    return (param, f"{param}: {message}") if param else (None, message)
