"""What XIDs call for, how much a watcher does about them, and which readings are news."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.gpu_faults import (
    Action,
    Fault,
    FaultJudge,
    FaultLimits,
    Remedy,
    remedy_of,
    xid_fault,
)
from serve_app.core.gpu_readings import (
    ECC_DOUBLE_BIT,
    LAST_XID,
    REMAP_FAILED,
    XID_COUNT,
    Findings,
    ReadingHistory,
    Sample,
)
from tests.properties import examples

GPU = "GPU-1"


@pytest.mark.parametrize(
    ("xid", "remedy"),
    [
        (43, Remedy.LOG),
        (13, Remedy.RESTART_ENGINE),
        (31, Remedy.RESTART_ENGINE),
        (94, Remedy.RESTART_ENGINE),
        (48, Remedy.RESET_GPU),
        (95, Remedy.RESET_GPU),
        (119, Remedy.RESET_GPU),
        (74, Remedy.CHECK_LINKS),
        (150, Remedy.CHECK_LINKS),
        (157, Remedy.CORDON_NODE),
        (79, Remedy.REPLACE_NODE),
        (999, Remedy.UNKNOWN),
        (1, Remedy.UNKNOWN),
    ],
)
def test_the_table(xid: int, remedy: Remedy) -> None:
    assert remedy_of(xid) is remedy


def judged(*faults: tuple[float, str, int], limits: FaultLimits | None = None) -> list[Action]:
    judge = FaultJudge(limits)
    return [judge.judge(xid_fault(gpu, xid), now_s).action for now_s, gpu, xid in faults]


def test_each_remedy_has_its_action() -> None:
    for xid, action in (
        (43, Action.NOTHING),
        (999, Action.NOTHING),
        (31, Action.RESTART_ENGINE),
        (48, Action.DRAIN),
        (74, Action.DRAIN),
        (157, Action.CORDON),
        (79, Action.REPLACE),
    ):
        assert judged((0, GPU, xid)) == [action]


def test_echoes_of_a_fault_restart_nothing_and_another_gpus_fault_does() -> None:
    found = judged((0, GPU, 31), (1, GPU, 13), (59, GPU, 31), (2, "GPU-2", 31), (61, GPU, 31))
    restart, nothing = Action.RESTART_ENGINE, Action.NOTHING
    assert found == [restart, nothing, nothing, restart, restart]


def test_restarts_that_do_not_help_become_a_drain() -> None:
    times = [0.0, 100, 200, 300]
    assert judged(*[(at, GPU, 31) for at in times]) == [Action.RESTART_ENGINE] * 3 + [Action.DRAIN]
    spread = [0.0, 2000, 4000, 6000, 8000]
    assert judged(*[(at, GPU, 31) for at in spread]) == [Action.RESTART_ENGINE] * 5


def test_a_node_that_is_out_is_taken_out_again_only_for_worse() -> None:
    judge = FaultJudge()
    actions = []
    for xid in (157, 48, 95, 31, 79, 79):
        actions.append(judge.judge(xid_fault(GPU, xid), 0.0).action)
        judge.cordoned()
    nothing = Action.NOTHING
    wanted = [Action.CORDON, Action.DRAIN, nothing, nothing, Action.REPLACE, nothing]
    assert actions == wanted
    judge.returned()
    assert judge.judge(xid_fault(GPU, 31), 0.0).action is Action.RESTART_ENGINE


def test_engines_are_restarted_for_as_long_as_the_node_serves() -> None:
    judge = FaultJudge()
    for number, xid in enumerate((157, 48)):
        judge.judge(xid_fault(GPU, xid), 0.0)
        engine = judge.judge(xid_fault(f"GPU-{number}", 31), 0.0)
        assert engine.action is Action.RESTART_ENGINE, "it is not cordoned yet"
        assert judge.out is (number > 0)
        judge.cordoned()
        serves = judge.judge(xid_fault(f"GPU-1{number}", 31), 0.0).action
        assert serves is (Action.NOTHING if number else Action.RESTART_ENGINE)


def test_a_restart_that_ended_nothing_does_not_count() -> None:
    judge = FaultJudge()
    for _ in range(10):
        assert judge.judge(xid_fault(GPU, 31), 0.0).action is Action.RESTART_ENGINE
        judge.not_restarted(GPU)


def test_hardware_is_inspected_after_two_resets() -> None:
    judge = FaultJudge()
    inspect = []
    for _ in range(3):
        inspect.append(judge.judge(xid_fault(GPU, 48), 0.0).inspect)
        judge.returned()
    assert inspect == [False, False, True]
    assert FaultJudge(resets=2).judge(xid_fault(GPU, 48), 0.0).inspect


def test_what_was_not_carried_out_counts_for_nothing() -> None:
    judge = FaultJudge()
    for _ in range(5):
        decision = judge.judge(xid_fault(GPU, 48), 0.0)
        assert (decision.action, decision.inspect) == (Action.DRAIN, False)
        judge.stays(decision)
    assert not judge.out


@examples(200)
@given(st.lists(st.tuples(st.floats(0, 600), st.integers(0, 1), st.integers(1, 170)), max_size=80))
def test_no_gpu_is_restarted_more_often_than_allowed(
    faults: list[tuple[float, int, int]],
) -> None:
    limits = FaultLimits()
    judge = FaultJudge(limits)
    now_s, restarts = 0.0, dict[str, list[float]]()
    for passed_s, number, xid in faults:
        now_s += passed_s
        gpu = f"GPU-{number}"
        if judge.judge(xid_fault(gpu, xid), now_s).action is Action.RESTART_ENGINE:
            restarts.setdefault(gpu, []).append(now_s)
    for times in restarts.values():
        for first, after in zip(times, times[limits.restarts_max :], strict=False):
            assert after - first > limits.window_s


# Readings


def look(history: ReadingHistory, *values: tuple[str, float]) -> Findings:
    return history.look([Sample(GPU, signal, value) for signal, value in values])


def test_what_stood_there_at_first_is_not_news() -> None:
    history = ReadingHistory()
    assert look(history, (LAST_XID, 79), (ECC_DOUBLE_BIT, 4)).faults == []
    assert look(history, (LAST_XID, 79), (ECC_DOUBLE_BIT, 4)).faults == []


def test_the_last_xid_of_a_gpu_or_counter_that_comes_later_is_not_news() -> None:
    history = ReadingHistory()
    look(history, (ECC_DOUBLE_BIT, 0))
    later = Sample("GPU-2", LAST_XID, 48)
    assert history.look([Sample(GPU, LAST_XID, 79), later]).faults == []
    assert history.look([Sample(GPU, LAST_XID, 48), later]).faults == [xid_fault(GPU, 48)]


def test_a_changed_last_xid_is_a_fault_and_its_clearing_is_none() -> None:
    history = ReadingHistory()
    look(history, (LAST_XID, 0))
    assert look(history, (LAST_XID, 31)).faults == [xid_fault(GPU, 31)]
    assert look(history, (LAST_XID, 31)).faults == []
    assert look(history, (LAST_XID, 0)).faults == []
    assert look(history, (LAST_XID, 31)).faults == [xid_fault(GPU, 31)]


def test_the_count_shows_a_repetition_and_both_signals_are_one_event() -> None:
    history = ReadingHistory()
    history.look([Sample(GPU, LAST_XID, 0)])
    both = [Sample(GPU, LAST_XID, 31), Sample(GPU, XID_COUNT, 1, 31)]
    assert history.look(both).faults == [xid_fault(GPU, 31)]
    again = [Sample(GPU, LAST_XID, 31), Sample(GPU, XID_COUNT, 2, 31)]
    assert history.look(again).faults == [xid_fault(GPU, 31)]
    passed = [Sample(GPU, LAST_XID, 31), Sample(GPU, XID_COUNT, 0, 31)]
    assert history.look(passed) == Findings()  # its window has passed: that is no lie


def test_an_xid_whose_window_has_passed_is_news_again() -> None:
    history = ReadingHistory()
    clear = Sample(GPU, XID_COUNT, 0)
    counted = Sample(GPU, XID_COUNT, 1, 31)
    assert history.look([clear]) == Findings(), "no XID at all is no lie"
    assert history.look([counted]).faults == [xid_fault(GPU, 31)]
    assert history.look([counted]).faults == []
    assert history.look([clear]) == Findings()
    assert history.look([counted]).faults == [xid_fault(GPU, 31)]


def test_uncorrectable_errors_and_failed_remaps_are_faults() -> None:
    history = ReadingHistory()
    look(history, (ECC_DOUBLE_BIT, 0), (REMAP_FAILED, 0))
    found = look(history, (ECC_DOUBLE_BIT, 2), (REMAP_FAILED, 1)).faults
    assert [(each.what, each.remedy) for each in found] == [
        ("2 uncorrectable ECC errors", Remedy.RESET_GPU),
        ("a memory row could not be remapped", Remedy.REPLACE_NODE),
    ]


def test_a_counter_that_goes_back_is_said_and_counts_from_there() -> None:
    history = ReadingHistory()
    look(history, (ECC_DOUBLE_BIT, 5))
    back = look(history, (ECC_DOUBLE_BIT, 0))
    assert back.faults == []
    assert "went back from 5 to 0" in back.lies[0]
    assert len(look(history, (ECC_DOUBLE_BIT, 1)).faults) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, 1.5, 1e300, 4096])
def test_what_cannot_be_is_refused_and_changes_nothing(value: float) -> None:
    history = ReadingHistory()
    look(history, (LAST_XID, 0))
    found = look(history, (LAST_XID, value))
    assert found.faults == []
    assert len(found.lies) == 1
    assert look(history, (LAST_XID, 31)).faults == [xid_fault(GPU, 31)]


def test_a_count_without_its_xid_is_a_lie() -> None:
    history = ReadingHistory()
    look(history, (LAST_XID, 0))
    assert "has no XID" in look(history, (XID_COUNT, 1)).lies[0]


def test_more_gpus_than_a_node_has_are_left_out() -> None:
    history = ReadingHistory()
    found = history.look([Sample(f"GPU-{n}", LAST_XID, 0) for n in range(100)])
    assert len(found.lies) == 36


def test_a_gpu_whose_counts_are_gone_leaves_its_place_to_another() -> None:
    history = ReadingHistory()
    for begin in (0, 64):
        found = history.look([Sample(f"GPU-{begin + n}", XID_COUNT, 1, 31) for n in range(64)])
        assert len(found.lies) == begin, "they are gone once a reading was without them"
    assert history.look([Sample("GPU-200", XID_COUNT, 1, 31)]).lies == []


def test_the_longest_text_is_looked_at_in_time_that_grows_with_it() -> None:
    many = [Sample(f"GPU-{n % 64}", XID_COUNT, 1, 1 + n // 64) for n in range(20_000)]
    history = ReadingHistory()
    look(history, (LAST_XID, 0))
    began_s = time.process_time()
    assert len(history.look(many).faults) == len(many)
    assert time.process_time() - began_s < 2


def test_a_fault_is_a_value() -> None:
    assert xid_fault(GPU, 79) == Fault(GPU, "XID 79", Remedy.REPLACE_NODE)
