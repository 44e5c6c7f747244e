"""Which request fields reach the engine: the one table of the edge.

Three treatments, and everything else passes through unchanged:

- *dropped*: the field steers the engine or the fleet, or is consumed by the gateway.
  It changes nothing, so that a client library which always sends it still works.
- *refused*: the field asks for a different answer than the one we would give. Ignoring
  it silently would be a wrong answer, so it is a 400 that says what to do instead.
- *passed*: sampling and formatting fields which the engine's own layer validates. The
  list exists so that a new engine version with a new field fails a test until somebody
  has decided about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

DROPPED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "priority": "the scheduler's order is set from the key's class",
        "cache_salt": "set per tenant, so that prefix caches stay apart",
        "kv_transfer_params": "belongs to prefill/decode transfer between engines",
        "ec_transfer_params": "belongs to encoder-cache transfer between engines",
        "request_id": "the server names requests",
        "session_id": "an affinity hint for the router, not for the engine",
        "data_parallel_rank": "placement is the router's",
        "vllm_xargs": "reaches engine extensions unchecked",
        "mm_processor_kwargs": "reaches the media processor unchecked",
        "media_io_kwargs": "reaches the media loader unchecked",
        "routed_experts_prompt_start": "engine debugging",
        "stream_interval": "how tokens are batched into frames is the server's",
        "mm_payload": "of the engine's render routes only",
        "return_mm_kwargs": "of the engine's render routes only",
        "return_token_offsets": "of the engine's render routes only",
        "watermarking": "set by the server's policy",
        "user": "attribution ends at the gateway",
        "safety_identifier": "attribution ends at the gateway",
        "metadata": "cost tags end at the gateway",
        "prompt_cache_key": "an affinity hint for the router",
        "service_tier": "decided by admission and echoed by the gateway",
        "store": "nothing is stored",
    }
)

REFUSED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "chat_template": "a template is code that runs in the server; the model's own is used. "
        "Use `chat_template_kwargs` to set its variables",
        "prompt_embeds": "embeddings are not accepted as a prompt; send text or token ids",
        "use_beam_search": "beam search is not served; use `n` with `temperature`",
        "best_of": "`best_of` is not served; use `n`",
        "functions": "`functions` is deprecated and not served; use `tools`",
        "function_call": "`function_call` is deprecated and not served; use `tool_choice`",
    }
)

# Values with which a refused field asks for nothing, so that clients may send defaults.
HARMLESS: Final[tuple[object, ...]] = (None, False)

PASSED: Final[frozenset[str]] = frozenset(
    {
        "add_generation_prompt",
        "add_special_tokens",
        "allowed_token_ids",
        "bad_words",
        "continue_final_message",
        "documents",
        "echo",
        "ignore_eos",
        "include_reasoning",
        "include_stop_str_in_output",
        "length_penalty",
        "logprob_token_ids",
        "parallel_tool_calls",
        "reasoning_effort",
        "repetition_detection",
        "return_prompt_text",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop_token_ids",
        "structured_outputs",
        "suffix",
        "thinking_token_budget",
        "truncate_prompt_tokens",
        "truncation_side",
    }
)

# Text that a message may carry, by part type: where the text stands.
TEXT_PARTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "text": "text",
        "input_text": "text",
        "output_text": "text",
        "refusal": "refusal",
        "thinking": "thinking",
    }
)

# Media that a message may carry inline. Engines fetch other URLs from inside the
# cluster's network, so only `data:` URLs pass.
MEDIA_URL_PARTS: Final[frozenset[str]] = frozenset({"image_url", "audio_url", "video_url"})

# Engines read these keys whatever the part's type says. `uuid` names an entry of a media
# cache that tenants share; embeddings are deserialised tensors.
FORBIDDEN_PART_KEYS: Final[frozenset[str]] = frozenset(
    {"uuid", "image_pil", "image_embeds", "audio_embeds", "video_embeds", "prompt_embeds"}
)
