"""What each step of vLLM's engine contained, written down in the engine's own process.

The scheduler says what it scheduled and when a step's output is back (``vllm_scheduler.py``).
Steps may overlap: with asynchronous scheduling the next is composed while one computes. So
a step's time runs from the end of the step before it to its own end; the engine's turn
between two steps belongs to the second, unless it is longer than ``TURN_MAX_S``: then
nobody computed, and the time is left to nobody.

A step that decodes for the same sequences as the one before it costs a comparison of two
dicts and is counted, not written. Records are sent when a request has left, before the
engine's output about it is, or when they are ``SEND_PERIOD_S`` old.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from serve_app.engine.step_records import (
    Joined,
    Left,
    Lost,
    Occupied,
    Record,
    Stepped,
    Stopped,
    Vacant,
)

SEND_PERIOD_S = 0.02
TURN_MAX_S = 0.05
UNSENT_RECORDS_MAX = 4096


class ScheduledRequest(Protocol):
    """What is asked of vLLM's own requests, after they were scheduled."""

    @property
    def num_computed_tokens(self) -> int: ...
    @property
    def num_prompt_tokens(self) -> int: ...


class Sender(Protocol):
    """Where records go; see ``StepSender``."""

    def send(self, records: list[Record]) -> int: ...


@dataclass(slots=True)
class _Step:
    """A step under way; ``decodes`` None: those of the step before it."""

    began_s: float
    decodes: list[int] | None
    prefills: list[int]


class StepLog:
    """Written by a scheduler, step by step; every method is cheap and none waits.

    ``clock`` gives monotonic seconds.
    """

    def __init__(self, sender: Sender, clock: Callable[[], float] = time.monotonic) -> None:
        self._sender = sender
        self.clock = clock
        self._numbers: dict[str, int] = {}
        self._joined = 0
        self._lost_tokens: dict[int, int] = {}  # computed before a preemption
        self._steady: Mapping[str, int] | None = None  # what the last step decoded, if only that
        self._under_way: deque[_Step] = deque()
        self._scheduled = self._completed = 0
        self._leaving: deque[tuple[int, int]] = deque()  # number, and the last step it may be in
        self._occupied = False
        self._end_s = 0.0
        self._unsent: list[Record] = []
        self._sent_s = clock()
        self._dropped = 0

    # ---- what the scheduler says -------------------------------------------------

    def joined(self, request_id: str) -> None:
        """The engine has got a request; one it has already is ignored."""
        if request_id in self._numbers:
            return
        number = self._numbers[request_id] = self._joined
        self._joined += 1
        self._unsent.append(Joined(number, request_id))
        if not self._occupied:
            self._occupied = True
            self._unsent.append(Occupied(self.clock()))
            self._send()

    def left(self, request_id: str) -> None:
        """A request has ended, however it did; steps under way may still contain it."""
        number = self._numbers.pop(request_id, None)
        if number is not None:
            self._lost_tokens.pop(number, None)
            self._leaving.append((number, self._scheduled))

    def preempted(self, request_id: str, computed_tokens: int) -> None:
        """A request has lost what was computed for it, and will be computed anew."""
        self._steady = None
        number = self._numbers.get(request_id)
        if number is not None:
            known = self._lost_tokens.get(number, 0)
            self._lost_tokens[number] = max(known, computed_tokens)

    def scheduled(
        self,
        tokens: Mapping[str, int],
        requests: Mapping[str, ScheduledRequest],
        began_s: float,
    ) -> None:
        """A step was composed: new tokens by request, and the requests as it leaves them.

        ``began_s`` is when the scheduler began to compose it.
        """
        self._scheduled += 1
        if tokens == self._steady:
            self._under_way.append(_Step(began_s, None, []))
            return
        step = _Step(began_s, [], [])
        self._compose(step, tokens, requests)
        self._under_way.append(step)
        decodes_only = bool(tokens) and not step.prefills
        # More than a token each (drafts) is not the same again: some may be rejected.
        self._steady = tokens if decodes_only and max(tokens.values()) == 1 else None

    def completed(self, *, busy: bool) -> None:
        """The oldest step under way is over; ``busy`` says if requests are unfinished."""
        now_s = self.clock()
        step = self._under_way.popleft()
        self._completed += 1
        start_s = step.began_s
        if self._end_s and start_s - self._end_s < TURN_MAX_S:
            start_s = self._end_s
        # An idle engine takes turns as well, to tell its workers who has ended.
        if self._occupied or step.decodes or step.prefills:
            self._note(step, start_s, now_s)
            self._end_s = now_s
        gone = self._release()
        self._settle(busy, now_s, gone or now_s - self._sent_s >= SEND_PERIOD_S)

    def looked(self, *, busy: bool) -> None:
        """Requests have ended outside a step."""
        gone = self._release()
        self._settle(busy, self.clock(), gone)

    def stopped(self) -> None:
        """Nothing more will be said: the replica must not take what follows for idle time."""
        self._unsent.append(Stopped())
        self._send()

    # ---- inside ------------------------------------------------------------------

    def _compose(
        self, step: _Step, tokens: Mapping[str, int], requests: Mapping[str, ScheduledRequest]
    ) -> None:
        decodes, prefills, numbers, lost = step.decodes, step.prefills, self._numbers, 0
        assert decodes is not None
        for request_id, count in tokens.items():
            request, number = requests[request_id], numbers[request_id]
            computed = request.num_computed_tokens
            before = computed - count
            if self._lost_tokens:
                lost = self._lost_tokens.get(number, 0)
            # A prompt's last token alone is computed as a decoding sequence's is.
            if (count == 1 and computed > lost) or before >= max(lost, request.num_prompt_tokens):
                decodes += (number, computed)
            else:
                repeated = max(0, min(lost, computed) - before)
                prefills += (number, count, computed, repeated, before)

    def _note(self, step: _Step, start_s: float, end_s: float) -> None:
        unsent = self._unsent
        last = unsent[-1] if unsent else None
        if step.decodes is None:
            if isinstance(last, Stepped) and last.end_s == start_s:
                # Only steps without a prompt are followed by more of the same.
                last.steps += 1
                last.end_s = end_s
            else:
                unsent.append(Stepped(start_s, end_s, 1, None, []))
            return
        if len(unsent) >= UNSENT_RECORDS_MAX:
            # Here, so that what follows refers to a composition that is written in full.
            self._drop()
        self._unsent.append(Stepped(start_s, end_s, 1, step.decodes, step.prefills))

    def _drop(self) -> None:
        """Forget steps that nobody has read for long; who came and went is kept."""
        kept: list[Record] = [each for each in self._unsent if not isinstance(each, Stepped)]
        self._dropped += len(self._unsent) - len(kept)
        self._unsent = kept

    def _release(self) -> bool:
        """Note who has left and is in no step under way; whether there was anybody."""
        gone = False
        while self._leaving and self._leaving[0][1] <= self._completed:
            self._unsent.append(Left(self._leaving.popleft()[0]))
            gone = True
        # Even one whose last step is under way: the engine's output says that it ended.
        return gone or bool(self._leaving)

    def _settle(self, busy: bool, now_s: float, send: bool) -> None:
        if self._occupied and not busy and not self._under_way:
            self._occupied = False
            self._end_s = 0.0
            self._unsent.append(Vacant(now_s))
            send = True
        if send:
            self._send()

    def _send(self) -> None:
        if self._dropped:
            self._unsent.append(Lost(self._dropped))
            self._dropped = 0
        if self._unsent:
            del self._unsent[: self._sender.send(self._unsent)]
        self._sent_s = self.clock()
