"""The slow twin of EngineModel: one step at a time, one block at a time, no cleverness.

It shares no code with the model but the shape of an event, so that agreement means
something. Everything is a list; every step walks every sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from serve_app.core.engine_model import EngineParams, EventKind

TICKS_PER_S = 10**12


@dataclass(eq=False)
class Slow:
    name: int
    prompt: int
    output: int
    priority: int
    hashes: tuple[int, ...]
    generated: int = 0
    computed: int = 0
    filled: int = 0  # computed tokens, and those of the step being composed
    cached: int | None = None
    state: str = "waiting"
    private: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    looked_at: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt + self.generated


@dataclass
class Segment:
    blocks: list[int]
    holders: int


class ReferenceEngine:
    def __init__(self, params: EngineParams) -> None:
        self.params = params
        self.now = 0
        self.end: int | None = None
        self.scheduled: list[tuple[Slow, int]] = []
        self.running: list[Slow] = []
        self.waiting: list[Slow] = []
        self.free_blocks = list(range(params.kv_blocks))
        self.cache: dict[int | str, Segment] = {}
        self.idle: list[int | str] = []
        self.nameless = 0
        self.events: list[tuple[float, EventKind, int]] = []
        self.preemptions = 0

    # -- what the caller does

    def add(self, name, now_s, *, prompt, output, priority, hashes):
        self.sync(now_s)
        slow = Slow(name, prompt, output, priority, hashes)
        self.waiting.append(slow)
        return slow

    def abort(self, slow: Slow, now_s: float) -> None:
        self.sync(now_s)
        if slow.state == "ended":
            return
        if slow in self.waiting:
            self.waiting.remove(slow)
        else:
            self.running.remove(slow)
            self.release(slow)
        slow.state = "ended"

    def advance(self, until_s: float):
        self.sync(until_s)
        events, self.events = self.events, []
        return events

    def next_step_s(self) -> float:
        if self.end is None and not self.compose():
            return math.inf
        assert self.end is not None
        return self.end / TICKS_PER_S

    def sync(self, now_s: float) -> None:
        limit = math.floor((now_s + math.ulp(now_s)) * TICKS_PER_S)
        while True:
            if self.end is not None:
                if self.end > limit:
                    return
                self.complete()
            elif self.now / TICKS_PER_S >= now_s:
                return
            elif not self.compose():
                self.now = limit
                return

    # -- blocks

    def free(self) -> int:
        return len(self.free_blocks) + self.idle_blocks()

    def idle_blocks(self) -> int:
        return sum(len(self.cache[name].blocks) for name in self.idle)

    def take(self, slow: Slow, count: int) -> None:
        for _ in range(count):
            if not self.free_blocks:
                self.free_blocks += self.cache.pop(self.idle.pop(0)).blocks
            slow.private.append(self.free_blocks.pop())

    def held(self, slow: Slow) -> int:
        return len(slow.private) + len(slow.segments) * self.params.blocks_per_hash

    def release(self, slow: Slow) -> None:
        # Full blocks without a name are cached too; nobody will ever ask for them.
        named = len(slow.segments) * self.params.blocks_per_hash
        for _ in range(slow.filled // self.params.block_tokens - named):
            self.nameless += 1
            name = f"nameless {self.nameless}"
            self.cache[name] = Segment([slow.private.pop()], 0)
            self.idle.append(name)
        self.free_blocks += slow.private
        slow.private = []
        for name in reversed(slow.segments):
            self.cache[name].holders -= 1
            if not self.cache[name].holders:
                self.idle.append(name)
        slow.segments = []

    def name_segments(self, slow: Slow) -> None:
        per = self.params.blocks_per_hash
        full = slow.filled // (per * self.params.block_tokens)
        while slow.looked_at < min(full, len(slow.hashes)):
            name = slow.hashes[slow.looked_at]
            slow.looked_at += 1
            if name not in self.cache:
                self.cache[name] = Segment([slow.private.pop() for _ in range(per)], 1)
                slow.segments.append(name)

    # -- a step

    def compose(self) -> bool:
        budget = self.params.token_budget
        scheduled: dict[int, tuple[Slow, int]] = {}
        preempted = False
        for slow in list(self.running):
            if slow not in self.running:
                continue
            chunk = min(slow.tokens - slow.computed, budget)
            while self.blocks(slow.computed + chunk) - self.held(slow) > self.free():
                preempted = True
                victim = max(self.running, key=lambda each: (each.priority, each.name))
                budget += scheduled.pop(victim.name, (victim, 0))[1]
                self.preempt(victim)
                if victim is slow:
                    break
            if slow not in self.running:
                break
            else:
                self.take(slow, self.blocks(slow.computed + chunk) - self.held(slow))
                slow.filled = slow.computed + chunk
                scheduled[slow.name] = (slow, chunk)
                budget -= chunk
        for slow, chunk in scheduled.values():
            slow.computed += chunk
            if slow.state == "prefill":
                self.name_segments(slow)
        self.waiting.sort(key=lambda each: (each.priority, each.name))
        while not preempted and self.waiting and budget > 0:
            if len(self.running) >= self.params.max_num_seqs:
                break
            chunk = self.admit(self.waiting[0], budget)
            if not chunk:
                break
            slow = self.waiting.pop(0)
            self.running.append(slow)
            scheduled[slow.name] = (slow, chunk)
            budget -= chunk
        if not scheduled and not self.running:
            return False
        self.scheduled = list(scheduled.values())
        self.end = self.now + self.duration()
        return True

    def admit(self, slow: Slow, budget: int) -> int:
        segment_tokens = self.params.blocks_per_hash * self.params.block_tokens
        hits = 0
        while hits < min(len(slow.hashes), (slow.tokens - 1) // segment_tokens):
            if slow.hashes[hits] not in self.cache:
                break
            hits += 1
        found = list(slow.hashes[:hits])
        held_next = sum(name in self.idle for name in found)
        free = self.free() - held_next * self.params.blocks_per_hash
        if self.blocks(slow.tokens) - hits * self.params.blocks_per_hash > free:
            return 0
        for name in found:
            if name in self.idle:
                self.idle.remove(name)
            self.cache[name].holders += 1
        slow.segments = found
        slow.looked_at = hits
        slow.computed = hits * segment_tokens
        if slow.cached is None:
            slow.cached = slow.computed
        chunk = min(slow.tokens - slow.computed, budget)
        self.take(slow, self.blocks(slow.computed + chunk) - self.held(slow))
        slow.computed += chunk
        slow.filled = slow.computed
        slow.state = "prefill"
        self.name_segments(slow)
        return chunk

    def blocks(self, tokens: int) -> int:
        return math.ceil(tokens / self.params.block_tokens)

    def preempt(self, victim: Slow) -> None:
        self.running.remove(victim)
        per = self.params.blocks_per_hash * self.params.block_tokens
        for index in range(len(victim.hashes), victim.filled // per):
            victim.hashes = (*victim.hashes, f"{victim.name} at {index}")
        self.name_segments(victim)
        self.release(victim)
        victim.computed = 0
        victim.state = "waiting"
        self.waiting.append(victim)
        self.preemptions += 1
        self.events.append((self.now / TICKS_PER_S, EventKind.PREEMPTED, victim.name))

    def duration(self) -> int:
        p = self.params
        contexts = sum(slow.tokens for slow, _ in self.scheduled if slow.state == "decode")
        tokens = sum(chunk for _, chunk in self.scheduled)
        duration = (
            round(p.overhead_s * TICKS_PER_S)
            + max(
                round(p.weights_s * TICKS_PER_S),
                round(p.prefill_s_per_token * TICKS_PER_S) * tokens,
            )
            + round(p.context_s_per_token * TICKS_PER_S) * contexts
            + round(p.batch_s_per_request * TICKS_PER_S) * len(self.scheduled)
        )
        return max(1, duration) if tokens else 1

    def complete(self) -> None:
        assert self.end is not None
        self.now, self.end = self.end, None
        now_s = self.now / TICKS_PER_S
        for slow, _ in self.scheduled:
            if slow.state == "ended" or slow.computed < slow.tokens:
                continue
            slow.generated += 1
            slow.state = "decode"
            if slow.generated == 1:
                self.events.append((now_s, EventKind.FIRST_TOKEN, slow.name))
            if slow.generated == slow.output:
                slow.state = "ended"
                self.running.remove(slow)
                self.name_segments(slow)
                self.release(slow)
                self.events.append((now_s, EventKind.FINISHED, slow.name))
        self.scheduled = []
