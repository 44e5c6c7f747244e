"""What an operator may tune of the routing policies, with the defaults of their sources."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Protocol


class RandomSource(Protocol):
    """The one thing policies need of ``random.Random``; a seeded one makes runs repeat."""

    def random(self) -> float:
        """Return a float in [0, 1)."""


@dataclass(frozen=True, slots=True)
class RoutingSettings:
    """Numbers of the routing policies; each policy's docstring says what it does with them.

    ``prefix_capacity_blocks`` bounds the prefix index per replica: the engine's KV blocks
    over the tokens of a hashed block is right, less only loses hits. Rates are of one
    replica: ``prefill_tokens_per_s`` new prompt tokens, ``tokens_per_s`` prompt and output
    together as served in steady state. ``balance_tokens_per_s`` tokens in flight count as
    much as a second of waiting where TTFT decides. The rest is thresholds in the unit of
    their name.

    Raises:
        ValueError: a number is out of its range; the message names the field.
    """

    prefix_capacity_blocks: int = 26_313
    prefill_tokens_per_s: float = 33_000.0
    tokens_per_s: float = 15_000.0
    balance_tokens_per_s: float = 200_000.0
    kv_barrier_s: float = 0.15
    sticky_hit_ratio: float = 0.8
    sticky_gap_s: float = 0.3
    session_load_factor: float = 1.25
    adapter_slots: int = 4
    adapter_gap_requests: int = 16
    imbalance_requests: int = 64
    imbalance_factor: float = 1.5
    cache_hit_ratio: float = 0.5
    abandon_gap_requests: int = 16
    abandon_sigmas: float = 2.0
    long_prompt_tokens: int = 1_500
    length_gap_requests: int = 24
    queue_weight: float = 2.0
    kv_weight: float = 2.0
    prefix_weight: float = 3.0

    def __post_init__(self) -> None:
        at_least = {
            "prefix_capacity_blocks": 1,
            "adapter_slots": 1,
            "adapter_gap_requests": 0,
            "imbalance_requests": 0,
            "imbalance_factor": 1,
            "abandon_gap_requests": 0,
            "long_prompt_tokens": 1,
            "length_gap_requests": 0,
            "abandon_sigmas": 0,
            "kv_barrier_s": 0,
            "sticky_gap_s": 0,
            "session_load_factor": 1,
            "queue_weight": 0,
            "kv_weight": 0,
            "prefix_weight": 0,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if not isfinite(value) or value < least:
                raise ValueError(f"{name} must be a number of at least {least}, not {value}")
        for name in ("prefill_tokens_per_s", "tokens_per_s", "balance_tokens_per_s"):
            value = getattr(self, name)
            if not isfinite(value) or value <= 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        for name in ("sticky_hit_ratio", "cache_hit_ratio"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, not {value}")
