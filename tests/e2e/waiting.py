"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable

WAIT_S = 120.0


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition of another process holds.

    How long it takes is not what is tested: the time-out only ends a broken test.
    """
    give_up_at_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up_at_s, f"never happened: {what}"
        time.sleep(0.1)
