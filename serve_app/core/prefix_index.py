"""Which replica holds which prompt prefixes: a bounded guess of every engine's KV cache.

A prompt is a chain of block hashes, each hash covering its block and all before it, so
equal hashes mean equal prefixes. The index remembers, per replica, the blocks of the
prompts sent there, least recently used forgotten first, as the engine's own cache does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from serve_app.core.types import ReplicaId


class PrefixIndex:
    """Hash-chained prefixes of every replica in one table, bounded per replica.

    One table maps a block hash to the set of replicas that hold it (a bit each). A
    prompt's blocks are touched from the last to the first, so a block is never older
    than the blocks behind it and eviction takes the ends of chains: whoever holds a
    block holds all before it. Lookups use that: they bisect instead of walking, and
    cost O(replicas x log(match length)) at most; recording costs O(prompt blocks).

    Source: vLLM's and SGLang's prefix caches; the llm-d router's approximate prefix
    scorer (hash blocks, LRU per server).
    """

    def __init__(self, capacity_blocks: int) -> None:
        """Hold at most ``capacity_blocks`` (>= 1) blocks per replica.

        Raises:
            ValueError: the capacity is below 1.
        """
        if capacity_blocks < 1:
            raise ValueError(f"capacity_blocks must be at least 1, not {capacity_blocks}")
        self._capacity_blocks = capacity_blocks
        self._holders: dict[int, int] = {}
        self._recent: dict[ReplicaId, OrderedDict[int, None]] = {}
        self._bits: dict[ReplicaId, int] = {}
        self._replicas: dict[int, ReplicaId] = {}

    def match(self, prefix_hashes: Sequence[int]) -> Mapping[ReplicaId, int]:
        """Return how many leading blocks each replica holds, replicas with none left out."""
        matches: dict[ReplicaId, int] = {}
        if not prefix_hashes:
            return matches
        holders = self._holders
        depth = 1
        mask = holders.get(prefix_hashes[0], 0)
        while mask:
            depth = self._common_depth(prefix_hashes, depth, mask)
            more = depth < len(prefix_hashes)
            deeper = holders.get(prefix_hashes[depth], 0) & mask if more else 0
            dropped = mask & ~deeper
            while dropped:
                bit = dropped & -dropped
                matches[self._replicas[bit]] = depth
                dropped ^= bit
            mask = deeper
            depth += 1
        return matches

    def record(self, replica: ReplicaId, prefix_hashes: Sequence[int]) -> None:
        """Remember that ``replica`` has been sent this prompt; evict what no longer fits."""
        bit = self._bits.get(replica)
        if bit is None:
            bit = self._claim_bit(replica)
        recent = self._recent[replica]
        holders = self._holders
        for block in reversed(prefix_hashes[: self._capacity_blocks]):
            if block in recent:
                recent.move_to_end(block)
            else:
                recent[block] = None
                holders[block] = holders.get(block, 0) | bit
        while len(recent) > self._capacity_blocks:
            evicted, _ = recent.popitem(last=False)
            self._drop(evicted, bit)

    def forget(self, replica: ReplicaId) -> None:
        """Drop everything known of a replica that died or restarted; unknown ones are ignored."""
        bit = self._bits.pop(replica, None)
        if bit is None:
            return
        del self._replicas[bit]
        for block in self._recent.pop(replica):
            self._drop(block, bit)

    def replicas(self) -> frozenset[ReplicaId]:
        """Return the replicas anything is remembered of."""
        return frozenset(self._bits)

    def blocks(self, replica: ReplicaId) -> int:
        """Return how many blocks are remembered for a replica, at most the capacity."""
        return len(self._recent.get(replica, ()))

    def __len__(self) -> int:
        """Return the number of distinct blocks in the table."""
        return len(self._holders)

    def _common_depth(self, prefix_hashes: Sequence[int], depth: int, mask: int) -> int:
        """Return the greatest depth at which every replica in ``mask`` still matches."""
        holders = self._holders
        low, high = depth, len(prefix_hashes)
        if holders.get(prefix_hashes[high - 1], 0) & mask == mask:
            return high
        while low + 1 < high:
            middle = (low + high) // 2
            if holders.get(prefix_hashes[middle - 1], 0) & mask == mask:
                low = middle
            else:
                high = middle
        return low

    def _claim_bit(self, replica: ReplicaId) -> int:
        """Give a new replica the lowest bit nobody uses, so that masks stay short."""
        bit = 1
        while bit in self._replicas:
            bit <<= 1
        self._bits[replica] = bit
        self._replicas[bit] = replica
        self._recent[replica] = OrderedDict()
        return bit

    def _drop(self, block: int, bit: int) -> None:
        remaining = self._holders[block] & ~bit
        if remaining:
            self._holders[block] = remaining
        else:
            del self._holders[block]
