"""A stream whose replica was lost, going on elsewhere: what its client has, and whether it may.

The headers are out by then, so it is said where it happens, in a comment of the stream that
every reader of server-sent events skips:

    : continued elsewhere after 57 tokens; sampling: greedy
"""

from __future__ import annotations

import re
from array import array
from dataclasses import replace
from enum import StrEnum

from serve_app.core.types import RejectReason
from serve_app.engine.api import Frame, GenerateCall
from serve_app.gateway.wire import Sampling

# The first member of that name: before it comes nothing that a model or a client wrote.
_CREATED = re.compile(rb'"created":\s*(\d+)')


class NotContinued(StrEnum):
    """Why a stream that was cut did not go on."""

    OFF = "off"
    LIMIT = "limit"
    SEVERAL_CHOICES = "several_choices"
    SAMPLED = "sampled"
    NO_TOKENS = "no_tokens"
    ENDED = "ended"
    REFUSED = "refused"
    NO_REPLICA = "no_replica"
    FAILED = "failed"


class Continuation:
    """What one stream needs to go on. It keeps four bytes per token delivered."""

    def __init__(
        self, *, most: int, sampled_too: bool, sampling: Sampling, choices: int = 1
    ) -> None:
        """``most`` times it goes on; if it was sampled at random only with ``sampled_too``."""
        self._most = most
        self._sampled_too = sampled_too
        self._sampling = sampling
        self._choices = choices
        self._token_ids = array("I")
        self._created_s: int | None = None
        self._begun = 0
        self._unsaid = False
        self._ended = False

    @property
    def token_count(self) -> int:
        """Tokens that the client has."""
        return len(self._token_ids)

    def deliver(self, frame: Frame) -> bytes:
        """Take note of a frame that goes out now; return what goes before it."""
        if self._choices == 1 and self._most:
            self._token_ids.extend(frame.token_ids)
            if self._created_s is None:
                found = _CREATED.search(frame.data)
                self._created_s = int(found[1]) if found else None
        if not self._unsaid:
            return b""
        self._unsaid = False
        tokens = len(self._token_ids) - len(frame.token_ids)
        said = f": continued elsewhere after {tokens} tokens; sampling: {self._sampling}\n\n"
        return said.encode()

    def hold_end(self) -> None:
        """Take note that all but the end of the stream is out: nothing is left to go on with."""
        self._ended = True

    def bar(self) -> NotContinued | None:
        """Return why the stream cannot go on elsewhere, None if it can."""
        if not self._most:
            return NotContinued.OFF
        if self._choices > 1:
            return NotContinued.SEVERAL_CHOICES
        if self._sampling == "random" and not self._sampled_too:
            return NotContinued.SAMPLED
        if self._ended:
            return NotContinued.ENDED
        if not self._token_ids:
            return NotContinued.NO_TOKENS
        return NotContinued.LIMIT if self._begun >= self._most else None

    def passed_over(self) -> None:
        """The replica took no more. If ``resume`` was for it, the stream did not go on there."""
        self._begun -= self._unsaid

    def resume(self, call: GenerateCall) -> GenerateCall:
        """Return ``call`` as one that goes on after what the client has."""
        self._begun += 1
        self._unsaid = True
        return replace(
            call, resume_token_ids=tuple(self._token_ids), resume_created_s=self._created_s
        )


def refused_by_core(reason: RejectReason) -> NotContinued:
    """Return why a stream does not go on for which the core found no place."""
    return NotContinued.NO_REPLICA if reason is RejectReason.NO_REPLICA else NotContinued.REFUSED
