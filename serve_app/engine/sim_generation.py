"""One request inside the simulated engine: its choices, and the consumer waiting for them."""

from __future__ import annotations

import asyncio

from serve_app.config import SimSettings
from serve_app.core.attribution import Account
from serve_app.core.engine_model import EngineModel, Phase, Sequence
from serve_app.core.types import Usage
from serve_app.engine.api import STREAM_END, GenerateCall
from serve_app.engine.sim_text import Answer, Job, prefix_hashes
from serve_app.engine.sim_wire import Choice, ChoiceEvents, Header, usage_event, whole_body


class _Stream:
    """One choice of one generation: its place in the model and what was delivered."""

    __slots__ = ("answer", "capped", "delivered", "ended", "events", "index", "sequence", "skipped")

    def __init__(self, index: int, answer: Answer, events: ChoiceEvents | None, skipped: int):
        self.index = index
        self.answer = answer
        self.events = events
        self.skipped = skipped
        self.delivered = skipped
        self.ended = False
        self.capped = False
        self.sequence: Sequence


class Generation:
    """One request in the engine: its choices, and the consumer that waits for tokens.

    ``lost`` is set where the engine gives it up; whoever reads it is woken and told.
    """

    __slots__ = (
        "_header",
        "_job",
        "_model",
        "_open",
        "_paid_tokens",
        "_submitted_s",
        "_waiter",
        "aborted",
        "account",
        "began_s",
        "call",
        "lost",
        "streams",
    )

    def __init__(
        self,
        call: GenerateCall,
        job: Job,
        header: Header,
        model: EngineModel,
        began_s: float,
        account: Account | None = None,
    ) -> None:
        self.call = call
        self.account = account
        self.began_s = began_s
        self.aborted = False
        self.lost = False
        self.streams: list[_Stream] = []
        self._job = job
        self._header = header
        self._model = model
        self._submitted_s = 0.0
        self._open = 0
        self._paid_tokens = call.paid_tokens
        self._waiter: asyncio.Future[None] | None = None

    def submit(self, now_s: float, settings: SimSettings) -> None:
        """Put every choice into the model."""
        call, job = self.call, self._job
        self._submitted_s = now_s
        resumed = len(call.resume_token_ids)
        for number, prompt in enumerate(job.prompts):
            for choice in range(job.choices_per_prompt):
                answer = job.answer(number, choice)
                index = len(self.streams)
                events = None
                if call.stream:
                    events = ChoiceEvents(self._header, index, job.include_usage)
                    if resumed:
                        events.role = b""
                stream = _Stream(index, answer, events, resumed)
                text = prompt.rendered
                if not settings.zero_latency:
                    # The answer's blocks are cached too: the next turn begins with them.
                    text += answer.text(0, answer.tokens)
                stream.sequence = self._model.add(
                    self.account,
                    now_s,
                    prompt_tokens=prompt.tokens + resumed,
                    output_tokens=answer.tokens - resumed,
                    priority=call.priority_class,
                    hashes=prefix_hashes(text, settings.block_tokens, call.cache_salt),
                )
                self.streams.append(stream)
                self._open += 1

    def extend(self, paid_tokens: int) -> None:
        """Go on up to ``paid_tokens``; what has ended has ended."""
        if self._paid_tokens is not None:
            self._paid_tokens = max(self._paid_tokens, paid_tokens)

    def cut(self, now_s: float) -> None:
        """End the choices that have all that was paid for."""
        if self._paid_tokens is None:
            return
        for stream in self.streams:
            if stream.sequence.phase is not Phase.ENDED and self._made(stream) >= self._paid_tokens:
                stream.capped = True
                self._model.abort(stream.sequence, now_s)

    def render(self) -> tuple[bytes, tuple[int, ...]]:
        """Return the bytes and token ids that are new since the last call."""
        parts: list[bytes] = []
        token_ids: tuple[int, ...] = ()
        for stream in self.streams:
            if stream.ended:
                continue
            made = self._made(stream)
            first = stream.delivered
            if made > first:
                token_ids += stream.answer.token_ids(first, made)
                if stream.events is not None:
                    if first == stream.skipped:
                        parts.append(stream.events.role)
                    parts.append(stream.events.text(stream.answer.text(first, made)))
                stream.delivered = made
            if stream.sequence.phase is Phase.ENDED:
                stream.ended = True
                self._open -= 1
                if stream.events is not None:
                    parts.append(stream.events.finish(self._reason(stream)))
        if self.complete():
            parts.append(self._ending())
        if not self.call.stream:
            token_ids = self._all_token_ids() if parts else ()
        return b"".join(parts), token_ids

    def complete(self) -> bool:
        """Whether every choice has ended and was rendered."""
        return not self._open

    def finish_reason(self) -> str:
        """Return OpenAI's finish reason of the first choice, or ``abort``."""
        return self._reason(self.streams[0])

    def usage(self) -> Usage:
        """Return what this engine processed and generated for the request so far.

        A prompt counts from its first output token on, as it does with a real engine.
        """
        choices = self._job.choices_per_prompt
        prompt_tokens = cached_tokens = completion_tokens = 0
        for number, prompt in enumerate(self._job.prompts):
            streams = self.streams[number * choices :][:choices]
            made = sum(self._made(stream) - stream.skipped for stream in streams)
            if made:
                completion_tokens += made
                prompt_tokens += prompt.tokens
                # The first choice pays for the prompt, the others find it in the cache.
                cached_tokens += min(streams[0].sequence.cached_tokens, prompt.tokens)
        counted = (prompt_tokens, cached_tokens, completion_tokens)
        if self.account is None:
            return Usage(*counted)
        return Usage(*counted, self.account.engine_s, self.account.kv_block_us)

    def virtual_timings_s(self) -> tuple[float | None, float | None]:
        """Return waits until admission and first token of choice 0, in the model's time."""
        sequence = self.streams[0].sequence
        queued_s = first_token_s = None
        if sequence.started_s is not None:
            queued_s = max(0.0, sequence.started_s - self._submitted_s)
        if sequence.first_token_s is not None:
            first_token_s = max(0.0, sequence.first_token_s - self._submitted_s)
        return queued_s, first_token_s

    def abort(self, now_s: float) -> None:
        """Take what has not ended out of the model."""
        for stream in self.streams:
            if stream.sequence.phase is not Phase.ENDED:
                self.aborted = True
                self._model.abort(stream.sequence, now_s)
        self.wake()

    async def progress(self) -> None:
        """Return when there is something to render; at once if it happened meanwhile."""
        if self._has_news():
            return
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        """Let the consumer look."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def wake_if_progressed(self) -> None:
        """Let the consumer look if it waits and there is something to render."""
        if self._waiter is not None and self._has_news():
            self.wake()

    def _has_news(self) -> bool:
        """Whether a choice ended, or has tokens to stream, that were not rendered."""
        for stream in self.streams:
            if stream.sequence.phase is Phase.ENDED:
                if not stream.ended:
                    return True
            elif stream.events is not None:
                if self._made(stream) > stream.delivered:
                    return True
            elif self._paid_tokens is not None and self._made(stream) >= self._paid_tokens:
                return True
        return False

    def _made(self, stream: _Stream) -> int:
        """Return how many tokens a choice has: none that was not paid for.

        The model may have gone on a step before anybody looked.
        """
        made = stream.skipped + self._model.generated(stream.sequence)
        return made if self._paid_tokens is None else min(made, self._paid_tokens)

    def _reason(self, stream: _Stream) -> str:
        if stream.delivered >= stream.answer.tokens:
            return stream.answer.finish_reason
        return "length" if stream.capped else "abort"

    def _client_usage(self) -> Usage:
        """What the client sees counts the tokens another replica delivered too."""
        usage = self.usage()
        return Usage(
            usage.prompt_tokens,
            usage.cached_prompt_tokens,
            usage.completion_tokens + sum(stream.skipped for stream in self.streams),
        )

    def _all_token_ids(self) -> tuple[int, ...]:
        token_ids: tuple[int, ...] = ()
        for stream in self.streams:
            token_ids += stream.answer.token_ids(stream.skipped, stream.delivered)
        return token_ids

    def _ending(self) -> bytes:
        if self.call.stream:
            usage = b""
            if self._job.include_usage:
                usage = usage_event(self._header, self._client_usage())
            return usage + STREAM_END
        choices = [
            Choice(
                stream.index,
                stream.answer.text(0, stream.delivered).decode(),
                self._reason(stream),
            )
            for stream in self.streams
        ]
        return whole_body(self._header, choices, self._client_usage())
