"""What the granter of shared limits keeps of one limit; see ``core/slices.py``."""

from __future__ import annotations

from dataclasses import dataclass, field

from serve_app.core.exchange import RouterId
from serve_app.core.limits import LimitKind, SliceKey
from serve_app.core.parts import MINUTE_NS, WHOLE


@dataclass(slots=True)
class Holding:
    """What a router holds of a limit, and whether it owes an answer to a recall."""

    parts: int = 0
    asked_ns: int | None = None
    empty_ns: int | None = None


@dataclass(slots=True)
class Turn:
    """What a router waits for, and until when others shall not take it first."""

    need: int
    until_ns: int


@dataclass(slots=True)
class Rest:
    """What the granter holds of a limit, with its fill, and who holds and wants the others."""

    parts: int = WHOLE
    fill: int = 0
    at_ns: int = 0
    claimed: bool = False
    accounts: dict[RouterId, Holding] = field(default_factory=dict)
    wanting: dict[RouterId, int] = field(default_factory=dict)
    turns: dict[RouterId, Turn] = field(default_factory=dict)

    def ahead(self, router: RouterId, now_ns: int) -> dict[RouterId, int]:
        """Return the needs of routers whose turn it is before this one's."""
        found: dict[RouterId, int] = {}
        for name, turn in list(self.turns.items()):
            if turn.until_ns <= now_ns:
                del self.turns[name]
            elif name == router:
                break
            else:
                found[name] = turn.need
        return found

    def drain(self, now_ns: int) -> None:
        """Let time pass: the rest's bucket drains like everybody's."""
        drained = self.parts * (now_ns - self.at_ns) // MINUTE_NS
        self.fill = max(0, self.fill - drained)
        self.at_ns = now_ns

    def put(self, parts: int, fill: int, now_ns: int) -> None:
        """Take parts and what lies on them into the rest."""
        self.drain(now_ns)
        self.parts += parts
        self.fill += fill


def full(key: SliceKey, parts: int) -> int:
    """Return the most fill that lies on parts: as much as they hold, none on slots."""
    return 0 if key.limit is LimitKind.CONCURRENT else parts
