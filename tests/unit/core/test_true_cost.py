"""What a replica-hour cost, split over what its time went to: to the nano-dollar."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.attribution import Use
from serve_app.core.calendar import HOUR_NS, NS_PER_S
from serve_app.core.reconciliation import NodeBill, Rate, cost_nanousd
from serve_app.core.true_cost import (
    InstancePrice,
    NodePrices,
    Overhead,
    Part,
    ReplicaHour,
    split,
    split_hour,
)

START_S = 1_767_225_600
START_NS = START_S * NS_PER_S
DOLLAR = NS_PER_S


def hour(lasted_ns: int = HOUR_NS, gpus: float = 1.0, **uses_ns: int) -> ReplicaHour:
    uses = {Use(name): time_ns for name, time_ns in uses_ns.items()}
    end_ns = START_NS + lasted_ns
    return ReplicaHour(START_S, "r1", "pool", "gpu-1", "h100", gpus, START_NS, end_ns, uses)


def priced(*rates: tuple[int, int], per_gpu: bool = False) -> NodePrices:
    listed = tuple(Rate(START_NS + from_ns, hourly) for from_ns, hourly in rates)
    return NodePrices({"h100": InstancePrice(listed, per_gpu)})


def part(parts: tuple[Part, ...], key: object) -> Part:
    return next(each for each in parts if each.key == key)


@given(
    st.integers(0, 10**15),
    st.lists(st.integers(0, 10**13), min_size=1, max_size=20),
    st.integers(0, 19),
)
def test_a_split_sums_to_its_amount_and_each_part_is_its_share_to_the_unit(
    amount: int, weights: list[int], negative: int
) -> None:
    # What an hour took over as open counts against it, and is less than the whole.
    place = negative % len(weights)
    weights[place] = -(sum(weights) // 3)
    parts = split(amount, weights)
    assert sum(parts) == amount
    whole = sum(weights)
    if whole:
        shares = [Fraction(amount * weight, whole) for weight in weights]
        assert all(abs(got - share) < 1 for got, share in zip(parts, shares, strict=True))


def test_requests_idle_and_waste_are_what_the_hour_cost_whatever_the_price() -> None:
    chance = random.Random(3)
    for _ in range(300):
        requests = [((f"t{n}",), chance.randrange(1, 10**11)) for n in range(chance.randrange(9))]
        ended = sum(time_ns for _, time_ns in requests) + chance.randrange(10**9)
        uses = {"useful": ended, "idle": chance.randrange(10**12), "open": -(ended // 7)}
        account = hour(sum(uses.values()), **uses)
        prices = priced((-HOUR_NS, chance.randrange(50 * DOLLAR)), (10**9, 3), (10**10, 7 * DOLLAR))
        found = split_hour(account, requests, prices)
        rates = prices.instances["h100"].rates
        assert found.cost_nanousd == cost_nanousd(rates, account.from_ns, account.until_ns)
        assert sum(each.cost_nanousd or 0 for each in found.parts) == found.cost_nanousd
        assert sum(each.time_ns for each in found.parts) == found.lasted_ns
        assert found.lasted_ns == account.until_ns - account.from_ns


def test_what_defaults_split_is_marked_on_requests_time_and_on_nothing_else() -> None:
    chance = random.Random(5)
    for _ in range(300):
        requests = [((f"t{n}",), chance.randrange(1, 10**11)) for n in range(chance.randrange(9))]
        ended = sum(time_ns for _, time_ns in requests) + chance.randrange(10**9)
        still_open = chance.choice((-(ended // 7), 0, chance.randrange(10**10)))
        uses = {"useful": ended, "idle": chance.randrange(10**12), "open": still_open}
        marked = chance.randrange(ended + still_open + 1)
        account = replace(hour(sum(uses.values()), **uses), provisional_ns=marked)
        parts = split_hour(account, requests, NodePrices()).parts
        assert sum(each.provisional_ns for each in parts) == marked
        assert all(0 <= each.provisional_ns <= max(0, each.time_ns) + 1 for each in parts)
        assert part(parts, Overhead.IDLE).provisional_ns == 0


def test_time_that_is_in_no_record_of_a_request_has_a_row_of_its_own() -> None:
    account = hour(HOUR_NS, useful=HOUR_NS // 2, cancelled=HOUR_NS // 4, idle=HOUR_NS // 4)
    found = split_hour(account, [(("acme",), HOUR_NS // 2)], priced((0, 8 * DOLLAR)))
    assert part(found.parts, ("acme",)).cost_nanousd == 4 * DOLLAR
    assert part(found.parts, Overhead.CUT_OFF).cost_nanousd == 2 * DOLLAR
    assert part(found.parts, Overhead.IDLE).cost_nanousd == 2 * DOLLAR


def test_a_period_that_was_lost_between_others_was_lived_and_is_unattributed() -> None:
    found = split_hour(hour(HOUR_NS, idle=HOUR_NS // 2), (), priced((0, 8 * DOLLAR)))
    assert part(found.parts, Overhead.UNATTRIBUTED).time_ns == HOUR_NS // 2
    assert found.cost_nanousd == 8 * DOLLAR


def test_requests_prove_time_that_a_killed_replica_did_not_report() -> None:
    account = hour(HOUR_NS // 2, useful=HOUR_NS // 4, idle=HOUR_NS // 4)
    found = split_hour(account, [(("acme",), HOUR_NS // 2)], priced((0, 8 * DOLLAR)))
    assert found.lasted_ns == HOUR_NS * 3 // 4
    assert found.cost_nanousd == 6 * DOLLAR
    assert part(found.parts, ("acme",)).cost_nanousd == 4 * DOLLAR
    assert part(found.parts, Overhead.CUT_OFF).time_ns == 0


def test_a_price_that_changes_inside_the_hour_holds_from_then_on() -> None:
    prices = priced((-HOUR_NS, 4 * DOLLAR), (HOUR_NS // 4, 8 * DOLLAR))
    found = split_hour(hour(HOUR_NS, idle=HOUR_NS), (), prices)
    assert found.cost_nanousd == 7 * DOLLAR


@pytest.mark.parametrize(
    "prices",
    [NodePrices(), priced(), priced((HOUR_NS // 2, DOLLAR)), NodePrices({"l4": InstancePrice(())})],
    ids=["no list", "no rate", "from the middle of the hour", "another instance"],
)
def test_time_without_a_price_has_no_cost_and_is_not_free(prices: NodePrices) -> None:
    found = split_hour(hour(HOUR_NS, idle=HOUR_NS), [(("acme",), 5)], prices)
    assert found.cost_nanousd is None
    assert all(each.cost_nanousd is None for each in found.parts)
    assert sum(each.time_ns for each in found.parts) == found.lasted_ns


def test_a_price_of_zero_is_one() -> None:
    found = split_hour(hour(HOUR_NS, idle=HOUR_NS), (), priced((0, 0)))
    assert found.cost_nanousd == 0
    assert {each.cost_nanousd for each in found.parts} == {0}


@pytest.mark.parametrize(("gpus", "cost"), [(8.0, 20 * DOLLAR), (0.5, 1_250_000_000), (0.0, 0)])
def test_a_price_per_gpu_is_for_those_that_the_replica_holds(gpus: float, cost: int) -> None:
    prices = priced((0, 2_500_000_000), per_gpu=True)
    assert split_hour(hour(gpus=gpus, idle=HOUR_NS), (), prices).cost_nanousd == cost


def test_without_a_listed_price_a_replica_pays_its_gpus_part_of_the_nodes_bill() -> None:
    bill = NodeBill("gpu-1", 16 * DOLLAR, Fraction(8))
    prices = NodePrices(bills={(START_S, "gpu-1"): bill})
    half = hour(HOUR_NS // 2, 2.0, idle=HOUR_NS // 2)
    assert split_hour(half, (), prices).cost_nanousd == 2 * DOLLAR
    for useless in (
        NodeBill("gpu-1", None, Fraction(8)),
        NodeBill("gpu-1", DOLLAR, None),
        NodeBill("gpu-1", DOLLAR, Fraction(0)),
    ):
        prices = NodePrices(bills={(START_S, "gpu-1"): useless})
        assert split_hour(half, (), prices).cost_nanousd is None
    listed = NodePrices({"h100": InstancePrice((Rate(0, DOLLAR),))}, {(START_S, "gpu-1"): bill})
    assert split_hour(half, (), listed).cost_nanousd == DOLLAR // 2
