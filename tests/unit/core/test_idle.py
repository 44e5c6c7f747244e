"""Idle time over tenants: exactly all of it, by the weights, and never without being asked."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.idle import IdlePolicy, share_idle
from serve_app.core.types import TenantId

AMOUNTS = st.integers(0, 10**18)
WEIGHTS = st.dictionaries(
    st.text("abcd", min_size=1, max_size=3).map(TenantId), st.integers(0, 10**15), max_size=12
)
ACME, GLOBEX, HOOLI = TenantId("acme"), TenantId("globex"), TenantId("hooli")


@given(AMOUNTS, st.sampled_from(IdlePolicy), WEIGHTS, WEIGHTS)
def test_the_shares_are_all_of_the_idle_time(
    amount: int, policy: IdlePolicy, used: dict[TenantId, int], reserved: dict[TenantId, int]
) -> None:
    shares = share_idle(amount, policy, used=used, reserved=reserved)
    assert sum(shares.tenants.values()) + shares.unallocated == amount
    assert min(shares.tenants.values(), default=0) >= 0
    assert shares.unallocated in (0, amount)


@given(AMOUNTS, st.sampled_from([IdlePolicy.BY_USE, IdlePolicy.BY_RESERVATION]), WEIGHTS)
def test_every_share_is_within_one_of_its_exact_value(
    amount: int, policy: IdlePolicy, weights: dict[TenantId, int]
) -> None:
    by_use = policy is IdlePolicy.BY_USE
    shares = share_idle(
        amount, policy, used=weights if by_use else {}, reserved={} if by_use else weights
    )
    whole = sum(weights.values())
    assert set(shares.tenants) == {tenant for tenant, weight in weights.items() if weight}
    for tenant, share in shares.tenants.items():
        assert abs(share - Fraction(amount * weights[tenant], whole)) < 1


@given(AMOUNTS, WEIGHTS)
def test_the_order_of_tenants_changes_nothing(amount: int, used: dict[TenantId, int]) -> None:
    backwards = dict(reversed(used.items()))
    one = share_idle(amount, IdlePolicy.BY_USE, used=used, reserved={})
    other = share_idle(amount, IdlePolicy.BY_USE, used=backwards, reserved={})
    assert one == other


def test_each_policy_looks_at_its_own_weights() -> None:
    used, reserved = {ACME: 3, GLOBEX: 1}, {HOOLI: 1, GLOBEX: 1}

    def shared(policy: IdlePolicy) -> dict[TenantId, int]:
        return dict(share_idle(800, policy, used=used, reserved=reserved).tenants)

    assert shared(IdlePolicy.UNALLOCATED) == {}
    assert shared(IdlePolicy.BY_USE) == {ACME: 600, GLOBEX: 200}
    assert shared(IdlePolicy.BY_RESERVATION) == {GLOBEX: 400, HOOLI: 400}


def test_an_hour_without_a_request_stays_the_platforms() -> None:
    shares = share_idle(7, IdlePolicy.BY_USE, used={ACME: 0}, reserved={ACME: 5})
    assert (dict(shares.tenants), shares.unallocated) == ({}, 7)
