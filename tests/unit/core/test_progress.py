"""An engine that hangs is told from one that idles, works slowly or was not looked at."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.progress import LOOKS_MIN, Progress, ProgressWatch
from tests.properties import examples

BOUND_S = 120.0


def watch(*looks: tuple[float, int, bool]) -> ProgressWatch:
    """Return a watch after these looks: seconds, steps, busy."""
    watching = ProgressWatch(BOUND_S)
    for now_s, steps, busy in looks:
        watching.look(Progress(steps, busy), now_s)
    return watching


def test_work_without_a_step_for_the_bound_is_a_stall() -> None:
    looks = [(float(second), 7, True) for second in range(0, 120, 1)]
    assert not watch(*looks).stalled
    assert watch(*looks, (120.0, 7, True)).stalled


def test_an_engine_without_requests_never_stalls() -> None:
    assert not watch(*[(float(second), 7, False) for second in range(0, 1000, 10)]).stalled


def test_a_step_shorter_than_the_bound_is_waited_for() -> None:
    looks = [(float(second), second // 110, True) for second in range(0, 1100)]
    assert not watch(*looks).stalled


def test_the_wait_begins_with_the_work() -> None:
    idle = [(float(second), 7, False) for second in range(1000)]
    busy = [(1000.0 + second, 7, True) for second in range(100)]
    assert watch(*idle, *busy).waited_s == 99.0


def test_a_step_ends_the_stall() -> None:
    stalled = [(float(second), 7, True) for second in range(200)]
    assert watch(*stalled).stalled
    assert watch(*stalled, (200.0, 8, True)).waited_s == 0.0


def test_a_watcher_that_was_away_does_not_take_its_absence_for_the_engines() -> None:
    assert not watch((0.0, 7, True), (86_400.0, 7, True)).stalled
    assert watch((0.0, 7, True), (86_400.0, 7, True)).waited_s == BOUND_S / LOOKS_MIN


@pytest.mark.parametrize("back_s", [-1.0, -1e9])
def test_a_clock_that_goes_back_counts_nothing(back_s: float) -> None:
    assert watch((0.0, 7, True), (back_s, 7, True)).waited_s == 0.0


@examples(200)
@given(st.lists(st.tuples(st.floats(0, 200), st.integers(0, 2), st.booleans()), max_size=40))
def test_it_never_counts_more_than_the_time_since_the_last_step_or_idleness(
    looks: list[tuple[float, int, bool]],
) -> None:
    watching = ProgressWatch(BOUND_S)
    now_s, steps, since_s = 0.0, 0, 0.0
    before = Progress(0, busy=False)
    for passed_s, made, busy in looks:
        now_s += passed_s
        steps += made
        seen = Progress(steps, busy)
        if not busy or made or not before.busy:
            since_s = now_s
        watching.look(seen, now_s)
        assert watching.waited_s <= now_s - since_s + 1e-9
        before = seen
