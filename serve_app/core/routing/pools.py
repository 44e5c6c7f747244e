"""Which pool a request belongs to before any replica is chosen."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.core.types import PoolName


@dataclass(frozen=True, slots=True)
class HeavyPool:
    """Long contexts go elsewhere: above ``threshold_tokens`` of context, to ``pool``.

    Context is prompt plus the most output the request may produce. One 100k-token prompt
    holds a third of an 8B replica's KV cache and seconds of its prefill, which every short
    request beside it pays for.

    Raises:
        ValueError: the threshold is below 1.
    """

    pool: PoolName
    threshold_tokens: int

    def __post_init__(self) -> None:
        if self.threshold_tokens < 1:
            raise ValueError(f"threshold_tokens must be at least 1, not {self.threshold_tokens}")


def choose_pool(pool: PoolName, tokens: int, policy: HeavyPool | None) -> PoolName:
    """Return the pool that shall serve a request for ``pool``: it, or the heavy one where set.

    ``tokens`` are those of its prompt and the most of its answer.
    """
    if policy is not None and tokens > policy.threshold_tokens:
        return policy.pool
    return pool
