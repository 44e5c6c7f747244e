"""Cold starts as whoever orders replicas sees them."""

from __future__ import annotations

from serve_app.core.start_times import StartTimes


def test_what_was_told_holds_until_a_start_was_seen() -> None:
    starts = StartTimes()
    assert starts.estimate_s(120.0) == 120.0
    starts.look(-10.0, 2, ["a", "b"])
    starts.look(0.0, 2, ["a", "b"])
    starts.look(1.0, 2, ["a", "b"])
    assert starts.estimate_s(120.0) == 120.0, "who was there at first was not seen to start"


def test_a_start_takes_from_the_order_to_when_the_replica_is_heard_of() -> None:
    starts = StartTimes()
    starts.look(-10.0, 1, ["a"])
    starts.look(0.0, 1, ["a"])
    starts.look(10.0, 3, ["a"])
    starts.look(40.0, 3, ["a"])
    starts.look(55.0, 3, ["a", "b"])
    assert starts.estimate_s(120.0) == 45.0
    starts.look(75.0, 3, ["a", "b", "c"])
    assert starts.estimate_s(120.0) == 65.0, "the upper one of two"


def test_a_lost_replica_is_ordered_when_it_is_missed() -> None:
    starts = StartTimes()
    starts.look(-10.0, 2, ["a", "b"])
    starts.look(0.0, 2, ["a", "b"])
    starts.look(5.0, 2, ["a"])
    starts.look(25.0, 2, ["a", "c"])
    assert starts.estimate_s(120.0) == 20.0


def test_an_order_taken_back_measures_nothing() -> None:
    starts = StartTimes()
    starts.look(-10.0, 1, ["a"])
    starts.look(0.0, 1, ["a"])
    starts.look(5.0, 2, ["a"])
    starts.look(10.0, 1, ["a"])
    starts.look(90.0, 2, ["a"])
    starts.look(100.0, 2, ["a", "b"])
    assert starts.estimate_s(120.0) == 10.0


def test_a_replaced_replica_that_nobody_ordered_measures_nothing() -> None:
    starts = StartTimes()
    starts.look(-10.0, 1, ["a"])
    starts.look(0.0, 1, ["a"])
    starts.look(50.0, 1, ["b"])
    assert starts.estimate_s(120.0) == 120.0


def test_a_start_that_was_held_up_does_not_make_others_ordered_hours_ahead() -> None:
    starts = StartTimes()
    starts.look(-10.0, 0, [])
    starts.look(0.0, 0, [])
    starts.look(1.0, 1, [])
    starts.look(4000.0, 1, ["a"])
    assert starts.estimate_s(120.0) == 480.0
    for begin_s in range(10_000, 20_000, 1000):
        starts.look(float(begin_s), 1, [])
        starts.look(float(begin_s) + 30.0, 1, [f"r{begin_s}"])
    assert starts.estimate_s(120.0) == 30.0, "old ones are forgotten"


def test_who_was_silent_for_a_moment_did_not_start() -> None:
    starts = StartTimes()
    starts.look(-10.0, 2, ["a", "b"])
    starts.look(0.0, 2, ["a"])
    starts.look(1.0, 2, ["a", "b"])
    starts.look(2.0, 2, ["b"])
    starts.look(32.0, 2, ["b", "c"])
    assert starts.estimate_s(120.0) == 30.0


def test_replicas_that_are_heard_of_one_by_one_after_a_restart_did_not_start() -> None:
    starts = StartTimes()
    starts.look(0.0, 7, ["a", "b", "c"])
    starts.look(1.0, 7, ["a", "b", "c", "d", "e"])
    starts.look(3.0, 7, ["a", "b", "c", "d", "e", "f", "g"])
    starts.look(20.0, 7, ["a", "b", "c", "d", "e", "f", "g"])
    assert starts.estimate_s(120.0) == 120.0
