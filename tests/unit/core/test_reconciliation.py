"""Charges against bills: gaps found and named, nonsense not taken for money."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.calendar import HOUR_NS
from serve_app.core.reconciliation import (
    Finding,
    NodeBill,
    NodeCharge,
    Rate,
    cost_nanousd,
    over_hours,
    reconcile,
)

DOLLAR = 10**9
GPU_HOUR = Fraction(1)


def test_an_injected_gap_of_three_percent_is_found_named_and_alerted() -> None:
    charges = [NodeCharge("a", 60 * DOLLAR, 37 * DOLLAR, 1), NodeCharge("b", DOLLAR, 0, 1)]
    bills = [NodeBill("a", 100 * DOLLAR, GPU_HOUR), NodeBill("b", DOLLAR, GPU_HOUR)]
    found = reconcile(charges, bills)
    assert found.alert
    assert [(each.node, each.finding) for each in found.nodes] == [
        ("a", Finding.GAP),
        ("b", Finding.AGREES),
    ]
    assert found.nodes[0].gap_ratio == Fraction(3, 100)
    assert found.gap_nanousd == 3 * DOLLAR
    assert found.gap_ratio == Fraction(3, 101)


def test_gaps_of_two_nodes_that_cancel_out_are_alerted_all_the_same() -> None:
    charges = [NodeCharge("a", 95, 0), NodeCharge("b", 105, 0)]
    found = reconcile(charges, [NodeBill("a", 100), NodeBill("b", 100)])
    assert found.gap_nanousd == 0
    assert found.alert


def test_a_gap_at_the_threshold_is_none_and_too_large_a_charge_is_one() -> None:
    assert not reconcile([NodeCharge("a", 99, 0)], [NodeBill("a", 100)]).alert
    assert reconcile([NodeCharge("a", 102, 0)], [NodeBill("a", 100)]).alert


def test_two_clocks_five_seconds_apart_raise_no_alarm() -> None:
    hour = 4 * DOLLAR
    late = hour * 5 // 3600
    assert not reconcile([NodeCharge("a", hour - late, 0)], [NodeBill("a", hour)]).alert


def test_a_bill_that_says_nothing_is_no_bill_of_zero() -> None:
    missing = reconcile([NodeCharge("a", 5, 5)], [])
    null = reconcile([NodeCharge("a", 5, 5)], [NodeBill("a", None)])
    assert missing == null
    (node,) = null.nodes
    assert (node.finding, node.gap_nanousd, null.gap_ratio) == (Finding.NO_BILL, None, None)
    assert null.alert


def test_a_free_node_a_node_without_its_gpu_and_a_strange_one_are_named() -> None:
    charges = [NodeCharge("free", 5, 0), NodeCharge("gpu", 100, 0, gpus=1)]
    bills = [NodeBill("free", 0), NodeBill("gpu", 100, Fraction(0)), NodeBill("strange", 7)]
    found = {each.node: each.finding for each in reconcile(charges, bills).nodes}
    assert found == {
        "free": Finding.FREE,
        "gpu": Finding.NO_GPU,
        "strange": Finding.UNKNOWN_NODE,
    }
    assert not reconcile([], [NodeBill("strange", 7)]).alert


def test_replicas_of_one_node_add_up_and_so_do_parts_of_its_bill() -> None:
    found = reconcile(
        [NodeCharge("a", 30, 10, 1), NodeCharge("a", 50, 10, 1)],
        [NodeBill("a", 60, GPU_HOUR), NodeBill("a", 40, GPU_HOUR)],
    )
    assert [each.finding for each in found.nodes] == [Finding.AGREES]
    assert reconcile([NodeCharge("a", 1, 0)], [NodeBill("a", 1), NodeBill("a", None)]).alert


def test_a_price_that_changes_inside_an_hour_counts_from_then_on() -> None:
    half = HOUR_NS // 2
    rates = [Rate(0, 2 * DOLLAR), Rate(half, 6 * DOLLAR)]
    assert cost_nanousd(rates, 0, HOUR_NS) == 4 * DOLLAR
    assert cost_nanousd(rates, half, HOUR_NS) == 3 * DOLLAR
    assert cost_nanousd([Rate(half, 2 * DOLLAR)], 0, HOUR_NS) == DOLLAR
    assert cost_nanousd([], 0, HOUR_NS) == 0


def test_the_worst_hour_of_a_node_is_its_day_whichever_came_last() -> None:
    charge = NodeCharge("a", 100, 0, gpus=1)
    good = reconcile([charge], [NodeBill("a", 100, GPU_HOUR)])
    wide = reconcile([charge], [NodeBill("a", 110, GPU_HOUR)])
    cases = {
        Finding.NO_GPU: reconcile([charge], [NodeBill("a", 100, Fraction(0))]),
        Finding.FREE: reconcile([charge], [NodeBill("a", 0, GPU_HOUR)]),
        Finding.NO_BILL: reconcile([charge], []),
        Finding.NO_PRICE: reconcile([replace(charge, unpriced=True)], [NodeBill("a", 100)]),
        Finding.AGREES: reconcile([], [NodeBill("a", 7)]),
    }
    for worst, hour in cases.items():
        for hours in ([hour, good], [good, hour], [good, hour, good]):
            whole = over_hours(hours, alert_ratio=Fraction(1))
            assert [each.finding for each in whole.nodes] == [worst]
            assert whole.alert == worst.alarms
    assert over_hours([wide, cases[Finding.NO_BILL]]).nodes[0].finding is Finding.GAP
    assert over_hours([wide, cases[Finding.NO_GPU]]).nodes[0].finding is Finding.NO_GPU
    low = reconcile([charge], [NodeBill("a", 90, GPU_HOUR)])
    assert over_hours([wide, low]).nodes[0].finding is Finding.AGREES
    assert over_hours([wide, good]).nodes[0].gap_ratio == Fraction(10, 210)


@given(
    st.lists(st.integers(0, 10**13), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 10**13), st.integers(0, 10**12)), max_size=4),
)
def test_stretches_of_time_cost_what_the_whole_does(
    cuts: list[int], changes: list[tuple[int, int]]
) -> None:
    rates = [Rate(*each) for each in sorted(changes)]
    cuts.sort()
    parts = [cost_nanousd(rates, a, b) for a, b in pairwise(cuts)]
    assert sum(parts) == cost_nanousd(rates, cuts[0], cuts[-1])
    assert all(part >= 0 for part in parts)
