"""A router's money: what it may spend of the budgets that its requests fall under.

A request reserves the most it can cost of all its budgets, or of none, before it is
admitted, and is settled to what it did cost. Nothing is awaited where the purses suffice;
what they lack comes from Control (``core/budget.py``).

Source of the two phases (pending; then posted, voided or expired): TigerBeetle's transfers.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

from serve_app.core.budget import Account, BudgetKey, Line, Period
from serve_app.core.types import RequestId

# How long what a cut-off request may still be billed stays reserved: by then the ledger has
# the engine's own account.
LINGER_S = 30.0
DENIED_S = 1.0


@dataclass(frozen=True, slots=True)
class Reserved:
    """The request may cost ``amount``, at most what was asked for; settle or void it."""

    amount: int


@dataclass(frozen=True, slots=True)
class Lacking:
    """Nothing was reserved: more may be had from Control."""

    needs: tuple[tuple[BudgetKey, int], ...]


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

    @property
    def free(self) -> int:
        return self.granted - self.released - self.reserved - self.posted

    @property
    def is_settled(self) -> bool:
        return self.granted == self.released and not self.reserved and not self.posted


@dataclass(slots=True)
class _Hold:
    """What a request reserved of each of its purses, and what it cost once that is known."""

    purses: tuple[_Purse, ...]
    amount: int
    posted: int = 0
    acknowledged: bool = False
    settled: bool = False
    keep_until_s: float | None = None


@dataclass(slots=True)
class Purses:
    """One router's money. Pure: ``now_s`` is monotonic, ``wall_s`` the wall clock's."""

    _purses: dict[BudgetKey, _Purse] = field(default_factory=dict)
    _old: list[_Purse] = field(default_factory=list)
    _holds: dict[RequestId, _Hold] = field(default_factory=dict)
    _lingering: dict[RequestId, _Hold] = field(default_factory=dict)

    @property
    def open_requests(self) -> int:
        """Requests that hold a reservation and have not ended."""
        return sum(not each.settled for each in self._holds.values())

    @property
    def unreleased(self) -> bool:
        """Whether some request reserved something that was not let go of yet."""
        return bool(self._holds)

    def keys(self) -> list[BudgetKey]:
        """Return the budgets that there are purses for."""
        return list(self._purses)

    def left(self, key: BudgetKey) -> int:
        """Return what a budget had left when Control last spoke of it; 0 if it never did."""
        purse = self._purses.get(key)
        return 0 if purse is None else max(0, purse.left)

    def reserve(
        self,
        request_id: RequestId,
        keys: Sequence[BudgetKey],
        amount: int,
        *,
        least: int,
        wall_s: float,
        now_s: float,
    ) -> Reserved | Lacking | Overdrawn:
        """Reserve ``amount`` of every budget, or nothing of any; 0 <= least <= amount.

        Where Control has lately said that there is no more, less is reserved, but not less
        than ``least``. Ids are made by the server; an open one may not come again (asserted).
        """
        assert request_id not in self._holds, "a request reserves once"
        assert 0 <= least <= amount
        needs: list[tuple[BudgetKey, int]] = []
        found: list[_Purse] = []
        for key in keys:
            purse = self._purse(key, wall_s)
            if purse is None or (purse.free < amount and purse.denied_until_s <= now_s):
                needs.append((key, amount))
            elif purse.free < least:
                return Overdrawn(key, exhausted=purse.left < least)
            else:
                found.append(purse)
        if needs:
            return Lacking(tuple(needs))
        amount = min(amount, *(purse.free for purse in found)) if found else amount
        for purse in found:
            purse.reserved += amount
        self._holds[request_id] = _Hold(tuple(found), amount)
        return Reserved(amount)

    def extend(
        self, request_id: RequestId, more: int, *, least: int, now_s: float
    ) -> Reserved | Lacking | Overdrawn | None:
        """Reserve ``more`` for a request that runs, as ``reserve`` does; None if it has ended.

        Of the periods in which it was admitted: of one that is over no more is to be had.
        """
        assert 0 <= least <= more
        hold = self._holds.get(request_id)
        if hold is None or hold.settled:
            return None
        needs: list[tuple[BudgetKey, int]] = []
        for purse in hold.purses:
            current = self._purses.get(purse.key) is purse
            if current and purse.free < more and purse.denied_until_s <= now_s:
                needs.append((purse.key, more))
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

        A cost that is not ``final`` may still grow: the rest stays reserved for a while.
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
            self._release(hold)
        if rest:
            hold.keep_until_s = now_s + LINGER_S
            self._lingering[request_id] = hold
        self._close(request_id, hold)

    def void(self, request_id: RequestId) -> None:
        """Free what a request reserved: it cost nothing. Unknown ids have no effect."""
        self.settle(request_id, 0)

    def acknowledge(self, request_id: RequestId) -> None:
        """Let go of what a request cost, once it is known: the ledger has it.

        Unknown ids have no effect.
        """
        hold = self._holds.get(request_id)
        if hold is not None:
            hold.acknowledged = True
            self._release(hold)
            self._close(request_id, hold)

    def expire(self, now_s: float, wall_s: float) -> None:
        """Let go of what lingered long enough, and of what is left of periods that are over.

        What lingered may have been billed, without a word to this router, by the engine's own
        account: only Control, which has the ledger, knows what of it there still is.
        """
        for request_id, hold in list(self._lingering.items()):
            if hold.keep_until_s is not None and hold.keep_until_s > now_s:
                break
            for purse in hold.purses:
                purse.reserved -= hold.amount
                purse.released += hold.amount
            hold.amount = 0
            del self._lingering[request_id]
            self._close(request_id, hold)
        for key in list(self._purses):
            self._purse(key, wall_s)
        for purse in self._old:
            purse.released += max(0, purse.free)
        self._old = [each for each in self._old if not each.is_settled or each.told < each.released]

    def give_back(self, keys: Iterable[BudgetKey]) -> None:
        """Let go of all that is free of these budgets: another router needs it."""
        for key in keys:
            purse = self._purses.get(key)
            if purse is not None and purse.free > 0:
                purse.released += purse.free

    def accounts(self, needs: Iterable[tuple[BudgetKey, int]] = ()) -> list[Account]:
        """Return what to tell Control: budgets that are lacked, and all that was let go of."""
        wanted = dict(needs)
        accounts = []
        for purse in [*self._purses.values(), *self._old]:
            need = wanted.pop(purse.key, 0) if self._purses.get(purse.key) is purse else 0
            need = max(0, need - purse.free)
            if need or purse.told < purse.released:
                accounts.append(_account(purse, need))
        return accounts + [Account(key, 0, 0, 0, need) for key, need in wanted.items()]

    def account(self, key: BudgetKey) -> Account:
        """Return a budget's account though nothing changed: the answer to a recall."""
        purse = self._purses.get(key)
        return Account(key, 0, 0, 0) if purse is None else _account(purse, 0)

    def accept(self, sent: Iterable[Account], lines: Iterable[Line], now_s: float) -> None:
        """Take Control's answer to accounts that were sent."""
        released = {(each.key, each.start_s): each.released for each in sent}
        for purse in [*self._purses.values(), *self._old]:
            told = released.get((purse.key, purse.period.start_s), 0)
            purse.told = max(purse.told, told)
        for line in lines:
            known = self._purses.get(line.key)
            if known is None or _follows(line, known, released):
                if known is not None:
                    self._old.append(known)
                known = self._purses[line.key] = self._opened(line)
            if known.period.start_s != line.period.start_s:
                continue
            known.period = line.period
            known.granted = max(known.granted, line.granted)
            known.left = line.left
            if line.unmet and not line.pending:
                known.denied_until_s = now_s + DENIED_S

    def _opened(self, line: Line) -> _Purse:
        """Return the purse of a line's period, which may have been closed too early."""
        for purse in self._old:
            if purse.key == line.key and purse.period.start_s == line.period.start_s:
                self._old = [each for each in self._old if each is not purse]
                return purse
        return _Purse(line.key, line.period)

    def _purse(self, key: BudgetKey, wall_s: float) -> _Purse | None:
        """Return the purse of the period of now; one whose period is over is closed."""
        purse = self._purses.get(key)
        if purse is not None and wall_s >= purse.period.end_s:
            self._old.append(self._purses.pop(key))
            return None
        return purse

    @staticmethod
    def _release(hold: _Hold) -> None:
        for purse in hold.purses:
            purse.posted -= hold.posted
            purse.released += hold.posted
        hold.posted = 0

    def _close(self, request_id: RequestId, hold: _Hold) -> None:
        if hold.settled and not hold.posted and not hold.amount:
            self._holds.pop(request_id, None)


def _follows(line: Line, known: _Purse, sent: Container[tuple[BudgetKey, int]]) -> bool:
    """Whether a line is of a period after the known one, or of that of a changed window.

    Such a period and the known one overlap, and either may have begun first. As the answer to
    what was said of the known one it is no late word of a window before.
    """
    if line.period.start_s >= known.period.end_s:
        return True
    if line.period.start_s == known.period.start_s or line.period.end_s <= known.period.start_s:
        return False
    return (known.key, known.period.start_s) in sent


def _account(purse: _Purse, need: int) -> Account:
    return Account(purse.key, purse.period.start_s, purse.granted, purse.released, need)
