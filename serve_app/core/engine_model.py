"""The scheduling physics of one vLLM engine, without a model and without a clock.

Source: vLLM v1's scheduler with ``scheduling_policy=priority`` and chunked prefill
(``vllm/v1/core/sched/scheduler.py``). Each step, in this order:

1. every running sequence past its prompt decodes one token, and the one sequence whose
   prompt was cut by the budget gets its next chunk;
2. if blocks run out, the running sequence of the lowest class, latest arrival, is
   preempted: it loses its blocks and recomputes prompt and output when readmitted;
3. unless something was preempted, waiting sequences are admitted in class order, then
   arrival order, while token budget, sequence slots and KV blocks for the whole prompt
   last. The head blocks the ones behind it. Blocks of a shared prefix are reused.

A step lasts ``overhead + max(weights, prefill * tokens) + context * sum(decode contexts)
+ batch * sequences``.

Only one deviation from vLLM is deliberate: after a sequence preempts itself, the others
of that step still run, where vLLM skips those behind it for one step.

Nothing happens per token. While nobody is admitted, finishes or lacks a block, the step
time grows linearly, so any number of steps is one quadratic; block needs repeat with the
block size as period. Time is kept in whole picoseconds, so that jumping over a thousand
steps and taking them one by one give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from heapq import heappop, heappush

from serve_app.core.kv_blocks import KvBlocks
from serve_app.core.types import PriorityClass

_TICKS_PER_S = 10**12
_CLASSES = len(PriorityClass)


class EventKind(IntEnum):
    """What happened to a sequence at the end of a step (preemption: at its start)."""

    FIRST_TOKEN = 0
    FINISHED = 1
    PREEMPTED = 2


class Phase(IntEnum):
    """Where a sequence is in its life."""

    WAITING = 0
    PREFILL = 1
    DECODE = 2
    ENDED = 3


_FIRST_TOKEN = EventKind.FIRST_TOKEN
_FINISHED = EventKind.FINISHED
_PREEMPTED = EventKind.PREEMPTED
_WAITING = Phase.WAITING
_PREFILL = Phase.PREFILL
_DECODE = Phase.DECODE
_ENDED = Phase.ENDED


@dataclass(frozen=True, slots=True)
class EngineParams:
    """Size and speed of an engine; the defaults are an 8B model on one H100, BF16.

    ``blocks_per_hash`` is how many KV blocks one prefix hash stands for (a trace that
    hashes 512 tokens at a time has 32 blocks of 16).

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    max_num_seqs: int = 256
    token_budget: int = 8192
    kv_blocks: int = 26_313
    block_tokens: int = 16
    blocks_per_hash: int = 1
    overhead_s: float = 0.00115
    weights_s: float = 0.0057
    prefill_s_per_token: float = 30e-6
    context_s_per_token: float = 7.6e-8
    batch_s_per_request: float = 4.4e-6

    def __post_init__(self) -> None:
        for field in ("max_num_seqs", "kv_blocks", "block_tokens", "blocks_per_hash"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        if self.token_budget < self.max_num_seqs:
            raise ValueError(
                f"token_budget ({self.token_budget}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running sequence decodes one token a step"
            )
        for field in (
            "overhead_s",
            "weights_s",
            "prefill_s_per_token",
            "context_s_per_token",
            "batch_s_per_request",
        ):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field} must be finite and not negative")


class Sequence:
    """One generation inside the model. Read only for callers; made by ``EngineModel.add``.

    ``cached_tokens`` is the prefix hit of its first admission and ``started_s`` when
    that was; ``first_token_s`` and ``finished_s`` are None until they happen.
    ``computed_tokens`` is meaningful while the prompt is being processed.
    """

    __slots__ = (
        "_base_step",
        "_examined",
        "_finish_step",
        "_generated",
        "_named",
        "cached_tokens",
        "computed_tokens",
        "finished_s",
        "first_token_s",
        "hashes",
        "name",
        "order",
        "output_tokens",
        "phase",
        "preemptions",
        "priority",
        "prompt_tokens",
        "started_s",
    )

    def __init__(
        self,
        name: object,
        order: int,
        prompt_tokens: int,
        output_tokens: int,
        priority: int,
        hashes: tuple[int, ...],
    ) -> None:
        self.name = name
        self.order = order
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.priority = priority
        self.hashes = hashes
        self.phase = _WAITING
        self.preemptions = 0
        self.cached_tokens = 0
        self.computed_tokens = 0
        self.started_s: float | None = None
        self.first_token_s: float | None = None
        self.finished_s: float | None = None
        self._generated = 0
        self._base_step = 0
        self._finish_step = 0
        self._examined = 0
        self._named: list[int] = []


