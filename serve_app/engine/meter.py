"""What an engine generated for one request, counted where the engine hands it over.

The count does not depend on whether a client read the tokens: it is settled once, when
the request ends, however it ends. No engine is imported here; the shell of an engine
reports to a ``RequestMeter`` what it saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from serve_app.core.attribution import Account
from serve_app.core.types import Outcome, Usage
from serve_app.engine.api import EngineTimings, GenerateCall, Metered


@dataclass(frozen=True, slots=True)
class ChoiceStep:
    """Output of one choice in one step.

    ``token_ids`` are the new ones, or all so far when the prompt's meter is cumulative.
    """

    index: int
    token_ids: Sequence[int]
    finish_reason: str | None = None


@dataclass(slots=True)
class PromptMeter:
    """Counts one prompt of a request and the choices generated from it.

    ``cumulative`` says that every step repeats the tokens of the steps before it, as an
    engine does that reports a request once, at its end.
    """

    cumulative: bool
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    finish_reasons: dict[int, str] = field(default_factory=dict)
    _generated: dict[int, int] = field(default_factory=dict)
    _seen: bool = False

    def observe(
        self, steps: Iterable[ChoiceStep], *, prompt_tokens: int, cached_prompt_tokens: int
    ) -> list[int]:
        """Count one step and return the token ids that are new, in the order of ``steps``.

        Of several choices the first to start pays for the prompt and the others find it
        in the prefix cache, so the lowest cached count is the prompt's.
        """
        self.prompt_tokens = prompt_tokens
        if not self._seen or cached_prompt_tokens < self.cached_prompt_tokens:
            self.cached_prompt_tokens = cached_prompt_tokens
        self._seen = True
        new: list[int] = []
        for step in steps:
            counted = self._generated.get(step.index, 0)
            fresh = step.token_ids[counted:] if self.cumulative else step.token_ids
            self._generated[step.index] = counted + len(fresh)
            new.extend(fresh)
            if step.finish_reason is not None:
                self.finish_reasons[step.index] = step.finish_reason
        return new

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, over all choices."""
        return sum(self._generated.values())


class RequestMeter:
    """Counts one request, whatever number of prompts and choices it has.

    A prompt's own tokens count from its first output token on: engines do not say how
    much of a prompt they processed before that. Times are the caller's clock. ``account``
    is the request's engine time, from an engine that measures it; what comes after the
    request was settled is not in its usage.
    """

    def __init__(
        self, call: GenerateCall, started_s: float, account: Account | None = None
    ) -> None:
        self.account = account
        self._call = call
        self._started_s = started_s
        self._prompts: list[PromptMeter] = []
        self._queued_s: float | None = None
        self._first_token_s: float | None = None
        self._settled = False
        self._measured: tuple[float, int] | None = None  # when it was settled

    def open_prompt(self, *, cumulative: bool) -> PromptMeter:
        """Return the meter of the next prompt, in the request's order."""
        prompt = PromptMeter(cumulative)
        self._prompts.append(prompt)
        return prompt

    def observe_times(self, *, queued_s: float | None, first_token_s: float | None) -> None:
        """Keep the first times the engine reports: seconds since it received the request."""
        if self._queued_s is None:
            self._queued_s = queued_s
        if self._first_token_s is None:
            self._first_token_s = first_token_s

    @property
    def usage(self) -> Usage:
        """Return the tokens counted so far; a prompt counts once however many choices it has."""
        engine_s, kv_block_us = self._account_reads()
        return Usage(
            prompt_tokens=sum(p.prompt_tokens for p in self._prompts),
            cached_prompt_tokens=sum(p.cached_prompt_tokens for p in self._prompts),
            completion_tokens=sum(p.completion_tokens for p in self._prompts),
            engine_s=engine_s,
            kv_block_us=kv_block_us,
        )

    @property
    def finish_reason(self) -> str | None:
        """Return the engine's reason for the end of the first choice of the first prompt."""
        return self._prompts[0].finish_reasons.get(0) if self._prompts else None

    def timings(self, now_s: float) -> EngineTimings:
        """Return where the time went up to ``now_s``."""
        return EngineTimings(
            queued_s=self._queued_s,
            first_token_s=self._first_token_s,
            total_s=now_s - self._started_s,
        )

    def settle(
        self, outcome: Outcome, now_s: float, listeners: Sequence[Callable[[Metered], None]]
    ) -> None:
        """Tell every listener what was generated; the second call does nothing."""
        if self._settled:
            return
        self._settled = True
        self._measured = self._account_reads()
        metered = Metered(
            request_id=self._call.request_id,
            tenant=self._call.tenant,
            usage=self.usage,
            outcome=outcome,
            timings=self.timings(now_s),
            charge=self._call.charge,
            attempt=self._call.attempt,
        )
        for listener in listeners:
            listener(metered)

    def _account_reads(self) -> tuple[float, int]:
        """Return engine seconds and KV block-microseconds: what they were if it is settled."""
        if self._measured is not None:
            return self._measured
        account = self.account
        return (0.0, 0) if account is None else (account.engine_s, account.kv_block_us)
