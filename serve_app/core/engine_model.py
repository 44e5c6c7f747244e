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

A test runs vLLM's own scheduler beside this one and compares every step.

Nothing happens per token. While nobody is admitted, finishes or lacks a block, the step
time grows linearly, so any number of steps is one quadratic; block needs repeat with the
block size as period. Time is kept in whole picoseconds, so that jumping over a thousand
steps and taking them one by one give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush

from serve_app.core.decode_set import DecodeSet
from serve_app.core.engine_parts import EngineParams, Event, EventKind, Phase, Sequence, StepRun
from serve_app.core.kv_blocks import HASH_LIMIT, KvBlocks
from serve_app.core.types import PriorityClass

__all__ = ["EngineModel", "EngineParams", "Event", "EventKind", "Phase", "Sequence", "StepRun"]

_TICKS_PER_S = 10**12

_FIRST_TOKEN = EventKind.FIRST_TOKEN
_FINISHED = EventKind.FINISHED
_PREEMPTED = EventKind.PREEMPTED
_WAITING = Phase.WAITING
_PREFILL = Phase.PREFILL
_DECODE = Phase.DECODE
_STALLED = Phase.STALLED
_ENDED = Phase.ENDED


class EngineModel:
    """One engine. Time is handed in and must not run backwards.

    Driving it: ``add`` and ``abort`` at the current time, ``next_event_s`` to learn when
    to look again, ``advance(until_s)`` to get what happened up to then. At one instant,
    events come before additions, and additions before the next step is composed.
    """

    def __init__(
        self,
        params: EngineParams,
        *,
        on_run: Callable[[StepRun], None] | None = None,
        on_freed: Callable[[Sequence, int, float, float], None] | None = None,
    ) -> None:
        """``on_run`` is told of steps that are over.

        ``on_freed`` is told of a sequence that leaves in the middle of a step: the tokens in
        its blocks, when the step began, and now.
        """
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
        self._on_freed = on_freed
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
        self._stalled: list[Sequence] = []
        self._decoding = DecodeSet(params.block_tokens)
        self._still_tokens = [0] * len(PriorityClass)  # of waiting and prefilling sequences
        # The plan: steps of one composition, of which the first is in flight.
        self._start = 0
        self._plan_steps = 0
        self._plan_first = 0
        self._plan_growth = 0
        self._prefills: list[tuple[Sequence, int]] = []
        self._decodes: tuple[tuple[Sequence, int], ...] = ()
        self._passed = 0  # steps of the plan that are over
        self._freed: list[tuple[Sequence, int]] = []  # in the middle of the step in flight
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
        self._sync(now_s)
        if not self.params.prefix_caching:
            hashes = ()
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
        self._sync(now_s)
        if sequence.phase is _ENDED:
            return
        sequence._generated = self.generated(sequence)
        if sequence.phase is _WAITING:
            self._waiting_count -= 1
            self._still_tokens[sequence.priority] -= sequence.prompt_tokens + sequence._generated
        else:
            if self._on_freed is not None and self._plan_steps:
                self._free_early(sequence, now_s)
            self._remove_running(sequence, self._plan_steps > 0)
        sequence.phase = _ENDED
        sequence.finished_s = now_s
        self._cut_plan()

    def advance(self, until_s: float) -> list[Event]:
        """Run to ``until_s`` and return what happened since the last call, in order."""
        self._sync(until_s)
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
        contexts = self._decoding.contexts_by_class(self.steps_total)
        critical, standard, sheddable = (
            still + context for still, context in zip(self._still_tokens, contexts, strict=True)
        )
        return critical, standard, sheddable

    def prefill_tokens(self) -> int:
        """Return the prompt tokens that wait or are being computed, O(waiting)."""
        tokens = sum([chunk for _, chunk in self._prefills])
        if self._partial is not None:
            tokens += self._uncomputed(self._partial)
        if self._waiting_count:
            waiting = [each for _, _, each in self._waiting if each.phase is _WAITING]
            tokens += sum([each.prompt_tokens for each in waiting])
        return tokens

    def generated(self, sequence: Sequence) -> int:
        """Return how many output tokens a sequence has produced so far."""
        if sequence.phase is _DECODE:
            return sequence._generated + self.steps_total - sequence._base_step
        return sequence._generated

    # ---- time --------------------------------------------------------------------

    def _sync(self, until_s: float) -> None:
        """Complete every step that ends by ``until_s``; an idle engine moves to it.

        A step that would start at that very instant is left open: additions come first.
        """
        limit = _ticks(until_s)
        while True:
            if self._plan_steps:
                end = self._plan_end()
                if end > limit:
                    self._enter_plan(limit, until_s)
                    return
                self._complete_plan(end)
            elif self._start / _TICKS_PER_S >= until_s:
                return
            elif not self._plan():
                self._start = limit
                return

    def _enter_plan(self, limit: int, until_s: float) -> None:
        """Pass the steps of the plan that end by ``limit``, fewer than all."""
        steps = self._steps_within(limit - self._start)
        if not steps:
            return
        end = self._start + self._duration_of(steps)
        if end / _TICKS_PER_S >= until_s:
            self._plan_steps = steps
            self._complete_plan(end)
        else:
            self._pass_steps(steps)

    def _plan_end(self) -> int:
        return self._start + self._duration_of(self._plan_steps)

    def _duration_of(self, steps: int) -> int:
        """Return how long the first ``steps`` steps of the plan take."""
        if steps == 1:
            return self._plan_first
        return steps * self._plan_first + self._plan_growth * (steps * (steps - 1) // 2)

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
        duration = self._duration_of(steps)
        self._record(steps, duration)
        blocks = self._decoding.blocks_of_steps(self.steps_total + 1, steps)
        if blocks:
            self.kv.take(blocks)
        self.steps_total += steps
        self.decode_tokens_total += steps * self._decoding.count
        self.busy_ticks += duration
        self._start += duration
        self._plan_first += steps * self._plan_growth
        self._plan_steps -= steps

    def _record(self, steps: int, duration: int) -> None:
        if self._on_run is None:
            return
        self._on_run(
            StepRun(
                self._start / _TICKS_PER_S,
                (self._start + duration) / _TICKS_PER_S,
                steps,
                self._decodes,
                tuple(self._prefills),
                self._passed,
                self._plan_first,
                self._plan_growth,
                tuple(
                    [
                        (each, each.computed_tokens)
                        for each in self._stalled
                        if each.phase is not _ENDED
                    ]
                ),
                tuple(self._freed),
            )
        )
        self._passed += steps
        self._freed = []

    def _free_early(self, sequence: Sequence, now_s: float) -> None:
        """Tell of the blocks of a sequence that leaves in the middle of a step."""
        assert self._on_freed is not None
        tokens = self._held_tokens(sequence, in_flight=True)
        self._on_freed(sequence, tokens, self._start / _TICKS_PER_S, now_s)
        if sequence not in self._stalled:
            self._freed.append((sequence, tokens))

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
        self.decode_tokens_total += self._decoding.count
        self._plan_steps = 0
        self._start = end
        self.steps_total += 1
        now_s = end / _TICKS_PER_S
        if self._stalled:
            self._end_stall()
        for sequence in self._decoding.pop_finished(self.steps_total):
            del self._running[sequence.order]
            sequence._generated = sequence.output_tokens
            self._end(sequence, now_s)
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
        decodes = self._decoding
        blocks = decodes.blocks(self.steps_total)
        partial = self._partial
        budget = self.params.token_budget - decodes.count
        chunk = 0
        if partial is not None:
            chunk = min(self._uncomputed(partial), budget)
            blocks += self._blocks_for(partial, chunk)
        preempted = blocks > self.kv.free()
        if preempted:
            chunk = self._allocate_by_preempting()
            partial = self._partial
        elif blocks:
            self.kv.take(blocks)
        if partial is not None and chunk:
            budget -= chunk
            self._compute(partial, chunk)
        if self._waiting_count and not preempted and budget > 0:
            self._admit(budget)
        if not decodes.count and not self._prefills and not self._stalled:
            return False
        self._set_plan(decodes.count)
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
        duration = (
            self._overhead
            + max(self._weights, self._per_token * tokens)
            + self._per_context * self._decoding.contexts(step)
            + self._per_sequence * (decoding + len(prefills))
        )
        # Even a step without work, or without costs, ends after it started.
        self._plan_first = duration if tokens and duration else 1
        self._plan_growth = self._per_context * decoding
        if prefills or not decoding:
            self._plan_steps = 1
        else:
            # The blocks of the step in flight are taken; those of the others must be free.
            others = self._decoding.next_finish() - step - 1
            self._plan_steps = 1 + self._decoding.steps_within(step + 1, others, self.kv.free())
        if self._on_run is not None:
            self._passed = 0
            self._decodes = tuple(
                [
                    (sequence, sequence.prompt_tokens + self.generated(sequence))
                    for sequence in self._running.values()
                    if sequence.phase is _DECODE
                ]
            )

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

    def _name_privately(self, victim: Sequence, tokens: int) -> None:
        """Let a sequence find its own blocks again, if they are still there then.

        Its hashes are extended by made-up ones as far as its ``tokens`` with blocks go.
        """
        if not self.params.prefix_caching:
            return
        known = len(victim.hashes)
        first = HASH_LIMIT + (victim.order << 32)
        full = tokens // self._segment_tokens
        victim.hashes += tuple(range(first + known, first + full))
        self._name_segments(victim, tokens)

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
        A sequence that preempts itself ends the round: those behind it miss the step.
        """
        running = self._running
        size = self._block_tokens
        served: set[int] = set()
        chunk = 0
        itself = False
        for sequence in list(running.values()):
            if sequence.phase is _WAITING:
                continue
            if itself:
                self._stall(sequence)
                continue
            if sequence.phase is _DECODE:
                context = sequence.prompt_tokens + self.generated(sequence)
                need = int((context - 1) % size == 0)
            else:
                budget = self.params.token_budget - self._decoding.count
                chunk = min(self._uncomputed(sequence), budget)
                need = self._blocks_for(sequence, chunk)
            while need > self.kv.free() and not itself:
                victim = max(running.values(), key=_preemption_order)
                self._preempt(victim, in_flight=victim.order in served)
                itself = victim is sequence
            if not itself:
                self.kv.take(need)
                served.add(sequence.order)
        return chunk

    def _stall(self, sequence: Sequence) -> None:
        """Leave a running sequence out of the step that is being composed."""
        if sequence.phase is _DECODE:
            sequence._generated = self.generated(sequence)
            context = sequence.prompt_tokens + sequence._generated
            self._decoding.leave(sequence, context, self.steps_total)
            self._still_tokens[sequence.priority] += context
            sequence.computed_tokens = context - 1
            sequence.phase = _STALLED
        self._stalled.append(sequence)

    def _end_stall(self) -> None:
        """Let those decode again that missed the step just completed."""
        for sequence in self._stalled:
            if sequence.phase is _STALLED:
                self._start_decoding(sequence)
        self._stalled = []

    def _preempt(self, victim: Sequence, in_flight: bool) -> None:
        victim._generated = self.generated(victim)
        computed = victim.computed_tokens
        if victim.phase is _DECODE:
            computed = victim.prompt_tokens + victim._generated - 1
        victim.lost_tokens = max(victim.lost_tokens, computed)
        self._name_privately(victim, self._held_tokens(victim, in_flight))
        self._remove_running(victim, in_flight)
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
        if generated == sequence.output_tokens:
            self._still_tokens[sequence.priority] -= sequence.prompt_tokens + generated - 1
            del self._running[sequence.order]
            self._end(sequence, now_s)
            return
        self._still_tokens[sequence.priority] += 1
        self._start_decoding(sequence)

    def _start_decoding(self, sequence: Sequence) -> None:
        context = sequence.prompt_tokens + sequence._generated
        self._still_tokens[sequence.priority] -= context
        sequence.phase = _DECODE
        sequence._base_step = self.steps_total
        self._decoding.join(sequence, context, self.steps_total)

    def _end(self, sequence: Sequence, now_s: float) -> None:
        """A complete sequence: cache what its hashes cover, free its blocks."""
        computed = sequence.prompt_tokens + sequence.output_tokens - 1
        if len(sequence.hashes) > sequence._examined:
            self._name_segments(sequence, computed)
        self._release(sequence, computed)
        sequence.phase = _ENDED
        sequence.finished_s = now_s
        self._events.append((now_s, _FINISHED, sequence))

    def _release(self, sequence: Sequence, tokens: int) -> None:
        """Free the blocks of a sequence that hold ``tokens`` tokens."""
        size = self._block_tokens
        named = sequence._named
        shared = len(named) * self.kv.segment_blocks
        blocks = (tokens - 1) // size + 1 - shared
        full = tokens // size - shared if self.params.prefix_caching else 0
        self.kv.release(blocks, full, named)
        if named:
            sequence._named = []

    def _held_tokens(self, sequence: Sequence, in_flight: bool) -> int:
        """Return how many tokens the blocks of a running sequence hold.

        ``in_flight``: those of the step under way have been taken for it.
        """
        if sequence.phase is _DECODE:
            return sequence.prompt_tokens + sequence._generated - (not in_flight)
        return sequence.computed_tokens

    def _remove_running(self, sequence: Sequence, in_flight: bool) -> None:
        """Take a sequence out before its end; ``_generated`` is up to date."""
        del self._running[sequence.order]
        held = self._held_tokens(sequence, in_flight)
        context = sequence.prompt_tokens + sequence._generated
        if sequence.phase is _DECODE:
            self._decoding.leave(sequence, context, self.steps_total)
        else:
            self._still_tokens[sequence.priority] -= context
            if self._partial is sequence:
                self._partial = None
        self._release(sequence, held)


def _ticks(time_s: float) -> int:
    """Return ``time_s`` in ticks, rounded up by what a float can't tell apart.

    So a time that came from ticks always reaches the tick it came from.
    """
    return math.floor((time_s + math.ulp(time_s)) * _TICKS_PER_S)


def _preemption_order(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority, sequence.order
