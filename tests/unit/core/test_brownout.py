"""The brownout ladder: when it steps, what each rung does, and that it never flaps."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.brownout import Ladder
from serve_app.core.policy import BrownoutPolicy
from tests.properties import examples

CALM = (0.0, 0.0)


@pytest.mark.parametrize(
    ("kv_usage_ratio", "rung"),
    [(0.84, 0), (0.85, 1), (0.89, 1), (0.90, 2), (0.95, 3), (0.96, 3), (0.97, 4), (1.0, 4)],
)
def test_kv_use_climbs_at_once_to_its_rung(kv_usage_ratio: float, rung: int) -> None:
    ladder = Ladder(BrownoutPolicy())
    assert ladder.update(kv_usage_ratio, CALM, 0.0) == (rung or None)
    assert ladder.rung == rung


def test_full_standard_queue_never_sheds_standard_itself() -> None:
    ladder = Ladder(BrownoutPolicy())
    ladder.update(0.0, (0.0, 1.0), 0.0)
    assert ladder.rung == 3
    ladder.update(0.0, (1.0, 1.0), 1.0)
    assert ladder.rung == 4


def test_preemption_storm_leaves_critical_only_until_it_is_over() -> None:
    ladder = Ladder(BrownoutPolicy(storm_preemptions_per_s=2.0, stable_s=10.0))
    ladder.preempted(100, 8, 0.0)
    assert ladder.update(0.5, CALM, 0.0) == 4
    assert ladder.sheds_standard
    now_s = 0.0
    while ladder.rung == 4:
        now_s += 0.5
        ladder.update(0.5, CALM, now_s)
    assert now_s >= 10.0


def test_steps_down_one_rung_per_stable_interval() -> None:
    ladder = Ladder(BrownoutPolicy(stable_s=10.0))
    ladder.update(0.99, CALM, 0.0)
    changes = []
    for tenth in range(1, 600):
        rung = ladder.update(0.1, CALM, tenth / 10)
        if rung is not None:
            changes.append((tenth / 10, rung))
    assert [rung for _, rung in changes] == [3, 2, 1, 0]
    times = [0.1, *(time_s for time_s, _ in changes)]
    assert all(b - a >= 10.0 - 1e-6 for a, b in pairwise(times))


def test_just_below_the_threshold_is_not_stable() -> None:
    ladder = Ladder(BrownoutPolicy(stable_s=10.0, hysteresis_ratio=0.05))
    ladder.update(0.86, CALM, 0.0)
    for second in range(1, 100):
        assert ladder.update(0.81, CALM, float(second)) is None
    assert ladder.rung == 1


def test_each_rung_acts_only_if_its_switch_is_on() -> None:
    switches = {
        "shed_sheddable": "sheds_sheddable",
        "cap_output": "caps_output",
        "use_fallback": "uses_fallback",
        "critical_only": "sheds_standard",
    }
    for switch, action in switches.items():
        on, off = Ladder(BrownoutPolicy()), Ladder(replace(BrownoutPolicy(), **{switch: False}))
        for ladder in (on, off):
            ladder.update(1.0, CALM, 0.0)
        assert getattr(on, action)
        assert not getattr(off, action)
        others = [each for each in switches.values() if each != action]
        assert all(getattr(off, each) for each in others)


@examples(200)
@given(
    loads=st.lists(
        st.tuples(
            st.floats(0.0, 3.0), st.floats(0.0, 1.2), st.floats(0.0, 1.0), st.integers(0, 60)
        ),
        max_size=120,
    )
)
def test_never_steps_down_faster_than_its_interval(
    loads: list[tuple[float, float, float, int]],
) -> None:
    policy = BrownoutPolicy(stable_s=4.0)
    ladder, now_s, changed_s = Ladder(policy), 0.0, -100.0
    for elapsed_s, kv_usage_ratio, queue_ratio, preemptions in loads:
        now_s += elapsed_s
        before = ladder.rung
        ladder.preempted(preemptions, 4, now_s)
        changed = ladder.update(kv_usage_ratio, (queue_ratio, 0.0), now_s)
        assert (changed is None) == (ladder.rung == before)
        assert 0 <= ladder.rung <= 4
        if ladder.rung < before:
            assert ladder.rung == before - 1
            assert now_s - changed_s >= policy.stable_s
        if ladder.rung != before:
            changed_s = now_s
