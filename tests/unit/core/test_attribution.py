"""A step's time over its requests, and a replica's life over its uses."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations
from math import factorial

from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.attribution import (
    Account,
    ReplicaTime,
    StepCoefficients,
    Use,
    shares_ns,
)
from serve_app.core.types import Outcome, TenantId
from tests.properties import examples

BY = StepCoefficients(1000, 10, 5, 1, provisional=False)
OWN = st.lists(st.integers(0, 10**7), min_size=1, max_size=7)


def account(tenant: str = "acme") -> Account:
    return Account(TenantId(tenant))


def shapley(duration_ns: int, own_ps: list[int], step_ps: int) -> list[Fraction]:
    """Every order of arrival, the slow way: what each adds to those before it, averaged."""
    full = sum(own_ps) + step_ps
    if not full:
        return [Fraction(duration_ns, len(own_ps))] * len(own_ps)
    values = [0] * len(own_ps)
    for order in permutations(range(len(own_ps))):
        values[order[0]] += step_ps
        for player in order:
            values[player] += own_ps[player]
    return [Fraction(value * duration_ns, full * factorial(len(own_ps))) for value in values]


def subset_shapley(duration_ns: int, own_ps: list[int], step_ps: int) -> list[Fraction]:
    """The subset formula, for sizes where orders are too many."""
    n, full = len(own_ps), sum(own_ps) + step_ps

    def worth(members: int) -> int:
        inside = [own for i, own in enumerate(own_ps) if members >> i & 1]
        return sum(inside) + step_ps if inside else 0

    values = []
    for player in range(n):
        total = Fraction(0)
        for members in range(1 << n):
            if members >> player & 1:
                continue
            size = members.bit_count()
            weight = Fraction(factorial(size) * factorial(n - size - 1), factorial(n))
            total += weight * (worth(members | 1 << player) - worth(members))
        values.append(total * duration_ns / full)
    return values


@examples(60)
@given(st.integers(0, 10**10), OWN.filter(lambda own: len(own) <= 5), st.integers(0, 10**8))
def test_shares_are_the_shapley_value_over_every_order_of_arrival(
    duration_ns: int, own_ps: list[int], step_ps: int
) -> None:
    shares = shares_ns(duration_ns, own_ps, step_ps)
    exact = shapley(duration_ns, own_ps, step_ps)
    assert all(abs(share - value) < 1 for share, value in zip(shares, exact, strict=True))


@examples(15)
@given(
    st.integers(1, 10**10),
    st.lists(st.integers(0, 10**7), min_size=6, max_size=8),
    st.integers(1, 10**8),
)
def test_shares_are_the_shapley_value_of_up_to_eight_requests(
    duration_ns: int, own_ps: list[int], step_ps: int
) -> None:
    shares = shares_ns(duration_ns, own_ps, step_ps)
    exact = subset_shapley(duration_ns, own_ps, step_ps)
    assert all(abs(share - value) < 1 for share, value in zip(shares, exact, strict=True))


@given(
    st.integers(0, 10**12),
    st.lists(st.integers(0, 10**12), min_size=1, max_size=300),
    st.integers(0, 10**11),
)
def test_shares_sum_to_the_step_and_none_is_negative(
    duration_ns: int, own_ps: list[int], step_ps: int
) -> None:
    shares = shares_ns(duration_ns, own_ps, step_ps)
    assert sum(shares) == duration_ns
    assert min(shares) >= 0


def test_a_step_that_nothing_explains_is_split_evenly() -> None:
    assert shares_ns(9, [0, 0, 0], 0) == [3, 3, 3]


def test_the_own_term_counts_prefill_decoding_and_context() -> None:
    assert BY.own_ps(3, 2, 7) == 30 + 10 + 7


# ---- a replica's life --------------------------------------------------------------


def test_each_stretch_of_a_life_is_what_it_was() -> None:
    time = ReplicaTime(100)
    time.ready(150)
    time.occupied(180)
    done, left, broke = account(), account(), account()
    time.step(185, 215, {done: 100, left: 100}, BY)
    time.step(215, 225, {broke: 10}, BY)
    time.close(done, Outcome.COMPLETED)
    time.close(left, Outcome.CANCELLED)
    time.close(broke, Outcome.FAILED)
    time.vacant(225)
    time.drain(300)
    uses = time.read(310)
    assert uses.lifetime_ns == 210
    assert uses.uses == {
        Use.START_UP: 50,
        Use.IDLE: 30 + 75,
        Use.UNATTRIBUTED: 5,
        Use.USEFUL: 15,
        Use.CANCELLED: 15,
        Use.FAILED: 10,
        Use.PREEMPTED: 0,
        Use.DRAIN: 10,
        Use.OPEN: 0,
    }


def test_work_done_again_is_the_preemptions_and_the_rest_the_requests() -> None:
    time = ReplicaTime(0)
    time.ready(0)
    time.occupied(0)
    one = account()
    time.step(0, 80, {one: 400}, BY, recomputed_ps={one: 100})
    assert time.read(80).uses[Use.OPEN] == 80
    time.close(one, Outcome.COMPLETED)
    uses = time.read(80).uses
    assert (uses[Use.PREEMPTED], uses[Use.USEFUL]) == (20, 60)
    assert one.engine_ns == 80


def test_the_step_under_way_when_a_request_left_is_still_its_and_not_idle() -> None:
    time = ReplicaTime(0)
    time.ready(0)
    time.occupied(0)
    one = account()
    time.close(one, Outcome.CANCELLED)
    time.step(0, 70, {one: 1}, BY)
    time.vacant(70)
    use = time.read(100)
    assert (use.uses[Use.CANCELLED], use.uses[Use.IDLE]) == (70, 30)
    assert use.late_ns == one.late_ns == 70
    assert one.engine_ns == 70


def test_work_without_a_known_step_is_unattributed_and_never_idle() -> None:
    time = ReplicaTime(0)
    time.ready(0)
    time.occupied(10)
    time.vacant(50)
    uses = time.read(60).uses
    assert (uses[Use.UNATTRIBUTED], uses[Use.IDLE]) == (40, 20)


def test_a_replica_that_drains_is_never_idle_again() -> None:
    time = ReplicaTime(0)
    time.ready(0)
    time.occupied(10)
    time.drain(20)
    time.step(10, 30, {account(): 1}, BY)
    time.vacant(30)
    uses = time.read(50).uses
    assert (uses[Use.OPEN], uses[Use.DRAIN], uses[Use.IDLE]) == (20, 20, 10)


def test_an_empty_step_and_a_backward_clock_break_no_sum() -> None:
    time = ReplicaTime(100)
    time.ready(90)
    time.occupied(120)
    time.step(110, 130, {}, BY)
    time.step(125, 128, {account(): 1}, BY)
    use = time.read(50)
    assert use.lifetime_ns == sum(use.uses.values()) == 30
    assert use.uses[Use.UNATTRIBUTED] == 10


def test_time_split_by_defaults_is_marked() -> None:
    time = ReplicaTime(0)
    time.ready(0)
    time.occupied(0)
    time.step(0, 30, {account(): 1}, StepCoefficients())
    time.step(30, 50, {account(): 1}, BY)
    assert time.read(50).provisional_ns == 30


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["ready", "drain", "occupied", "vacant", "step", "close", "read"]),
        st.integers(-5, 50),
        st.integers(0, 50),
        st.integers(0, 3),
    ),
    max_size=60,
)


@examples(150)
@given(EVENTS)
def test_the_uses_of_a_life_sum_to_it_whatever_is_said_of_it(
    events: list[tuple[str, int, int, int]],
) -> None:
    time = ReplicaTime(0)
    accounts = [account() for _ in range(4)]
    now_ns = lifetime_ns = 0
    for what, wait_ns, duration_ns, number in events:
        now_ns += wait_ns
        if what == "step":
            own_ps = {each: 5 * i + 1 for i, each in enumerate(accounts[:number])}
            again_ps = {each: 2 * i for i, each in enumerate(accounts[:number]) if i}
            time.step(now_ns, now_ns + duration_ns, own_ps, BY, recomputed_ps=again_ps)
        elif what == "close":
            if accounts[number].use is Use.OPEN:
                time.close(accounts[number], Outcome.COMPLETED)
        elif what != "read":
            getattr(time, what)(now_ns)
        use = time.read(now_ns)
        assert sum(use.uses.values()) == use.lifetime_ns >= lifetime_ns
        assert min(use.uses.values()) >= 0
        lifetime_ns = use.lifetime_ns
    requests = (Use.OPEN, Use.USEFUL, Use.PREEMPTED)
    uses = time.read(now_ns).uses
    assert sum(each.engine_ns for each in accounts) == sum(uses[each] for each in requests)
