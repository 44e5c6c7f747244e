"""The KV cache of a simulated engine: counted blocks, and named ones that prefixes share.

A block is anonymous (owned by one sequence) or part of a *segment*: a fixed run of
blocks named by a chained hash of everything up to its end, shared by every sequence
with that prefix. A segment nobody references stays as an eviction candidate, least
recently released first. So only segments need objects; anonymous blocks are a number,
and taking ten thousand of them costs one addition.

The policy is vLLM's (``vllm/v1/core/block_pool.py``): every full block is cached when
its sequence is gone, and free blocks are handed out never-hashed ones first, then the
least recently released. What a sequence leaves without a name nobody can find again,
but it takes its turn in that order: it is kept as one entry, a *remnant*. A sequence's
blocks are released from the tail, so that the heads of prefixes survive longest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

# Hashes are below this; names the model makes up for segments are above, and those of
# remnants above these.
HASH_LIMIT = 1 << 64
_FIRST_REMNANT = 2 * HASH_LIMIT


class KvBlocks:
    """A pool of ``total`` blocks in which ``segment_blocks`` blocks share a hash."""

    __slots__ = (
        "_idle",
        "_references",
        "_remnants",
        "anonymous",
        "idle_blocks",
        "segment_blocks",
        "total",
    )

    def __init__(self, total: int, segment_blocks: int) -> None:
        assert total >= 1
        assert segment_blocks >= 1
        self.total = total
        self.segment_blocks = segment_blocks
        self.anonymous = 0
        self.idle_blocks = 0  # cached and unused: free, but not handed out first
        self._remnants = _FIRST_REMNANT
        self._references: dict[int, int] = {}
        self._idle: OrderedDict[int, int] = OrderedDict()  # segment or remnant -> blocks

    def free(self) -> int:
        """Return how many blocks can be taken, cached ones nobody uses included."""
        return self.total - self.anonymous - self.segment_blocks * len(self._references)

    def usage_ratio(self) -> float:
        """Return the share of blocks that sequences hold, in [0, 1]."""
        return 1.0 - self.free() / self.total

    def match(self, hashes: Sequence[int], limit: int) -> tuple[int, int]:
        """Return how many leading ``hashes`` are cached, at most ``limit``, and how many are idle.

        Idle ones count as free until they are held.
        """
        references = self._references
        idle = self._idle
        found = idle_found = 0
        for name in hashes:
            if found == limit:
                break
            if name not in references:
                if name not in idle:
                    break
                idle_found += 1
            found += 1
        return found, idle_found

    def hold(self, hashes: Sequence[int]) -> None:
        """Reference segments that ``match`` found."""
        references = self._references
        for name in hashes:
            count = references.get(name)
            if count is None:
                self.idle_blocks -= self._idle.pop(name)
                references[name] = 1
            else:
                references[name] = count + 1

    def take(self, blocks: int) -> None:
        """Hand out anonymous blocks, evicting cached ones as needed.

        The caller has checked ``free()``.
        """
        self.anonymous += blocks
        free = self.free()
        assert free >= 0, "more blocks taken than there are"
        if free < self.idle_blocks:
            self._evict(self.idle_blocks - free)

    def name(self, segment_hash: int) -> bool:
        """Turn one segment's worth of anonymous blocks into a shared segment.

        False if the hash is cached already: the caller's copy stays anonymous.
        """
        if segment_hash in self._references or segment_hash in self._idle:
            return False
        self._references[segment_hash] = 1
        self.anonymous -= self.segment_blocks
        return True

    def release(self, anonymous: int, full: int, named: Sequence[int]) -> None:
        """Give back a sequence's blocks: ``named`` in prefix order, tail released first.

        ``full`` of the ``anonymous`` blocks are filled, so they stay as a remnant.
        """
        assert 0 <= full <= anonymous <= self.anonymous
        self.anonymous -= anonymous
        idle = self._idle
        if full:
            self._remnants += 1
            idle[self._remnants] = full
            self.idle_blocks += full
        references = self._references
        for segment_hash in reversed(named):
            count = references[segment_hash]
            if count == 1:
                del references[segment_hash]
                idle[segment_hash] = self.segment_blocks
                self.idle_blocks += self.segment_blocks
            else:
                references[segment_hash] = count - 1

    def _evict(self, blocks: int) -> None:
        """Forget cached blocks, least recently released first: segments whole."""
        idle = self._idle
        while blocks > 0:
            name, size = idle.popitem(last=False)
            if size > blocks and name >= _FIRST_REMNANT:
                idle[name] = size - blocks
                idle.move_to_end(name, last=False)
                size = blocks
            self.idle_blocks -= size
            blocks -= size
