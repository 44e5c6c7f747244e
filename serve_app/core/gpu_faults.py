"""GPU faults: what NVIDIA's XIDs mean for who serves on the GPU, and what is done about one.

The table is the vendor's XID catalogue, cut down to what an operator can do. Nothing here
reads a GPU or touches a node: ``serve_app/gpu_health.py`` does, by these decisions.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

XID_MAX: Final = 1023


class Remedy(StrEnum):
    """What a fault calls for."""

    LOG = "log"
    RESTART_ENGINE = "restart_engine"
    RESET_GPU = "reset_gpu"
    CHECK_LINKS = "check_links"
    CORDON_NODE = "cordon_node"
    REPLACE_NODE = "replace_node"
    UNKNOWN = "unknown"


_XIDS: Final = {
    Remedy.LOG: (43, 63, 66, 92, 121, 137, 160, 161),
    Remedy.RESTART_ENGINE: (8, 11, 13, 25, 31, 32, 39, 40, 41, 68, 69, 94),
    Remedy.RESET_GPU: (46, 48, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158),
    Remedy.CHECK_LINKS: (74, *range(144, 151)),
    Remedy.CORDON_NODE: (157,),
    Remedy.REPLACE_NODE: (79,),
}
_REMEDIES: Final = {xid: remedy for remedy, xids in _XIDS.items() for xid in xids}
# An uncorrectable (double-bit) ECC error is what XID 48 reports.
ECC_XID: Final = 48


def remedy_of(xid: int) -> Remedy:
    """Return what an XID calls for; UNKNOWN if the table has none."""
    return _REMEDIES.get(xid, Remedy.UNKNOWN)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of one GPU. ``gpu`` is its UUID or index as the source names it."""

    gpu: str
    what: str
    remedy: Remedy


def xid_fault(gpu: str, xid: int) -> Fault:
    """Return the fault that an XID stands for."""
    return Fault(gpu, f"XID {xid}", remedy_of(xid))


class Action(StrEnum):
    """What the watcher does. DRAIN and REPLACE take the node out; REPLACE hurries."""

    NOTHING = "nothing"
    RESTART_ENGINE = "restart_engine"
    CORDON = "cordon"
    DRAIN = "drain"
    REPLACE = "replace"


_WEIGHT: Final = {action: weight for weight, action in enumerate(Action)}
_ACTIONS: Final = {
    Remedy.LOG: Action.NOTHING,
    Remedy.UNKNOWN: Action.NOTHING,
    Remedy.RESTART_ENGINE: Action.RESTART_ENGINE,
    Remedy.CORDON_NODE: Action.CORDON,
    Remedy.CHECK_LINKS: Action.DRAIN,
    Remedy.RESET_GPU: Action.DRAIN,
    Remedy.REPLACE_NODE: Action.REPLACE,
}


@dataclass(frozen=True, slots=True)
class Decision:
    """What is done about a fault, and why. ``inspect``: a technician has to look."""

    fault: Fault
    action: Action
    why: str
    inspect: bool = False


@dataclass(frozen=True, slots=True)
class FaultLimits:
    """How much a watcher may do by itself.

    Within ``settle_s`` of an engine's restart further faults of its GPU are echoes of the
    first. After ``restarts_max`` restarts in ``window_s`` the GPU is drained instead. The
    hardware is inspected once it was reset ``resets_max`` times.
    """

    settle_s: float = 60.0
    restarts_max: int = 3
    window_s: float = 3600.0
    resets_max: int = 2


class FaultJudge:
    """Decides about the faults of one node, in order; remembers what it decided."""

    def __init__(
        self, limits: FaultLimits | None = None, *, resets: int = 0, out: Action = Action.NOTHING
    ) -> None:
        """``resets``: how often GPUs of this node were drained for a reset before.

        ``out`` is what took the node out of service before this judge began.
        """
        self._limits = limits or FaultLimits()
        self._restarts: dict[str, deque[float]] = {}
        self._out = out
        self._carried_out = out
        self.resets = resets

    @property
    def out(self) -> bool:
        """Whether the node is out of service for its GPUs: cordoned, not only decided about."""
        return self._carried_out is not Action.NOTHING

    def judge(self, fault: Fault, now_s: float) -> Decision:
        """Return what to do about a fault."""
        action, why = _ACTIONS[fault.remedy], fault.remedy.value
        if action is Action.NOTHING:
            return Decision(fault, action, _NOTHING[fault.remedy])
        if action is Action.RESTART_ENGINE and self._serves:
            action, why = self._restart(fault, now_s)
            if action in (Action.RESTART_ENGINE, Action.NOTHING):
                return Decision(fault, action, why)
        if _WEIGHT[action] <= _WEIGHT[self._out]:
            return Decision(fault, Action.NOTHING, f"the node is out already ({self._out.value})")
        if action in (Action.CORDON, Action.DRAIN, Action.REPLACE):
            return self._take_out(fault, action, why)
        return Decision(fault, action, why)

    def returned(self) -> None:
        """The node serves again: what was decided about it before is over."""
        self._out = self._carried_out = Action.NOTHING
        self._restarts.clear()

    def cordoned(self) -> None:
        """What was decided about the node has begun: nothing more is scheduled on it."""
        self._carried_out = self._out

    def learn(self, resets: int, out: Action) -> None:
        """The node's own record, read late: as if this judge had begun with it."""
        self.resets += resets
        self._carried_out = max(self._carried_out, out, key=_WEIGHT.__getitem__)
        self._out = max(self._out, out, key=_WEIGHT.__getitem__)

    def not_restarted(self, gpu: str) -> None:
        """The latest restart decided for a GPU ended no engine: it does not count."""
        if done := self._restarts.get(gpu):
            done.pop()

    @property
    def _serves(self) -> bool:
        """Whether engines still run there: all of them on a node that is only cordoned."""
        return self._carried_out in (Action.NOTHING, Action.CORDON)

    def stays(self, decision: Decision) -> None:
        """A decision was not carried out: the node is where it was."""
        if decision.action in (Action.CORDON, Action.DRAIN, Action.REPLACE):
            self._out = self._carried_out
            self.resets -= decision.action is Action.DRAIN

    def _restart(self, fault: Fault, now_s: float) -> tuple[Action, str]:
        limits = self._limits
        done = self._restarts.setdefault(fault.gpu, deque())
        while done and now_s - done[0] > limits.window_s:
            done.popleft()
        if done and now_s - done[-1] < limits.settle_s:
            return Action.NOTHING, "its engine has just been restarted"
        if len(done) >= limits.restarts_max:
            return Action.DRAIN, f"{len(done)} restarts within {limits.window_s:.0f} s did not help"
        done.append(now_s)
        return Action.RESTART_ENGINE, fault.remedy.value

    def _take_out(self, fault: Fault, action: Action, why: str) -> Decision:
        self._out = action
        inspect = action is Action.REPLACE
        if action is Action.DRAIN:
            inspect = self.resets >= self._limits.resets_max
            self.resets += 1
        return Decision(fault, action, why, inspect=inspect)


_NOTHING: Final = {
    Remedy.LOG: "needs nothing",
    Remedy.UNKNOWN: "not in the table: look it up in NVIDIA's XID catalogue",
}
