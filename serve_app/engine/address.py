"""Where a process listens on the token channel, and where the frames of one call go."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Address:
    """One process's end of the channel: where it listens, and the key that lets a sender in."""

    endpoint: str
    server_key: bytes


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """A stream: the router that reads it, and its number there."""

    router: Address
    stream: int
