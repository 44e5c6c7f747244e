"""The decoding sequences of an engine, in sums that need no update as steps pass.

Every decoding sequence gets one token a step. So its context is a constant plus the
step count, the step in which it finishes is known when it starts, and it needs a block
in every step that leaves a certain rest when divided by the block size.
"""

from __future__ import annotations

from heapq import heappop, heappush

from serve_app.core.engine_parts import Sequence
from serve_app.core.types import PriorityClass


class DecodeSet:
    """Who decodes; ``step`` everywhere is how many steps the engine has completed."""

    __slots__ = ("_by_class", "_finish_steps", "_finishing", "_needs", "_offsets", "_size", "count")

    def __init__(self, block_tokens: int) -> None:
        self.count = 0
        self._size = block_tokens
        self._by_class = [0] * len(PriorityClass)
        self._offsets = [0] * len(PriorityClass)  # contexts less the step count, summed
        self._needs = [0] * block_tokens  # by the rest of the steps that take a block
        self._finishing: dict[int, list[Sequence]] = {}
        self._finish_steps: list[int] = []

    def join(self, sequence: Sequence, context: int, step: int) -> None:
        """Add a sequence whose next token has ``context`` tokens to attend to."""
        self.count += 1
        self._by_class[sequence.priority] += 1
        self._offsets[sequence.priority] += context - step
        self._needs[(step - context + 1) % self._size] += 1
        finish = step + sequence.prompt_tokens + sequence.output_tokens - context
        sequence._finish_step = finish
        bucket = self._finishing.get(finish)
        if bucket is None:
            self._finishing[finish] = [sequence]
            heappush(self._finish_steps, finish)
        else:
            bucket.append(sequence)

    def leave(self, sequence: Sequence, context: int, step: int) -> None:
        """Take a sequence out before it is complete."""
        self._finishing[sequence._finish_step].remove(sequence)
        self._forget(sequence, context, step)

    def pop_finished(self, step: int) -> list[Sequence]:
        """Take out and return the sequences complete after ``step`` steps, as they joined."""
        finished: list[Sequence] = []
        steps = self._finish_steps
        # Buckets emptied by ``leave`` stay until their step has come.
        while steps and steps[0] <= step:
            finished = self._finishing.pop(heappop(steps))
            for sequence in finished:
                context = sequence.prompt_tokens + sequence.output_tokens
                self._forget(sequence, context, step)
        return finished

    def next_finish(self) -> int:
        """Return the step after which the next sequence is complete; there must be one."""
        steps = self._finish_steps
        while not self._finishing[steps[0]]:
            del self._finishing[heappop(steps)]
        return steps[0]

    def contexts(self, step: int) -> int:
        """Return the sum of all contexts in the step that follows ``step`` steps."""
        critical, standard, sheddable = self._offsets
        return critical + standard + sheddable + self.count * step

    def contexts_by_class(self, step: int) -> list[int]:
        """Return the contexts summed by class, as ``contexts`` does for all."""
        return [
            offset + count * step
            for offset, count in zip(self._offsets, self._by_class, strict=True)
        ]

    def blocks(self, step: int) -> int:
        """Return how many blocks the step that follows ``step`` steps takes."""
        return self._needs[step % self._size]

    def blocks_of_steps(self, step: int, steps: int) -> int:
        """Return how many blocks the ``steps`` steps take that follow ``step`` steps."""
        size = self._size
        cycles, rest = divmod(steps, size)
        blocks = cycles * self.count
        if rest:
            needs = self._needs
            first = step % size
            last = first + rest
            blocks += sum(needs[first:last])
            if last > size:
                blocks += sum(needs[: last - size])
        return blocks

    def steps_within(self, step: int, steps: int, free: int) -> int:
        """Return how many of the ``steps`` following steps ``free`` blocks last."""
        size = self._size
        if self.count * ((steps - 1) // size + 1) <= free:
            return steps
        cycles, rest = divmod(free, self.count)
        fitting = cycles * size
        needs = self._needs
        for index in range(step, step + size):
            rest -= needs[index % size]
            if rest < 0:
                break
            fitting += 1
        return min(steps, fitting)

    def _forget(self, sequence: Sequence, context: int, step: int) -> None:
        self.count -= 1
        self._by_class[sequence.priority] -= 1
        self._offsets[sequence.priority] -= context - step
        self._needs[(step - context + 1) % self._size] -= 1
