"""The engine seam: what the router may ask of an engine, whatever serves the tokens.

An engine takes a request as an OpenAI JSON body and yields *frames*: bytes ready for
the client (SSE events, or the whole JSON body when the client does not stream) beside
the token ids they stand for. The router relays the bytes and never re-serialises a
token; continuation after a fault and exact accounting work on the token ids.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import msgspec

from serve_app.core.cost_meter import EngineCosts
from serve_app.core.progress import Progress
from serve_app.core.types import Outcome, PriorityClass, ReplicaId, ReplicaView, RequestId, Usage
from serve_app.engine.address import Address, ReplyTo
from serve_app.usage import Charge

STREAM_END = b"data: [DONE]\n\n"
# A refusal's code where a generation cannot be gone on with.
RESUME_UNSUPPORTED = "resume_unsupported"


class Endpoint(StrEnum):
    """OpenAI endpoints an engine can serve."""

    CHAT = "chat"
    COMPLETIONS = "completions"


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """Everything an engine needs for one request. Built by the router only.

    ``body`` is the client's JSON object re-encoded by the edge: validated, engine-only
    fields removed. Its ``model`` is the client's name, which every answer repeats; the
    engine serves what it serves. ``max_tokens`` caps the body's own value.
    ``paid_tokens`` caps it too, for now: ``Engine.extend`` raises that while the call runs.
    ``cache_salt`` isolates prefix caches between tenants.
    ``target`` names the replica the core chose; ``fallbacks`` the next ones, in order.
    ``resume_token_ids`` are tokens already delivered by another replica, to continue
    from: they count as output, their text is not yielded again, and the account is of
    what this engine does. ``resume_created_s`` is the ``created`` that the other's answer
    bears. An engine that cannot do so answers with a Refusal (RESUME_UNSUPPORTED).
    ``reply`` is where frames go that do not come back through the call itself.
    ``charge`` says who pays, for the engine's own record of this ``attempt``, counted from 1.
    """

    request_id: RequestId
    endpoint: Endpoint
    body: bytes
    stream: bool
    tenant: str
    cache_salt: str
    priority_class: PriorityClass
    target: ReplicaId | None = None
    fallbacks: tuple[ReplicaId, ...] = ()
    max_tokens: int | None = None
    paid_tokens: int | None = None
    resume_token_ids: tuple[int, ...] = ()
    resume_created_s: int | None = None
    reply: ReplyTo | None = None
    charge: Charge | None = None
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class WatchCall:
    """A router's subscription to the load of one replica, ``target``.

    ``router`` is where the load goes that does not come back through the call itself.
    """

    target: ReplicaId
    fallbacks: tuple[ReplicaId, ...] = ()
    router: Address | None = None


class Frame(msgspec.Struct, frozen=True, gc=False):
    """Bytes for the client and the output token ids they stand for.

    ``sequence`` counts from 0 within the request without gaps. ``data`` is one or more
    whole SSE events (``data: ...\\n\\n``), ending with STREAM_END in the last frame of a
    stream; or the complete JSON body when the call does not stream.
    """

    sequence: int
    data: bytes
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineTimings:
    """Where an engine spent a request's time, in seconds; None if it never got there."""

    queued_s: float | None = None
    first_token_s: float | None = None
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Final:
    """The last item of every successful generation: the engine's own account of it.

    ``frames`` is how many frames were yielded, so that a receiver can tell a complete
    stream from a cut one. ``finish_reason`` is OpenAI's, of the first choice.
    """

    usage: Usage
    timings: EngineTimings
    frames: int
    finish_reason: str | None = None
    replica: ReplicaId | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """The engine's serving layer turned the request down; the only item then yielded.

    A value and not an exception: it is the client's error, not the engine's.
    ``status`` is 4xx, or 503 when the engine itself is saturated.
    """

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None


GenerateItem = Frame | Final | Refusal


class EngineDead(RuntimeError):
    """The engine can no longer generate; its replica must be replaced."""


class GenerationFailed(EngineDead):
    """The engine failed at this one generation, which another would do as well, and lives."""


class EngineBusy(EngineDead):
    """The replica took no more just now: for this request as good as dead, and healthy."""


class ReaderTooSlow(RuntimeError):
    """A client reads slower than its stream is generated, and its buffer is full."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine turned out to be once started.

    ``max_model_len`` is context plus output, in tokens. ``kv_tokens_capacity`` is how
    many tokens the KV cache holds, ``slots`` how many requests run at once.
    """

    model: str
    revision: str
    max_model_len: int
    kv_tokens_capacity: int
    slots: int
    start_s: float
    stages_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Metered:
    """What the engine generated for one request, recorded at its end however it ended."""

    request_id: RequestId
    tenant: str
    usage: Usage
    outcome: Outcome
    timings: EngineTimings
    charge: Charge | None = None
    attempt: int = 1


class Engine(Protocol):
    """One model on one replica. All methods run on the replica's event loop."""

    async def start(self) -> EngineInfo:
        """Load the model and generate once; return when requests can be served.

        Raises:
            ValueError: the settings are wrong; the message names the field and the fix.
            EngineDead: the engine came up and died.
        """

    def generate(self, call: GenerateCall) -> AsyncGenerator[GenerateItem, None]:
        """Yield frames and then one Final, or a single Refusal.

        Closing or cancelling the generator aborts the generation at the engine's next
        step; what was generated is still metered.

        Raises:
            EngineDead: the engine died or drains; frames yielded so far were real.
        """

    async def abort(self, request_id: RequestId) -> None:
        """Stop a generation at the next step; unknown ids are ignored."""

    def extend(self, request_id: RequestId, paid_tokens: int) -> None:
        """Let each choice of a generation that runs go on up to ``paid_tokens``.

        It never goes beyond what it was told, however late that comes. Ids that are unknown
        and generations that have ended are ignored; an engine that cannot do it ends at the
        call's own ``paid_tokens``.
        """

    def snapshot(self) -> ReplicaView:
        """The load right now. ``sequence`` grows by one with each snapshot."""

    def on_metered(self, listener: Callable[[Metered], None]) -> None:
        """Call ``listener`` once for every request that ends, cancelled ones included."""

    def costs(self) -> EngineCosts | None:
        """Where this replica's time went so far; None if the engine does not measure it."""

    def progress(self) -> Progress:
        """How many steps the engine has made, and whether it has requests."""

    async def check_health(self) -> None:
        """Return if the engine's processes live; ``progress`` tells whether they generate.

        Raises:
            EngineDead: they do not.
        """

    async def drain(self, deadline_s: float) -> int:
        """Take nothing new; return when what runs has ended, at the latest after ``deadline_s``.

        What is new, and what still runs then, ends with EngineDead, so that another replica
        takes it; what was generated is metered as failed. Returns how many were cut so. A
        drain cannot be taken back, but a second one with an earlier deadline counts.
        """

    async def stop(self) -> None:
        """Abort what runs and free everything. Idempotent."""
