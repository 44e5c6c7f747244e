"""Hashes of a prompt's beginning, by which routing finds the replica that has it cached."""

from __future__ import annotations

from hashlib import blake2b

# About 16 tokens, a KV block of most engines.
BLOCK_BYTES = 64
# 256 KiB or some 64k tokens of prompt; what lies behind is taken to match as the rest does.
BLOCKS_MAX = 4096


def prefix_hashes(prefix: bytes, salt: str) -> tuple[int, ...]:
    """Return chained 64-bit hashes of every full block of ``prefix``, shortest prefix first.

    Keyed by ``salt``: equal prompts of different salts have no hash in common. At most
    BLOCKS_MAX hashes, about a microsecond each.
    """
    chain = blake2b(digest_size=8, key=blake2b(salt.encode(), digest_size=32).digest())
    view = memoryview(prefix)
    hashes = []
    for end in range(BLOCK_BYTES, min(len(prefix), BLOCK_BYTES * BLOCKS_MAX) + 1, BLOCK_BYTES):
        chain.update(view[end - BLOCK_BYTES : end])
        hashes.append(int.from_bytes(chain.digest(), "little"))
    return tuple(hashes)
