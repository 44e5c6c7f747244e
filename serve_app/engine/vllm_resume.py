"""A generation that another replica began, gone on with inside vLLM. No vLLM is imported.

    delivered token ids -> the request's own detokeniser -> replayed outputs -> vLLM's OpenAI layer
                       \\-> the engine core: the end of the prompt, its output limits lowered

The OpenAI layer reads the replayed outputs, one token each as it came, before the engine's
own; what it writes of them was sent and is dropped. So half a character, a held back stop
string, a reasoning block, a tool call and the usage go on as if they had never been cut.
What vLLM keeps in its engine process per output token cannot be brought back: see
``sampling_problem``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from serve_app.engine.api import GenerateCall


def resume_problem(call: GenerateCall) -> str | None:
    """Return why a call cannot go on after the tokens it comes with, as far as its body tells."""
    if not call.resume_token_ids:
        return None
    if not call.stream:
        return "only a stream can be continued"
    body = orjson.loads(call.body)
    prompt = body.get("prompt") if isinstance(body, dict) else None
    if isinstance(prompt, list) and not all(isinstance(each, int) for each in prompt):
        return "only a request with one prompt can be continued"
    return None


def sampling_problem(params: Any, resumed_tokens: int) -> str | None:
    """Return why vLLM cannot go on with what these sampling parameters ask for, or None.

    A seed is no problem but no promise either: the random numbers begin anew.
    """
    kept = {
        "n": params.n > 1,
        "logprobs": params.logprobs is not None or params.prompt_logprobs is not None,
        "structured output": params.structured_outputs is not None,
        "frequency_penalty": params.frequency_penalty != 0,
        "presence_penalty": params.presence_penalty != 0,
        "bad_words": bool(params.bad_words),
        "thinking_token_budget": params.thinking_token_budget is not None,
        "repetition_detection": params.repetition_detection is not None,
    }
    for name, asked in kept.items():
        if asked:
            return f"a generation with {name} cannot be continued"
    if params.max_tokens is not None and params.max_tokens <= resumed_tokens:
        return "the answer to go on with has all its tokens already"
    return None


def replay(
    register: Callable[[], None],
    states: Mapping[str, Any],
    request: Any,
    token_ids: tuple[int, ...],
) -> list[Any]:
    """Register a request as begun elsewhere; return the outputs that it has had already.

    ``register`` makes vLLM's state of ``request`` in ``states``, its detokeniser on the
    client's prompt; then the request is made one that asks for what is missing.
    """
    register()
    state = states[request.request_id]
    outputs = []
    for token_id in token_ids:
        state.detokenizer.update([token_id], False)
        output = state.make_request_output([token_id], None, None, None)
        if output is not None:
            outputs.append(output)
    request.prompt_token_ids = [*request.prompt_token_ids, *token_ids]
    state.prompt_len = len(request.prompt_token_ids)
    params = request.sampling_params
    params.max_tokens -= len(token_ids)
    params.min_tokens = max(0, params.min_tokens - len(token_ids))
    return outputs
