"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx

from tests.stack import Stack

WAIT_S = 240.0
ASKS = 30


def until(condition: Callable[[], bool], what: str, within_s: float = WAIT_S) -> None:
    """Wait until a condition of another process holds.

    How long it takes is not what is tested: the time-out only ends a broken test. Who does
    not answer is asked again.
    """
    give_up_at_s = time.monotonic() + within_s
    while True:
        why = ""
        try:
            if condition():
                return
        except httpx.HTTPError as error:
            why = f" ({type(error).__name__}: {error})"
        assert time.monotonic() < give_up_at_s, f"never happened: {what}{why}"
        time.sleep(0.1)


def patiently(ask: Callable[[], httpx.Response]) -> httpx.Response:
    """Ask, and again while limits and budgets cannot be looked up, as the answer says to.

    A router waits a second for Control, which a busy machine may take.
    """
    for _ in range(ASKS):
        answer = ask()
        if answer.status_code != 503:
            break
        answer.read()
        if answer.json()["error"]["code"] != "limits_unavailable":
            break
        time.sleep(float(answer.headers["retry-after"]))
    return answer


def is_idle(stack: Stack) -> bool:
    """Tell whether engines and routers hold no request at all, by their own latest report."""
    gauges = ("engine_running", "engine_waiting", "in_flight", "queue_depth")
    try:
        return all(stack.metric(f"headrace_{gauge}") == 0 for gauge in gauges)
    except httpx.HTTPError:
        return False
