"""Choosing without talking: a hash of who asks and who may answer."""

from __future__ import annotations

from hashlib import blake2b

from serve_app.core.types import ReplicaId


def rendezvous(name: str, replica: ReplicaId) -> int:
    """Return a replica's weight for a name, the same in every process; the highest wins.

    Source: rendezvous hashing (Thaler and Ravishankar).
    """
    text = f"{name}\0{replica}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big")
