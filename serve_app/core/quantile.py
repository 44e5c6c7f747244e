"""Quantiles by nearest rank: values that were seen."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import Final

RANK_SLACK: Final = 1e-9


def quantile(values: Iterable[float], ratio: float) -> float:
    """Return the smallest value that at least ``ratio`` of ``values`` do not exceed.

    ``values`` is not empty. A rank that is whole but for rounding is taken as whole.
    """
    ordered = sorted(values)
    assert ordered
    rank = ceil(ratio * len(ordered) - RANK_SLACK)
    return ordered[min(len(ordered), max(1, rank)) - 1]
