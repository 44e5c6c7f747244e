"""Pieces of a replica's life: they follow one another and add up, hour by hour."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from serve_app.core.attribution import Account, ReplicaTime, ReplicaUse, StepCoefficients, Use
from serve_app.core.calendar import HOUR_NS, HOUR_S
from serve_app.core.periods import Period, Periods
from serve_app.core.types import Outcome, TenantId

START_S = 1_767_225_600
BORN_NS = 5_000_000_000


def test_pieces_of_a_random_life_have_no_gap_and_hold_what_ended_in_their_hour() -> None:
    chance = random.Random(7)
    life = ReplicaTime(BORN_NS)
    now_ns = BORN_NS + 9_000_000_000
    life.ready(now_ns)
    wall_ns = START_S * 10**9 + HOUR_NS - 20_000_000_000
    periods = Periods(wall_ns, life.read(now_ns))
    pieces: list[Period] = []
    ended: dict[int, int] = {}
    waiting = []
    for _ in range(400):
        if chance.random() < 0.5:
            now_ns += chance.randrange(10**9)
            life.vacant(now_ns)
        life.occupied(now_ns)
        waiting.append(life_account())
        start_ns, now_ns = now_ns, now_ns + chance.randrange(1, 3 * 10**9)
        own = {account: chance.randrange(1, 1000) for account in waiting}
        life.step(start_ns, now_ns, own, StepCoefficients())
        if chance.random() < 0.7:
            account = waiting.pop(chance.randrange(len(waiting)))
            life.close(account, chance.choice(tuple(Outcome)))
            ended[periods.hour] = ended.get(periods.hour, 0) + account.engine_ns
        if chance.random() < 0.2:
            pieces += periods.cut(life.read(now_ns))
    pieces += periods.cut(life.read(now_ns))
    assert [piece.number for piece in pieces] == list(range(1, len(pieces) + 1))
    assert pieces[0].from_ns == wall_ns - 9_000_000_000
    assert all(a.until_ns == b.from_ns for a, b in pairwise(pieces))
    assert all(sum(piece.uses_ns.values()) == piece.until_ns - piece.from_ns for piece in pieces)
    assert pieces[-1].until_ns - pieces[0].from_ns == now_ns - BORN_NS
    for hour in {piece.hour for piece in pieces}:
        uses = (Use.USEFUL, Use.CANCELLED, Use.FAILED)
        booked = sum(
            piece.uses_ns.get(use, 0) for piece in pieces if piece.hour == hour for use in uses
        )
        assert booked == ended.get(hour, 0)
    assert len({piece.hour for piece in pieces}) == 2
    assert sum(piece.provisional_ns for piece in pieces) == life.read(now_ns).provisional_ns > 0


def test_a_piece_says_how_much_of_it_defaults_split_and_forgets_that_with_the_fit() -> None:
    life = ReplicaTime(0)
    life.ready(0)
    periods = Periods(START_S * 10**9, life.read(0))
    life.occupied(0)
    life.step(0, 30, {life_account(): 1}, StepCoefficients())
    (first,) = periods.cut(life.read(30))
    life.step(30, 100, {life_account(): 1}, StepCoefficients(provisional=False))
    (second,) = periods.cut(life.read(100))
    assert (first.provisional_ns, second.provisional_ns) == (30, 0)


def life_account() -> Account:
    return Account(TenantId("acme"))


def test_an_account_ends_with_its_hour_and_begins_where_the_last_one_ended() -> None:
    life = ReplicaTime(0)
    life.ready(0)
    wall_ns = START_S * 10**9 + 1_000_000_000
    periods = Periods(wall_ns, life.read(0))
    assert periods.hour == START_S
    assert periods.until_next_hour_s() == 3599
    assert periods.cut(life.read(0)) == []
    # The timer is 30 ms late: what it finds is still the hour's that began it.
    late_ns = 3599 * 10**9 + 30_000_000
    (first,) = periods.cut(life.read(late_ns))
    assert (first.hour, first.uses_ns) == (START_S, {Use.IDLE: late_ns})
    assert periods.hour == START_S + HOUR_S
    (second,) = periods.cut(life.read(late_ns + 5))
    assert (second.number, second.hour, second.from_ns) == (2, START_S + HOUR_S, first.until_ns)


@pytest.mark.parametrize("after_s", [40, 0])
def test_a_start_over_two_hours_is_on_the_account_of_each(after_s: int) -> None:
    life = ReplicaTime(0)
    started_ns = HOUR_NS + 90 * 10**9
    life.ready(started_ns)
    now_ns = started_ns + after_s * 10**9
    # Born 60 s before an hour, ready 30 s after the next.
    wall_ns = START_S * 10**9 - 60 * 10**9 + now_ns
    periods = Periods(wall_ns, life.read(now_ns))
    assert periods.hour == START_S - HOUR_S
    pieces = periods.cut(life.read(now_ns))
    assert [(each.number, each.hour) for each in pieces] == [
        *((1, START_S - HOUR_S), (2, START_S)),
        (3, START_S + HOUR_S),
    ]
    starts = [each.uses_ns[Use.START_UP] for each in pieces]
    assert starts == [60 * 10**9, HOUR_NS, 30 * 10**9]
    assert pieces[-1].uses_ns.get(Use.IDLE, 0) == after_s * 10**9
    assert all(sum(each.uses_ns.values()) == each.until_ns - each.from_ns for each in pieces)
    assert all(a.until_ns == b.from_ns for a, b in pairwise(pieces))
    assert all(each.from_ns // HOUR_NS * HOUR_S == each.hour for each in pieces)
    assert periods.hour == START_S + HOUR_S
    (later,) = periods.cut(life.read(now_ns + 5))
    assert (later.number, later.uses_ns) == (4, {Use.IDLE: 5})


def test_a_start_that_ends_with_the_hour_leaves_nothing_to_the_next() -> None:
    life = ReplicaTime(0)
    life.ready(60 * 10**9)
    periods = Periods(START_S * 10**9, life.read(60 * 10**9))
    (piece,) = periods.cut(life.read(60 * 10**9))
    assert (piece.hour, piece.uses_ns) == (START_S - HOUR_S, {Use.START_UP: 60 * 10**9})
    (idle,) = periods.cut(life.read(61 * 10**9))
    assert (idle.hour, idle.uses_ns) == (START_S, {Use.IDLE: 10**9})


def test_time_of_which_nothing_is_known_is_on_the_account_of_its_hour() -> None:
    lived_ns = 100 * 10**9
    use = ReplicaUse(lived_ns, {Use.UNATTRIBUTED: lived_ns})
    periods = Periods(START_S * 10**9 + 30 * 10**9, use)
    pieces = periods.cut(use)
    assert [(each.hour, each.uses_ns) for each in pieces] == [
        (START_S - HOUR_S, {Use.UNATTRIBUTED: 70 * 10**9}),
        (START_S, {Use.UNATTRIBUTED: 30 * 10**9}),
    ]