Event = tuple[float, EventKind, Sequence]


@dataclass(frozen=True, slots=True)
class StepRun:
    """Consecutive steps of one composition, for splitting their time over requests.

    ``decodes`` holds each decoding sequence with its context in the run's first step;
    it grows by one token a step. ``prefills`` holds chunk sizes; such a run is one step.
    """

    start_s: float
    duration_s: float
    steps: int
    decodes: tuple[tuple[Sequence, int], ...]
    prefills: tuple[tuple[Sequence, int], ...]


class EngineModel:
    """One engine. Time is handed in and must not run backwards.

    Driving it: ``add`` and ``abort`` at the current time, ``next_event_s`` to learn when
    to look again, ``advance(until_s)`` to get what happened up to then. At one instant,
    events come before additions, and additions before the next step is composed.
    """

    def __init__(
        self, params: EngineParams, *, on_run: Callable[[StepRun], None] | None = None
    ) -> None:
        self.params = params
        self.preemptions_total = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self.steps_total = 0
        self.prefill_tokens_total = 0
        self.decode_tokens_total = 0
        self.busy_ticks = 0
        self.kv = KvBlocks(params.kv_blocks, params.blocks_per_hash)
        self._on_run = on_run
        self._block_tokens = params.block_tokens
        self._segment_tokens = params.block_tokens * params.blocks_per_hash
        self._overhead = round(params.overhead_s * _TICKS_PER_S)
        self._weights = round(params.weights_s * _TICKS_PER_S)
        self._per_token = round(params.prefill_s_per_token * _TICKS_PER_S)
        self._per_context = round(params.context_s_per_token * _TICKS_PER_S)
        self._per_sequence = round(params.batch_s_per_request * _TICKS_PER_S)
        self._order = 0
        self._waiting: list[tuple[int, int, Sequence]] = []
        self._waiting_count = 0
        self._running: dict[int, Sequence] = {}
        self._partial: Sequence | None = None
        # Decoding sequences. A sequence's context is its class's offset share plus the
        # step count, so sums over sequences need no update as steps pass.
        self._decoding = 0
        self._offsets = [0] * _CLASSES
        self._decoding_by_class = [0] * _CLASSES
        self._still_tokens = [0] * _CLASSES  # of waiting and prefilling sequences
        self._needs = [0] * self._block_tokens  # who needs a block at step % block_tokens
        self._finishing: dict[int, list[Sequence]] = {}
        self._finish_steps: list[int] = []
        # The plan: steps of one composition, of which the first is in flight.
        self._start = 0
        self._plan_steps = 0
        self._plan_first = 0
        self._plan_growth = 0
        self._prefills: list[tuple[Sequence, int]] = []
        self._decodes: list[tuple[Sequence, int]] = []
        self._events: list[Event] = []

    # ---- what callers do ---------------------------------------------------------

    def add(
        self,
        name: object,
        now_s: float,
        *,
        prompt_tokens: int,
        output_tokens: int,
        priority: int = PriorityClass.STANDARD,
        hashes: tuple[int, ...] = (),
    ) -> Sequence:
        """Queue a sequence that will produce exactly ``output_tokens`` tokens.

        ``hashes`` are chained hashes of its leading full segments, shortest first; they
        may run past the prompt (then the answer is cached too when it is complete).

        Raises:
            ValueError: prompt and output could never fit, or a count is below 1.
        """
        if prompt_tokens < 1 or output_tokens < 1:
            raise ValueError("prompt_tokens and output_tokens must be at least 1")
        if prompt_tokens + output_tokens > self.capacity_tokens:
            raise ValueError(
                f"{prompt_tokens} prompt and {output_tokens} output tokens exceed the "
                f"KV cache of {self.capacity_tokens} tokens"
            )
        self._sync(_ticks(now_s))
        order = self._order
        self._order = order + 1
        sequence = Sequence(name, order, prompt_tokens, output_tokens, int(priority), hashes)
        self._still_tokens[sequence.priority] += prompt_tokens
        self._enqueue(sequence)
        if self._plan_steps > 1 and len(self._running) < self.params.max_num_seqs:
            self._cut_plan()
        return sequence

    def abort(self, sequence: Sequence, now_s: float) -> None:
        """Drop a sequence and free its blocks at once; one that has ended is ignored.

        The step in flight keeps its duration: the work on it is already under way.
        """
        self._sync(_ticks(now_s))
        if sequence.phase is _ENDED:
            return
        sequence._generated = self.generated(sequence)
        if sequence.phase is _WAITING:
            self._waiting_count -= 1
            self._still_tokens[sequence.priority] -= sequence.prompt_tokens + sequence._generated
        else:
            self._remove_running(sequence, in_flight=self._plan_steps > 0)
        sequence.phase = _ENDED
        sequence.finished_s = now_s
        self._cut_plan()

    def advance(self, until_s: float) -> list[Event]:
        """Run to ``until_s`` and return what happened since the last call, in order."""
        self._sync(_ticks(until_s))
        events = self._events
        if events:
            self._events = []
        return events

    def next_event_s(self) -> float:
        """Return when to advance next, no later than the next event; inf when idle."""
        if self._events:
            return self._events[0][0]
        if not self._plan_steps and not self._plan():
            return math.inf
        return self._plan_end() / _TICKS_PER_S

    def next_step_s(self) -> float:
        """Return when the step in flight ends; inf when idle."""
        if not self._plan_steps and not self._plan():
            return math.inf
        return (self._start + self._plan_first) / _TICKS_PER_S

    # ---- figures -----------------------------------------------------------------

    @property
    def capacity_tokens(self) -> int:
        """How many tokens of context the KV cache holds."""
        return self.params.kv_blocks * self._block_tokens

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot, preempted ones included."""
        return self._waiting_count

    @property
    def busy(self) -> bool:
        """Whether there is anything to do, a step in flight included."""
        return bool(self._running or self._waiting_count or self._plan_steps)

    def kv_usage_ratio(self) -> float:
        """Return the share of KV blocks in use, in [0, 1]."""
        return self.kv.usage_ratio()

    def in_flight_tokens(self) -> tuple[int, int, int]:
        """Return prompt and generated tokens of everything present, by class."""
        step = self.steps_total
        critical, standard, sheddable = (
            still + offset + count * step
            for still, offset, count in zip(
                self._still_tokens, self._offsets, self._decoding_by_class, strict=True
            )
        )
        return critical, standard, sheddable

    def generated(self, sequence: Sequence) -> int:
        """Return how many output tokens a sequence has produced so far."""
        if sequence.phase is _DECODE:
            return sequence._generated + self.steps_total - sequence._base_step
        return sequence._generated

    # ---- time --------------------------------------------------------------------

    def _sync(self, limit: int) -> None:
        """Complete every step that ends by ``limit``; an idle engine moves to it."""
        while True:
            if self._plan_steps:
                end = self._plan_end()
                if end > limit:
                    self._pass_steps(self._steps_within(limit - self._start))
                    return
                self._complete_plan(end)
            elif self._start >= limit:
                return
            elif not self._plan():
                self._start = limit
                return

    def _plan_end(self) -> int:
        steps = self._plan_steps
        if steps == 1:
            return self._start + self._plan_first
        return (
            self._start + steps * self._plan_first + self._plan_growth * (steps * (steps - 1) // 2)
        )

    def _steps_within(self, ticks: int) -> int:
        """Return how many steps of the plan end within ``ticks``, fewer than planned."""
        first = self._plan_first
        if ticks < first:
            return 0
        growth = self._plan_growth
        if not growth:
            return ticks // first
        linear = first - growth / 2
        steps = int((math.sqrt(linear * linear + 2.0 * growth * ticks) - linear) / growth)
        # The float root may be off by one; the integers decide.
        while steps * first + growth * (steps * (steps - 1) // 2) > ticks:
            steps -= 1
        while (steps + 1) * first + growth * ((steps + 1) * steps // 2) <= ticks:
            steps += 1
        return steps

    def _pass_steps(self, steps: int) -> None:
        """Let ``steps`` of a plan pass that goes on: the following one is in flight."""
        if not steps:
            return
        duration = steps * self._plan_first + self._plan_growth * (steps * (steps - 1) // 2)
        self._record(steps, duration)
        self._take_run_blocks(steps)
        self.steps_total += steps
        self.decode_tokens_total += steps * self._decoding
        self.busy_ticks += duration
        self._start += duration
        self._plan_first += steps * self._plan_growth
        self._plan_steps -= steps

    def _take_run_blocks(self, steps: int) -> None:
        """Take the blocks of the ``steps`` steps behind the one in flight."""
        size = self._block_tokens
        cycles, rest = divmod(steps, size)
        blocks = cycles * self._decoding
        if rest:
            needs = self._needs
            first = (self.steps_total + 1) % size
            last = first + rest
            blocks += sum(needs[first:last])
            if last > size:
                blocks += sum(needs[: last - size])
        if blocks:
            self.kv.take(blocks)

    def _record(self, steps: int, duration: int) -> None:
        if self._on_run is None:
            return
        self._on_run(
            StepRun(
                self._start / _TICKS_PER_S,
                duration / _TICKS_PER_S,
                steps,
                tuple(self._decodes),
                tuple(self._prefills),
            )
        )
        self._decodes = [(sequence, context + steps) for sequence, context in self._decodes]

    def _cut_plan(self) -> None:
        """Compose anew after the step in flight."""
        if self._plan_steps > 1:
            self._plan_steps = 1

    def _complete_plan(self, end: int) -> None:
        """End the plan's last step: hand out tokens, first tokens and finishes."""
        steps = self._plan_steps
        if steps > 1:
            self._pass_steps(steps - 1)
        self._record(1, self._plan_first)
        self.busy_ticks += self._plan_first
        self.decode_tokens_total += self._decoding
        self._plan_steps = 0
        self._start = end
        self.steps_total += 1
        step = self.steps_total
        now_s = end / _TICKS_PER_S
        finish_steps = self._finish_steps
        # Buckets emptied by aborts stay until their step has come.
        while finish_steps and finish_steps[0] <= step:
            for sequence in self._finishing.pop(heappop(finish_steps)):
                self._finish_decoding(sequence, now_s)
        if self._prefills:
            prefills = self._prefills
            self._prefills = []
            for sequence, tokens in prefills:
                self.prefill_tokens_total += tokens
                if sequence.phase is _PREFILL and sequence is not self._partial:
                    self._end_prefill(sequence, now_s)

    # ---- composing a step --------------------------------------------------------

    def _plan(self) -> bool:
        """Compose the next step, or run of equal steps; False when there is no work."""
        decoding = self._decoding
        blocks = self._needs[self.steps_total % self._block_tokens] if decoding else 0
        partial = self._partial
        budget = self.params.token_budget - decoding
        chunk = 0
        if partial is not None:
            chunk = min(self._uncomputed(partial), budget)
            blocks += self._blocks_for(partial, chunk)
        preempted = blocks > self.kv.free()
        if preempted:
            chunk = self._allocate_by_preempting()
            decoding = self._decoding
            partial = self._partial
        elif blocks:
            self.kv.take(blocks)
        if partial is not None:
            budget -= chunk
            self._compute(partial, chunk)
        if self._waiting_count and not preempted and budget > 0:
            self._admit(budget)
        if not decoding and not self._prefills:
            # A lone sequence never preempts itself, so only an empty engine gets here.
            return False
        self._set_plan(decoding)
        if preempted:
            # Admission resumes with the next step.
            self._cut_plan()
        return True

    def _set_plan(self, decoding: int) -> None:
        """Set duration and length of the plan from its composition."""
        prefills = self._prefills
        tokens = decoding
        for _, chunk in prefills:
            tokens += chunk
        step = self.steps_total
        offsets = self._offsets
        contexts = offsets[0] + offsets[1] + offsets[2] + decoding * step
        duration = (
            self._overhead
            + max(self._weights, self._per_token * tokens)
            + self._per_context * contexts
            + self._per_sequence * (decoding + len(prefills))
        )
        # With all costs zero a step still has an end after its start.
        self._plan_first = duration or 1
        self._plan_growth = self._per_context * decoding
        if prefills:
            self._plan_steps = 1
        else:
            self._plan_steps = self._steps_with_blocks(self._next_finish_step() - step)
        if self._on_run is not None:
            self._decodes = [
                (sequence, sequence.prompt_tokens + self.generated(sequence))
                for sequence in self._running.values()
                if sequence.phase is _DECODE
            ]

    def _next_finish_step(self) -> int:
        finish_steps = self._finish_steps
        finishing = self._finishing
        while not finishing[finish_steps[0]]:
            del finishing[heappop(finish_steps)]
        return finish_steps[0]

    def _steps_with_blocks(self, steps: int) -> int:
        """Return how many of ``steps`` decode steps the free blocks last, at least 1.

        The first step's blocks are taken already.
        """
        decoding = self._decoding
        size = self._block_tokens
        free = self.kv.free()
        if decoding * ((steps - 2) // size + 1) <= free:
            return steps
        cycles, rest = divmod(free, decoding)
        fitting = 1 + cycles * size
        needs = self._needs
        for index in range(self.steps_total + 1, self.steps_total + 1 + size):
            rest -= needs[index % size]
            if rest < 0:
                break
            fitting += 1
        return min(steps, fitting)

    def _admit(self, budget: int) -> None:
        """Admit waiting sequences while budget, slots and blocks last."""
        waiting = self._waiting
        running = self._running
        slots = self.params.max_num_seqs - len(running)
        while waiting and budget > 0 and slots > 0:
            sequence = waiting[0][2]
            if sequence.phase is not _WAITING:
                heappop(waiting)
                continue
            chunk = self._start_sequence(sequence, budget)
            if not chunk:
                return
            heappop(waiting)
            self._waiting_count -= 1
            running[sequence.order] = sequence
            budget -= chunk
            slots -= 1

    def _start_sequence(self, sequence: Sequence, budget: int) -> int:
        """Give a waiting sequence its first chunk; 0 if its prompt's blocks don't fit."""
        tokens = sequence.prompt_tokens + sequence._generated
        kv = self.kv
        size = self._block_tokens
        hashes = sequence.hashes
        hits = idle = 0
        if hashes:
            # The last token is always computed, for its logits are needed.
            hits, idle = kv.match(hashes, (tokens - 1) // self._segment_tokens)
        segment = kv.segment_blocks
        if (tokens - 1) // size + 1 + (idle - hits) * segment > kv.free():
            return 0
        cached = hits * self._segment_tokens
        if hits:
            held = hashes[:hits]
            kv.hold(held)
            sequence._named = list(held)
        sequence._examined = hits
        self.prefix_query_tokens += tokens
        self.prefix_hit_tokens += cached
        if sequence.started_s is None:
            sequence.started_s = self._start / _TICKS_PER_S
            sequence.cached_tokens = cached
        chunk = min(tokens - cached, budget)
        sequence.phase = _PREFILL
        sequence.computed_tokens = cached
        kv.take((cached + chunk - 1) // size + 1 - hits * segment)
        self._compute(sequence, chunk)
        return chunk

    def _compute(self, sequence: Sequence, chunk: int) -> None:
        """Put a chunk whose blocks are taken into the step, naming its full segments."""
        computed = sequence.computed_tokens + chunk
        sequence.computed_tokens = computed
        self._prefills.append((sequence, chunk))
        whole = computed == sequence.prompt_tokens + sequence._generated
        self._partial = None if whole else sequence
        if sequence.hashes:
            self._name_segments(sequence, computed)

    def _name_segments(self, sequence: Sequence, computed: int) -> None:
        hashes = sequence.hashes
        full = min(len(hashes), computed // self._segment_tokens)
        name = self.kv.name
        named = sequence._named
        for segment_hash in hashes[sequence._examined : full]:
            if name(segment_hash):
                named.append(segment_hash)
        sequence._examined = full

    def _uncomputed(self, sequence: Sequence) -> int:
        return sequence.prompt_tokens + sequence._generated - sequence.computed_tokens

    def _blocks_for(self, sequence: Sequence, chunk: int) -> int:
        """Return how many further blocks a prefilling sequence needs for ``chunk`` tokens."""
        size = self._block_tokens
        computed = sequence.computed_tokens
        return (computed + chunk - 1) // size - (computed - 1) // size

    # ---- preemption --------------------------------------------------------------

    def _allocate_by_preempting(self) -> int:
        """Allocate this step's blocks one sequence at a time, preempting as vLLM does.

        Returns the chunk of the sequence in prefill; it is the last in running order.
        """
        running = self._running
        size = self._block_tokens
        served: set[int] = set()
        chunk = 0
        for sequence in list(running.values()):
            if sequence.phase is _DECODE:
                context = sequence.prompt_tokens + self.generated(sequence)
                need = int((context - 1) % size == 0)
            elif sequence.phase is _PREFILL:
                budget = self.params.token_budget - self._decoding
                chunk = min(self._uncomputed(sequence), budget)
                need = self._blocks_for(sequence, chunk)
            else:
                continue
            while need > self.kv.free():
                victim = max(running.values(), key=_preemption_order)
                self._preempt(victim, in_flight=victim.order in served)
                if victim is sequence:
                    break
            if sequence.phase is not _WAITING:
                if need:
                    self.kv.take(need)
                served.add(sequence.order)
        return chunk

    def _preempt(self, victim: Sequence, in_flight: bool) -> None:
        victim._generated = self.generated(victim)
        self._remove_running(victim, in_flight=in_flight)
        victim.phase = _WAITING
        victim.preemptions += 1
        victim.computed_tokens = 0
        self.preemptions_total += 1
        self._still_tokens[victim.priority] += victim.prompt_tokens + victim._generated
        self._enqueue(victim)
        self._events.append((self._start / _TICKS_PER_S, _PREEMPTED, victim))

    # ---- sequences coming and going ----------------------------------------------

    def _enqueue(self, sequence: Sequence) -> None:
        heappush(self._waiting, (sequence.priority, sequence.order, sequence))
        self._waiting_count += 1

    def _end_prefill(self, sequence: Sequence, now_s: float) -> None:
        """The step that completed the prompt also produced a token."""
        generated = sequence._generated + 1
        sequence._generated = generated
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
            self._events.append((now_s, _FIRST_TOKEN, sequence))
        priority = sequence.priority
        context = sequence.prompt_tokens + generated
        self._still_tokens[priority] -= context - 1
        if generated == sequence.output_tokens:
            del self._running[sequence.order]
            self._end(sequence, context - 1, now_s)
            return
        step = self.steps_total
        sequence.phase = _DECODE
        sequence._base_step = step
        self._decoding += 1
        self._decoding_by_class[priority] += 1
        self._offsets[priority] += context - step
        self._needs[(step - context + 1) % self._block_tokens] += 1
        finish = step + sequence.output_tokens - generated
        sequence._finish_step = finish
        bucket = self._finishing.get(finish)
        if bucket is None:
            self._finishing[finish] = [sequence]
            heappush(self._finish_steps, finish)
        else:
            bucket.append(sequence)

    def _leave_decoding(self, sequence: Sequence, context: int) -> None:
        priority = sequence.priority
        step = self.steps_total
        self._decoding -= 1
        self._decoding_by_class[priority] -= 1
        self._offsets[priority] -= context - step
        self._needs[(step - context + 1) % self._block_tokens] -= 1

    def _finish_decoding(self, sequence: Sequence, now_s: float) -> None:
        sequence._generated = sequence.output_tokens
        context = sequence.prompt_tokens + sequence.output_tokens
        self._leave_decoding(sequence, context)
        del self._running[sequence.order]
        self._end(sequence, context - 1, now_s)

    def _end(self, sequence: Sequence, computed: int, now_s: float) -> None:
        """A complete sequence: cache what its hashes cover, free its blocks."""
        if len(sequence.hashes) > sequence._examined:
            self._name_segments(sequence, computed)
        self._release(sequence, (computed - 1) // self._block_tokens + 1)
        sequence.phase = _ENDED
        sequence.finished_s = now_s
        self._events.append((now_s, _FINISHED, sequence))

    def _release(self, sequence: Sequence, blocks: int) -> None:
        named = sequence._named
        if named:
            self.kv.release(blocks - len(named) * self.kv.segment_blocks, named)
            sequence._named = []
        else:
            self.kv.release(blocks, ())

    def _remove_running(self, sequence: Sequence, in_flight: bool) -> None:
        """Take a sequence out before its end; ``_generated`` is up to date.

        ``in_flight``: the blocks of the step under way have been taken for it.
        """
        del self._running[sequence.order]
        context = sequence.prompt_tokens + sequence._generated
        if sequence.phase is _DECODE:
            held = context if in_flight else context - 1
            self._finishing[sequence._finish_step].remove(sequence)
            self._leave_decoding(sequence, context)
        else:
            held = sequence.computed_tokens
            self._still_tokens[sequence.priority] -= context
            if self._partial is sequence:
                self._partial = None
        self._release(sequence, (held - 1) // self._block_tokens + 1)


def _ticks(time_s: float) -> int:
    """Return ``time_s`` in ticks, rounded up by what a float can't tell apart.

    So a time that came from ticks always reaches the tick it came from.
    """
    return math.floor((time_s + math.ulp(time_s)) * _TICKS_PER_S)


def _preemption_order(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority, sequence.order
