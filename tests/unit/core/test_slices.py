"""Limits shared by routers, step by step: what moves, when, and what is never believed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve_app.core.exchange import RouterId
from serve_app.core.holder import Holder
from serve_app.core.limits import (
    Granted,
    Limiter,
    LimitKind,
    Limits,
    Moved,
    Refused,
    Scope,
    ScopeKind,
    Short,
    SliceKey,
)
from serve_app.core.parts import WHOLE, split
from serve_app.core.slice_messages import Bell, Message, Recall, Reply, Want
from serve_app.core.slices import Granter
from serve_app.core.types import RequestId

A, B, C = (RouterId(name) for name in "abc")
RATE = SliceKey(ScopeKind.KEY, "k", LimitKind.REQUESTS)
SPENT = frozenset({RATE})
SLOTS = SliceKey(ScopeKind.KEY, "k", LimitKind.CONCURRENT)


class Desk:
    """A granter, and routers that send it bare messages."""

    def __init__(self, *routers: RouterId, **options: object) -> None:
        self.granter = Granter(1, 0.0, **options)  # type: ignore[arg-type]
        self.sequence = 0
        self.now_s = 0.0
        for router in routers:
            self.register(router)

    def register(self, router: RouterId, *claims: Moved) -> Reply:
        return self.send(router, claims=claims)

    def send(self, router: RouterId, **fields: object) -> Reply:
        session = self.granter._sessions.get(router)
        sequence = self.granter._sequences.get(router, 0) + 1
        assert session is None or session.sequence == sequence - 1
        message = Message(router, 1, sequence, **fields)  # type: ignore[arg-type]
        return self.granter.exchange(message, self.now_s)

    def want(self, router: RouterId, need: int, held: int = 0, key: SliceKey = RATE) -> Reply:
        return self.send(router, wants=(Want(key, need, held),))

    def parts(self, reply: Reply) -> list[tuple[int, int]]:
        return [(each.parts, each.fill) for each in reply.granted]


def test_what_is_granted_takes_its_fill_along() -> None:
    desk = Desk(A, B)
    desk.want(A, 5)
    desk.send(A, returned=(Moved(RATE, WHOLE // 2, WHOLE // 2),))
    [(parts, fill)] = desk.parts(desk.want(A, WHOLE // 4, held=0))
    assert (parts, fill) == (WHOLE // 2, WHOLE // 4)
    [(parts, fill)] = desk.parts(desk.want(B, WHOLE // 4))
    assert (parts, fill) == (WHOLE // 2, WHOLE // 4)


def test_one_router_gets_everything_and_the_first_of_two_its_half() -> None:
    desk = Desk(A)
    assert desk.parts(desk.want(A, 5)) == [(WHOLE, 0)]
    desk = Desk(A, B)
    assert desk.parts(desk.want(A, 5)) == [(WHOLE // 2, 0)]


def test_a_repeated_message_moves_its_parts_once_and_gets_the_same_answer() -> None:
    desk = Desk(A, B)
    first = desk.want(A, 5)
    again = desk.granter.exchange(Message(A, 1, first.sequence), 9.0)
    assert again is first
    returned = (Moved(RATE, WHOLE // 4, 0),)
    told = desk.send(A, returned=returned)
    desk.granter.exchange(Message(A, 1, told.sequence, returned), 1.0)
    assert desk.granter.held(RATE) == {A: WHOLE // 4}


def test_late_messages_of_before_are_not_taken() -> None:
    desk = Desk(A)
    desk.want(A, 5)
    late = desk.granter.exchange(Message(A, 1, 1, claims=()), 0.0)
    assert late.unknown
    assert desk.granter.held(RATE) == {A: WHOLE}
    desk.granter.heard(A, 0.0)
    desk.granter.expire(100.0, 30.0)
    assert desk.granter.exchange(Message(A, 1, 1, claims=()), 100.0).unknown, "dead, and late"


@pytest.mark.parametrize("epoch", [0, 2])
def test_messages_for_another_control_are_not_taken(epoch: int) -> None:
    desk = Desk(A)
    reply = desk.granter.exchange(Message(A, epoch, 2, wants=(Want(RATE, 5, 0),)), 0.0)
    assert reply.unknown
    assert desk.granter.held(RATE) == {}
    assert desk.granter.exchange(Message(B, epoch, 1, claims=()), 0.0).unknown


def test_what_the_rest_lacks_is_recalled_from_those_who_hold_it() -> None:
    desk = Desk(A)
    desk.want(A, 5)
    desk.register(B)
    pending = desk.want(B, 7)
    assert pending.pending == (RATE,)
    assert desk.granter.rung() == {A}
    [recall] = desk.granter.bell(A, 0.0).recalls
    assert (recall.key, recall.parts, recall.need) == (RATE, WHOLE // 2, 7)
    assert desk.granter.bell(A, 0.0) == Bell(1), "a hint is given once"
    desk.send(A, returned=(Moved(RATE, WHOLE // 2, 100),))
    assert desk.granter.rung() == {B}
    assert desk.granter.bell(B, 0.0).ready == (RATE,)
    assert desk.parts(desk.want(B, 7)) == [(WHOLE // 2, 100)]


def test_nothing_free_anywhere_is_a_denial_and_no_answer_is_not() -> None:
    desk = Desk(A)
    desk.want(A, 5)
    desk.register(B)
    assert desk.want(B, 7).pending
    desk.now_s = 0.25
    assert desk.want(B, 7).unsure == (RATE,)
    desk.send(A, returned=(Moved(RATE, 0, 0),), spent=SPENT)
    assert desk.want(B, 7).denied == (RATE,)
    desk.now_s = 2.0
    assert desk.want(B, 7).pending == (RATE,), "it is asked for again later"


def test_a_late_answer_to_less_is_no_answer_to_more() -> None:
    """Who gave all that was asked at first may have more, however much is asked since."""
    desk = Desk(A, B)
    half = WHOLE // 2
    desk.want(A, 1)
    desk.want(B, half)
    assert desk.want(B, 7, half).pending == (RATE,)
    desk.now_s = 1.0
    assert desk.want(B, 700, half).pending == (RATE,), "asked for again"
    desk.send(A, returned=(Moved(RATE, 7, 0),))
    assert desk.want(B, 700, half).pending == (RATE,)
    assert desk.granter.rung() == {A, B}


def test_who_was_empty_and_got_more_than_it_needs_is_asked_again() -> None:
    desk = Desk(A, B, C)
    third = WHOLE // 3
    for router in (A, B, C):
        desk.want(router, third)
    desk.want(B, 7, third)
    for router in (A, C):
        desk.send(router, returned=(Moved(RATE, 0, 0),), spent=SPENT)
    assert desk.want(B, 7, third).denied == (RATE,)
    desk.send(C, returned=(Moved(RATE, third, 0),), leaving=True)
    [(parts, _)] = desk.parts(desk.want(A, 1, third))
    assert parts > 1000
    assert desk.want(B, third, third).pending == (RATE,)


def test_a_router_that_gave_what_was_asked_may_be_asked_for_more_at_once() -> None:
    desk = Desk(A)
    desk.want(A, 5)
    desk.register(B)
    desk.register(C)
    desk.want(B, 7)
    desk.send(A, returned=(Moved(RATE, 7, 0),))
    desk.want(B, 7)
    assert desk.want(C, 7).pending == (RATE,)


def test_of_two_who_need_what_the_other_has_the_first_gets_it() -> None:
    desk = Desk(A, B)
    half, most = WHOLE // 2, WHOLE * 3 // 4
    desk.want(A, half)
    desk.want(B, half)
    assert desk.want(A, most - half, half).pending == (RATE,)
    second = desk.want(B, most - half, half)
    assert second.pending == (RATE,)
    assert second.bell is not None
    assert [each.key for each in second.bell.recalls] == [RATE]
    assert not desk.granter.bell(A, 0.0).recalls, "it waits itself, and came first"

    given = (Moved(RATE, half // 2, 0),)
    crossing = desk.send(B, returned=given, wants=(Want(RATE, half, half // 2),))
    assert crossing.granted == ()
    assert crossing.pending == (RATE,)
    assert desk.granter.bell(A, 0.0).ready == (RATE,)
    assert desk.parts(desk.want(A, half // 2, half)) == [(half // 2, 0)]

    assert desk.granter.bell(B, 0.0).ready == (RATE,), "now it is the other's turn"
    assert desk.want(B, half, half // 2).pending == (RATE,)
    desk.send(A, returned=(Moved(RATE, 0, 0),), spent=SPENT)
    assert desk.want(B, half, half // 2).denied == (RATE,)


def test_who_does_not_come_back_loses_its_turn() -> None:
    desk = Desk(A, B)
    half = WHOLE // 2
    desk.want(A, half)
    desk.want(B, half)
    desk.want(A, half // 2, half)
    desk.send(B, returned=(Moved(RATE, half // 2, 0),))
    assert desk.want(B, half // 2, half // 2).pending == (RATE,)
    desk.now_s = 0.6
    assert desk.parts(desk.want(B, half // 2, half // 2)) == [(half // 2, 0)]


def test_a_dead_routers_parts_come_back_full_and_drain() -> None:
    desk = Desk(A, B)
    desk.want(A, 5)
    desk.granter.heard(B, 31.0)
    assert desk.granter.expire(31.0, 30.0) == [A]
    desk.now_s = 31.0
    [(parts, fill)] = desk.parts(desk.want(B, WHOLE))
    assert parts == WHOLE
    assert fill == WHOLE // 2
    assert desk.granter.held(RATE) == {B: WHOLE}


def test_a_dead_routers_slots_are_free_at_once() -> None:
    desk = Desk(A, B)
    desk.want(A, 5, key=SLOTS)
    desk.granter.heard(B, 31.0)
    desk.granter.expire(31.0, 30.0)
    desk.now_s = 31.0
    assert desk.parts(desk.want(B, WHOLE, key=SLOTS)) == [(WHOLE, 0)]


def test_a_new_control_waits_for_all_who_may_hold_something() -> None:
    desk = Desk(awaited=[A, B])
    desk.register(A, Moved(RATE, WHOLE // 4, 0))
    assert desk.granter.recovering
    assert desk.want(A, 5, WHOLE // 4).pending == (RATE,)
    desk.register(B, Moved(RATE, WHOLE // 2, 0))
    assert not desk.granter.recovering
    assert desk.granter.bell(A, 0.0).ready == (RATE,)
    reply = desk.want(A, WHOLE, WHOLE // 4)
    assert desk.parts(reply) == [(WHOLE // 4, WHOLE // 4)], "nobody knows who used the rest"


def test_a_limit_nobody_used_is_fresh_after_a_restart_unless_a_router_was_lost() -> None:
    desk = Desk(awaited=[A])
    desk.register(A)
    assert desk.parts(desk.want(A, 5)) == [(WHOLE, 0)]
    lost = Desk(awaited=[A, B])
    lost.register(A)
    lost.granter.heard(A, 31.0)
    lost.granter.expire(31.0, 30.0)
    lost.now_s = 46.0
    assert lost.parts(lost.want(A, WHOLE)) == [(WHOLE, WHOLE * 3 // 4)]
    doubtful = Desk(A, doubtful=True)
    doubtful.now_s = 30.0
    assert doubtful.parts(doubtful.want(A, WHOLE)) == [(WHOLE, WHOLE // 2)]


def test_claims_that_went_elsewhere_are_cut() -> None:
    desk = Desk(A)
    desk.want(A, 5)
    reply = desk.register(B, Moved(RATE, WHOLE // 2, 0))
    assert reply.cuts == (Moved(RATE, 0, 0),)
    assert desk.granter.held(RATE) == {A: WHOLE}


def test_parts_that_a_router_lost_come_back_when_it_asks() -> None:
    desk = Desk(A)
    desk.want(A, 5)
    [(parts, fill)] = desk.parts(desk.want(A, 5, held=0))
    assert (parts, fill) == (WHOLE, WHOLE)


def test_what_nobody_holds_wants_or_used_is_forgotten() -> None:
    desk = Desk(A)
    desk.want(A, 5)
    desk.send(A, returned=(Moved(RATE, WHOLE, WHOLE // 2),))
    desk.granter.expire(0.0, 30.0)
    assert len(desk.granter) == 1
    for _ in range(2):
        desk.granter.expire(31.0, 60.0)
    assert len(desk.granter) == 0


@pytest.mark.parametrize(
    ("held", "fill", "parts", "need", "moved"),
    [
        (100, 0, 50, 10, (50, 0)),
        (100, 100, 50, 10, (50, 50)),
        (100, 60, 50, 10, (50, 30)),
        (100, 60, 10, 30, (30, 0)),
        (100, 90, 0, 30, (10, 0)),
        (100, 150, 50, 10, (50, 50)),
        (100, 150, 100, 10, (100, 150)),
        (0, 0, 50, 10, (0, 0)),
    ],
)
def test_shares_move_with_their_fill_and_the_need_goes_first(
    held: int, fill: int, parts: int, need: int, moved: tuple[int, int]
) -> None:
    assert split(held, fill, parts, need) == moved


# The router's side

SCOPE = Scope(ScopeKind.KEY, "k", Limits(requests_per_min=10, concurrent=4))


class Router:
    """A router and what it would send."""

    def __init__(self, name: RouterId = A, epoch: int = 1) -> None:
        self.limiter = Limiter(shared=True)
        self.holder = Holder(name, self.limiter)
        self.count = 0
        self.answer(Reply(epoch, self.message().sequence, unknown=True))
        self.answer(Reply(epoch, self.message().sequence))
        assert self.holder.registered

    def take(self, now_s: float = 0.0) -> Granted | Refused | Short:
        self.count += 1
        name = RequestId(f"q{self.count}")
        answer = self.limiter.take(name, [SCOPE], 1, now_s)
        if isinstance(answer, Short):
            self.holder.want(name, answer)
        return answer

    def message(self) -> Message:
        message = self.holder.compose(0.0)
        assert message is not None
        return message

    def answer(self, reply: Reply) -> bool:
        return self.holder.accept(reply, 0.0)

    def grant(self, parts: int) -> None:
        self.take()
        keys = (RATE, SLOTS)
        granted = tuple(Moved(key, parts, 0) for key in keys)
        self.answer(Reply(1, self.message().sequence, granted))
        self.holder.release(RequestId(f"q{self.count}"))


def test_needs_of_all_who_wait_are_asked_for_in_one_message() -> None:
    router = Router()
    for _ in range(3):
        assert isinstance(router.take(), Short)
    wants = {want.key: want.need for want in router.message().wants}
    assert wants[RATE] == -(-3 * WHOLE // 10) - 1
    assert wants[SLOTS] == -(-3 * WHOLE // 4) - 1


def test_a_message_is_repeated_until_its_own_answer_comes() -> None:
    router = Router()
    router.take()
    sent = router.message()
    assert router.message() is sent
    assert not router.answer(Reply(1, sent.sequence - 1, (Moved(RATE, 5, 0),)))
    assert not router.answer(Reply(0, sent.sequence, (Moved(RATE, 5, 0),))), "an old Control"
    assert router.limiter.held(RATE) == 0
    assert router.answer(Reply(1, sent.sequence, (Moved(RATE, 5, 0),)))
    assert not router.answer(Reply(1, sent.sequence, (Moved(RATE, 5, 0),)))
    assert router.limiter.held(RATE) == 5


def test_a_router_says_that_nothing_is_left_unless_a_grant_has_come_since() -> None:
    router = Router()
    bell = Bell(1, recalls=(Recall(RATE, 0, 5),))
    router.holder.rung(bell, 0.0)
    told = router.message()
    assert (told.returned, told.spent) == ((Moved(RATE, 0, 0),), SPENT)
    router.answer(Reply(1, told.sequence))
    # The hint overtakes an answer with a grant in it.
    assert isinstance(router.take(), Short)
    asked = router.message()
    router.holder.rung(bell, 0.0)
    router.answer(Reply(1, asked.sequence, (Moved(RATE, WHOLE // 2, 0),)))
    told = router.message()
    assert (told.returned, told.spent) == ((Moved(RATE, 0, 0),), frozenset())


def test_what_is_recalled_is_given_back_and_cannot_be_used() -> None:
    granter = Desk(A, B).granter
    router = Router()
    router.grant(WHOLE)
    assert isinstance(router.take(), Granted)
    bell = replace(granter.bell(A, 0.0), recalls=())

    router.holder.rung(replace(bell, recalls=(Recall(RATE, WHOLE // 2, 1),)), 0.0)
    [returned] = router.message().returned
    assert returned.key == RATE
    assert returned.parts == WHOLE // 2
    assert returned.fill == pytest.approx(WHOLE // 20)
    assert router.limiter.held(RATE) == WHOLE - WHOLE // 2


def test_a_denial_is_remembered_for_a_moment_and_says_when_to_come_again() -> None:
    router = Router()
    router.grant(WHOLE // 10)
    assert isinstance(router.take(), Short), "of four slots a tenth is none"
    reply = Reply(1, router.message().sequence, denied=(SLOTS,))
    router.answer(reply)
    refused = router.take()
    assert isinstance(refused, Refused)
    assert (refused.limit, refused.retry_after_s) == (LimitKind.CONCURRENT, 1.0)
    assert isinstance(router.take(now_s=1.0), Short)


def test_a_router_registers_with_a_new_control_and_hears_no_old_one() -> None:
    router = Router()
    router.grant(WHOLE)
    router.take()
    router.holder.rung(Bell(2, unknown=True), 0.0)
    message = router.message()
    assert message.epoch == 2
    assert message.claims is not None
    assert {(each.key, each.parts) for each in message.claims} >= {(RATE, WHOLE), (SLOTS, WHOLE)}
    assert not router.answer(Reply(1, message.sequence, (Moved(RATE, 5, 0),)))

    router.holder.rung(Bell(2, (Recall(RATE, WHOLE, WHOLE),)), 0.0)
    assert router.limiter.held(RATE) == WHOLE, "claims that are on their way stay true"
    router.answer(Reply(2, message.sequence, cuts=(Moved(RATE, WHOLE // 2, 0),)))
    assert router.holder.registered
    assert router.limiter.held(RATE) == WHOLE // 2


def test_a_limit_used_within_a_minute_is_claimed_though_nothing_is_held() -> None:
    router = Router()
    router.grant(WHOLE)
    assert isinstance(router.take(), Granted)
    router.limiter.give(RATE, WHOLE, WHOLE, 0.0)
    assert Moved(RATE, 0, 0) in list(router.limiter.holdings(59.0))
    assert RATE not in [each.key for each in router.limiter.holdings(61.0)]


def test_forgotten_scopes_give_their_parts_back() -> None:
    limiter = Limiter(scopes_max=2, shared=True)
    holder = Holder(A, limiter)
    first = Scope(ScopeKind.USER, "u0", Limits(requests_per_min=10))
    limiter.take(RequestId("a"), [first], 1, 0.0)
    key = SliceKey(ScopeKind.USER, "u0", LimitKind.REQUESTS)
    limiter.receive(Moved(key, 99, 0), 0.0)
    for number in (1, 2, 3):
        limiter.figures([Scope(ScopeKind.USER, f"u{number}", Limits(requests_per_min=10))], 0.0)
    assert len(limiter) == 2
    assert [(each.key, each.parts) for each in limiter.dropped] == [(key, 99)]
    holder.accept(Reply(1, holder.compose(0.0).sequence, unknown=True), 0.0)  # type: ignore[union-attr]
    assert holder.compose(0.0).claims == ()  # type: ignore[union-attr]
