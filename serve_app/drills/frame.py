"""What every drill has in common: a stage to act on, waiting with an end, and a verdict."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import httpx

if TYPE_CHECKING:
    from serve_app.drills.target import Target

DRILLS: Final = (
    "tenant-quota",
    "cancel-stream",
    "stale-metrics",
    "engine-kill",
    "gpu-xid",
    "router-kill",
    "control-kill",
    "brownout",
    "kv-pressure",
    "retry-storm",
    "rollback",
)
POLL_S: Final = 0.2
IDLE_S: Final = 60.0


class NotSeen(Exception):
    """What a drill waited for did not happen in time."""


class NotMeasured(Exception):
    """The stack's metrics lack what a drill judges by."""


class DrillImpossible(Exception):
    """The drill cannot be run on this stack; the message says what it lacks."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that had to be so."""

    what: str
    passed: bool


@dataclass(slots=True)
class Verdict:
    """How a drill ended. ``why`` says what stopped it before its end."""

    drill: str
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, float | int | str] = field(default_factory=dict)
    took_s: float = 0.0
    why: str | None = None

    @property
    def passed(self) -> bool:
        """Whether it came to its end and everything was so; without a check nothing was."""
        return self.why is None and bool(self.checks) and all(c.passed for c in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Return it for ``--json``."""
        return {
            "drill": self.drill,
            "passed": self.passed,
            "took_s": round(self.took_s, 1),
            "why": self.why,
            "checks": [{"what": each.what, "passed": each.passed} for each in self.checks],
            "figures": self.figures,
        }


class Stage:
    """Where a drill acts. It notes what is checked and says what happens as it does."""

    def __init__(
        self,
        target: Target,
        verdict: Verdict,
        say: Callable[[str], None],
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.target = target
        self.verdict = verdict
        self.clock = clock
        self.sleep = sleep
        self._say = say

    def inject(self, what: str) -> None:
        """Say which fault comes now."""
        self._say(f"inject: {what}")

    def say(self, what: str) -> None:
        """Say what is going on."""
        self._say(what)

    def figure(self, **values: float | int | str) -> None:
        """Note numbers for the verdict; seconds and ratios are rounded."""
        for name, value in values.items():
            shown = round(value, 2) if isinstance(value, float) else value
            self.verdict.figures[name] = shown

    def check(self, passed: bool, what: str) -> None:
        """Note whether something was as it had to be; the drill goes on either way."""
        self.verdict.checks.append(Check(what, passed))
        self._say(f"{'ok' if passed else 'FAILED'}: {what}")

    async def until(
        self, condition: Callable[[], Awaitable[bool]], what: str, within_s: float
    ) -> float:
        """Wait for a condition and return the seconds it took.

        A stack that does not answer for a moment is asked again: it is being broken.

        Raises:
            NotSeen: it did not hold within ``within_s``.
        """
        began_s = self.clock()
        while True:
            try:
                if await condition():
                    return self.clock() - began_s
                lacks = ""
            except httpx.HTTPError:
                lacks = ""
            except NotMeasured as error:
                lacks = f" ({error})"
            if self.clock() - began_s > within_s:
                raise NotSeen(f"not within {within_s:.0f} s: {what}{lacks}")
            await self.sleep(POLL_S)

    async def until_idle(self) -> None:
        """Wait until the stack holds no request, to begin with.

        Raises:
            NotSeen: it is at work for a minute: it is not a drill's alone.
        """
        await self.until(self.target.idle, "an idle stack to begin with", IDLE_S)

    async def check_until(
        self, condition: Callable[[], Awaitable[bool]], what: str, within_s: float
    ) -> float:
        """As ``until``, noted as a check; what does not happen ends the drill."""
        try:
            took_s = await self.until(condition, what, within_s)
        except NotSeen:
            self.check(False, f"{what} within {within_s:.0f} s")
            raise
        self.check(True, f"{what} after {took_s:.1f} s")
        return took_s


async def perform(
    name: str,
    target: Target,
    say: Callable[[str], None],
    clock: Callable[[], float],
    module: ModuleType | None = None,
) -> Verdict:
    """Run one drill and return its verdict; a drill that breaks off has failed.

    Raises:
        DrillImpossible: it cannot be run on this stack at all.
    """
    module = module or load(name)
    verdict = Verdict(name)
    began_s = clock()
    stage = Stage(target, verdict, lambda text: say(f"{name}: {text}"), clock)
    try:
        await module.run(stage)
    except NotSeen as error:
        verdict.why = str(error)
    except httpx.HTTPError as error:
        verdict.why = f"the stack did not answer: {error or type(error).__name__}"
    except DrillImpossible:
        raise
    except Exception as error:  # noqa: BLE001
        # Whatever it is: the drills before it keep their report, those after it are run.
        verdict.why = f"broke off: {type(error).__name__}: {error}"
    verdict.took_s = clock() - began_s
    return verdict


def load(name: str) -> ModuleType:
    """Return the module of a drill of DRILLS."""
    assert name in DRILLS
    return import_module(f"serve_app.drills.{name.replace('-', '_')}")


def summary(name: str) -> str:
    """Return in a line what a drill shows."""
    return (load(name).__doc__ or "").partition("\n")[0].rstrip(".")
