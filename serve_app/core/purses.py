"""A router's money: what it may spend of the budgets that its requests fall under.

A request reserves the most it can cost of all its budgets, or of none, before it is
admitted, and is settled to what it did cost. Nothing is awaited where the purses suffice;
what they lack comes from Control (``core/budget.py``).

Source of the two phases (pending; then posted, voided or expired): TigerBeetle's transfers.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from serve_app.core.budget import Account, BudgetKey, Line, Period
from serve_app.core.calendar import HOUR_S
from serve_app.core.types import RequestId

# How long what a cut-off request may still be billed stays reserved after the ledger has the
# router's account of it: by then it has the engine's own.
LINGER_S = 30.0
DENIED_S = 1.0


class Need(NamedTuple):
    """So much more of a budget is lacked, for requests that came in the hour ``at_s``."""

    key: BudgetKey
    at_s: int
    amount: int


@dataclass(frozen=True, slots=True)
class Reserved:
    """The request may cost ``amount``, at most what was asked for; settle or void it."""

    amount: int


@dataclass(frozen=True, slots=True)
class Lacking:
    """Nothing was reserved: more may be had from Control."""

    needs: tuple[Need, ...]


@dataclass(frozen=True, slots=True)
class Overdrawn:
    """Nothing was reserved. ``exhausted``: the budget is spent, and waiting does not help."""

    key: BudgetKey
    exhausted: bool


@dataclass(slots=True)
class _Purse:
    """What a router may spend of one budget in one period."""

    key: BudgetKey
    period: Period
    granted: int = 0
    released: int = 0
    reserved: int = 0
    posted: int = 0
    told: int = 0
    left: int = 0
    denied_until_s: float = float("-inf")
    denied_hour_s: int = 0

    @property
    def free(self) -> int:
        return self.granted - self.released - self.reserved - self.posted

    @property
    def is_settled(self) -> bool:
        open_ = self.granted != self.released or self.reserved or self.posted
        return not open_ and self.told >= self.released

    def pays_for(self, at_s: float) -> bool:
        return self.period.start_s <= at_s < self.period.end_s

    def denied(self, hour_s: int, now_s: float) -> bool:
        """Whether Control has just said that no more is to be had for what came in an hour.

        A rolling window may have more for later ones.
        """
        return self.denied_until_s > now_s and hour_s <= self.denied_hour_s

    def overlaps(self, other: _Purse) -> bool:
        mine, its = self.period, other.period
        return mine.start_s < its.end_s and its.start_s < mine.end_s

    def let_go(self) -> bool:
        """Release what is free; tell whether there was some."""
        free = max(0, self.free)
        self.released += free
        return free > 0


@dataclass(slots=True)
class _Hold:
    """What a request reserved of each of its purses, and what it cost once that is known.

    It came in the hour ``at_s``. ``keep_until_s`` is when no engine has more to say of it.
    """

    purses: tuple[_Purse, ...]
    amount: int
    at_s: int
    posted: int = 0
    acknowledged: bool = False
    settled: bool = False
    keep_until_s: float | None = None


@dataclass(frozen=True, slots=True)
class Statement:
    """What a router tells Control at one time; one of a higher ``number`` is a later one."""

    number: int
    accounts: tuple[Account, ...]


@dataclass(slots=True)
class Purses:
    """One router's money. Pure: ``now_s`` is monotonic, ``wall_s`` the wall clock's.

    Requests are paid for by the purse of the hour ``at_s`` in which they came, wall seconds, and
    by no other, whatever a clock says by now: it is the hour that the ledger books them in.
    """

    # Of each budget, what was lent last first: of two that overlap it is of the window in force.
    _purses: dict[BudgetKey, list[_Purse]] = field(default_factory=dict)
    _holds: dict[RequestId, _Hold] = field(default_factory=dict)
    _lingering: dict[RequestId, _Hold] = field(default_factory=dict)
    _lost: set[RequestId] = field(default_factory=set)
    _said: int = 0
    _answered: int = 0

    @property
    def open_requests(self) -> int:
        """Requests that hold a reservation and have not ended."""
        return sum(not each.settled for each in self._holds.values())

    @property
    def unreleased(self) -> bool:
        """Whether some request reserved something that was not let go of yet."""
        return bool(self._holds)

    @property
    def awaits_ledger(self) -> bool:
        """Whether something is kept until the ledger is heard of."""
        return bool(self._lost)

    def budgets(self) -> list[BudgetKey]:
        """Return the budgets that there are purses for."""
        return list(self._purses)

    def left(self, key: BudgetKey, at_s: float) -> int:
        """Return what a budget had left when Control last spoke of it; 0 if it never did."""
        purse = self._purse(key, at_s)
        return 0 if purse is None else max(0, purse.left)

    def reserve(
        self,
        request_id: RequestId,
        keys: Sequence[BudgetKey],
        amount: int,
        *,
        least: int,
        at_s: int,
        now_s: float,
    ) -> Reserved | Lacking | Overdrawn:
        """Reserve ``amount`` of every budget, or nothing of any; 0 <= least <= amount.

        Where Control has lately said that there is no more, less is reserved, but not less
        than ``least``. Ids are made by the server; an open one may not come again (asserted).
        """
        assert request_id not in self._holds, "a request reserves once"
        assert 0 <= least <= amount
        hour_s = at_s // HOUR_S * HOUR_S
        needs: list[Need] = []
        found: list[_Purse] = []
        for key in keys:
            purse = self._purse(key, at_s)
            if purse is None or (purse.free < amount and not purse.denied(hour_s, now_s)):
                needs.append(Need(key, hour_s, amount))
            elif purse.free < least:
                return Overdrawn(key, exhausted=purse.left < least)
            else:
                found.append(purse)
        if needs:
            return Lacking(tuple(needs))
        amount = min(amount, *(purse.free for purse in found)) if found else amount
        for purse in found:
            purse.reserved += amount
        self._holds[request_id] = _Hold(tuple(found), amount, hour_s)
        return Reserved(amount)

    def extend(
        self, request_id: RequestId, more: int, *, least: int, now_s: float
    ) -> Reserved | Lacking | Overdrawn | None:
        """Reserve ``more`` for a request that runs, as ``reserve`` does; None if it has ended.

        Of the purses that it was admitted by: of one whose window was changed no more is to be
        had.
        """
        assert 0 <= least <= more
        hold = self._holds.get(request_id)
        if hold is None or hold.settled:
            return None
        needs: list[Need] = []
        for purse in hold.purses:
            current = self._purse(purse.key, hold.at_s) is purse
            if current and purse.free < more and not purse.denied(hold.at_s, now_s):
                needs.append(Need(purse.key, hold.at_s, more))
            elif purse.free < least:
                return Overdrawn(purse.key, exhausted=current and purse.left < least)
        if needs:
            return Lacking(tuple(needs))
        more = min(more, *(purse.free for purse in hold.purses)) if hold.purses else more
        hold.amount += more
        for purse in hold.purses:
            purse.reserved += more
        return Reserved(more)

    def settle(
        self, request_id: RequestId, cost: int, *, final: bool = True, now_s: float = 0.0
    ) -> None:
        """Post what a request cost; the rest is free again. Unknown ids have no effect.

        A cost that is not ``final`` may still grow: the rest stays reserved until the ledger has
        this router's account of it, and for a while after that.
        """
        hold = self._holds.get(request_id)
        if hold is None or hold.settled:
            return
        hold.settled = True
        rest = 0 if final else max(0, hold.amount - cost)
        for purse in hold.purses:
            purse.reserved += rest - hold.amount
            purse.posted += cost
        hold.amount, hold.posted = rest, cost
        if hold.acknowledged:
            self._release(request_id, hold, now_s)
        self._close(request_id, hold)

    def void(self, request_id: RequestId) -> None:
        """Free what a request reserved: it cost nothing. Unknown ids have no effect."""
        self.settle(request_id, 0)

    def acknowledge(self, request_id: RequestId, now_s: float) -> None:
        """Let go of what a request cost, once it is known: the ledger has it.

        Unknown ids have no effect.
        """
        hold = self._holds.get(request_id)
        if hold is not None:
            hold.acknowledged = True
            if hold.settled:
                self._release(request_id, hold, now_s)
            self._close(request_id, hold)

    def lose(self, request_id: RequestId) -> None:
        """No ledger will have this router's account of a request; unknown ids have no effect.

        What it cost is kept for a while after the ledger was next ``heard``: then it has what
        the engine says.
        """
        if request_id in self._holds:
            self._lost.add(request_id)

    def heard(self, now_s: float) -> None:
        """Take note that the ledger is there."""
        for request_id in list(self._lost):
            hold = self._holds.get(request_id)
            if hold is None or hold.settled:
                self._lost.discard(request_id)
            if hold is not None and hold.settled:
                self._linger(request_id, hold, now_s)

    def expire(self, now_s: float, wall_s: float, gone: Container[BudgetKey] = ()) -> None:
        """Let go of what lingered long enough, and of what is free of periods that are not now.

        And of budgets that are ``gone``. What lingered may have been billed, without a word to
        this router, by the engine's own account: only Control, which has the ledger, knows what
        of it there still is.
        """
        for request_id, hold in list(self._lingering.items()):
            if hold.keep_until_s is not None and hold.keep_until_s > now_s:
                break
            for purse in hold.purses:
                purse.reserved -= hold.amount
                purse.posted -= hold.posted
                purse.released += hold.amount + hold.posted
            hold.amount = hold.posted = 0
            del self._lingering[request_id]
            self._close(request_id, hold)
        for key, purses in list(self._purses.items()):
            kept = []
            for number, purse in enumerate(purses):
                used = key not in gone and purse.pays_for(wall_s)
                used = used and not any(purse.overlaps(each) for each in purses[:number])
                if not used:
                    purse.let_go()
                if used or not purse.is_settled:
                    kept.append(purse)
            self._purses[key] = kept
            if not kept:
                del self._purses[key]

    def give_back(self, keys: Iterable[BudgetKey]) -> None:
        """Let go of all that is free of these budgets: another router needs it."""
        for key in keys:
            for purse in self._purses.get(key, ()):
                purse.let_go()

    def state(self, needs: Iterable[Need] = (), recalled: Collection[BudgetKey] = ()) -> Statement:
        """Return what to tell Control: budgets that are lacked, and all that was let go of.

        And how those stand that were ``recalled``, though nothing changed. What was let go of
        comes first: it may be what is lacked.
        """
        unknown: dict[tuple[BudgetKey, int], int] = {}
        lacked: dict[tuple[BudgetKey, int], Need] = {}
        for need in needs:
            purse = self._purse(need.key, need.at_s)
            if purse is None:
                unknown[need.key, need.at_s] = unknown.get((need.key, need.at_s), 0) + need.amount
                continue
            name = (need.key, purse.period.start_s)
            before = lacked.get(name, need._replace(amount=0))
            at_s = max(before.at_s, need.at_s)
            lacked[name] = Need(need.key, at_s, before.amount + need.amount)
        told: list[Account] = []
        asked = [Account(key, 0, 0, 0, need, at_s) for (key, at_s), need in unknown.items()]
        for purse in [each for purses in self._purses.values() for each in purses]:
            want = lacked.get((purse.key, purse.period.start_s))
            amount = 0 if want is None else max(0, want.amount - purse.free)
            if want is not None and amount:
                asked.append(_account(purse, amount, want.at_s))
            elif purse.told < purse.released or purse.key in recalled:
                told.append(_account(purse))
        told += [Account(key, 0, 0, 0) for key in recalled if key not in self._purses]
        self._said += 1
        return Statement(self._said, (*told, *asked))

    def accept(self, statement: Statement, lines: Iterable[Line], now_s: float) -> None:
        """Take Control's answer to a statement; one to an earlier statement than the last is late.

        All that it says was said again since, and the purses that it is of may be gone.
        """
        if statement.number <= self._answered:
            return
        self._answered = statement.number
        for account in statement.accounts:
            purse = self._at(account.key, account.start_s)
            if purse is not None:
                purse.told = max(purse.told, account.released)
        freed: set[BudgetKey] = set()
        for line in sorted(lines, key=lambda line: line.needed):
            purse = self._at(line.key, line.period.start_s)
            is_new = purse is None
            if purse is None:
                purse = _Purse(line.key, line.period, 0, line.released, told=line.released)
                self._purses.setdefault(line.key, []).append(purse)
            purse.granted = max(purse.granted, line.granted)
            purse.left = line.left
            if line.needed:
                purse.period = line.period
                if self._put_first(purse):
                    freed.add(line.key)
            elif is_new and purse.let_go():
                freed.add(line.key)
            # What was just let go of here may be what lacked: it is asked for again.
            if line.unmet and not line.pending and line.key not in freed:
                purse.denied_until_s = now_s + DENIED_S
                purse.denied_hour_s = _hour_of(line, statement)

    def _put_first(self, purse: _Purse) -> bool:
        """Have a purse pay before those it overlaps; tell whether these let go of anything."""
        others = [each for each in self._purses.get(purse.key, ()) if each is not purse]
        self._purses[purse.key] = [purse, *others]
        gave = [each for each in others if each.overlaps(purse) and each.let_go()]
        return bool(gave)

    def _purse(self, key: BudgetKey, at_s: float) -> _Purse | None:
        """Return the purse that pays for what came at ``at_s``."""
        for purse in self._purses.get(key, ()):
            if purse.pays_for(at_s):
                return purse
        return None

    def _at(self, key: BudgetKey, start_s: int) -> _Purse | None:
        for purse in self._purses.get(key, ()):
            if purse.period.start_s == start_s:
                return purse
        return None

    def _release(self, request_id: RequestId, hold: _Hold, now_s: float) -> None:
        for purse in hold.purses:
            purse.posted -= hold.posted
            purse.released += hold.posted
        hold.posted = 0
        if hold.amount:
            self._linger(request_id, hold, now_s)

    def _linger(self, request_id: RequestId, hold: _Hold, now_s: float) -> None:
        if request_id not in self._lingering:
            hold.keep_until_s = now_s + LINGER_S
            self._lingering[request_id] = hold

    def _close(self, request_id: RequestId, hold: _Hold) -> None:
        if hold.settled and not hold.posted and not hold.amount:
            self._holds.pop(request_id, None)


def _account(purse: _Purse, need: int = 0, at_s: int = 0) -> Account:
    return Account(purse.key, purse.period.start_s, purse.granted, purse.released, need, at_s)


def _hour_of(line: Line, statement: Statement) -> int:
    """Return the latest hour of what a line denies."""
    start_s, end_s = line.period
    denied = (
        each.at_s
        for each in statement.accounts
        if each.key == line.key and each.need and start_s <= each.at_s < end_s
    )
    return max(denied, default=start_s)
