"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx

from tests.stack import Stack

WAIT_S = 120.0


def until(condition: Callable[[], bool], what: str, within_s: float = WAIT_S) -> None:
    """Wait until a condition of another process holds.

    How long it takes is not what is tested: the time-out only ends a broken test.
    """
    give_up_at_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up_at_s, f"never happened: {what}"
        time.sleep(0.1)


def is_idle(stack: Stack) -> bool:
    """Tell whether engines and routers hold no request at all, by their own latest report."""
    gauges = ("engine_running", "engine_waiting", "in_flight", "queue_depth")
    try:
        return all(stack.metric(f"headrace_{gauge}") == 0 for gauge in gauges)
    except httpx.HTTPError:
        return False
