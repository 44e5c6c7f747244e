"""The replicas of the pool whose engine a drill ends."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from serve_app.drills.frame import Stage
from serve_app.drills.target import Before

REPLACED_S = 120.0


@dataclass(frozen=True, slots=True)
class Engines:
    """The pool's replicas before the fault: how many, and their processes on this node."""

    pool: str
    replicas: int
    before: Before

    @property
    def victim(self) -> psutil.Process:
        """The one to end."""
        return self.before.processes[0]

    async def check_replaced(self, stage: Stage) -> None:
        """Check that another process serves in the victim's place, and note how soon."""

        async def replaced() -> bool:
            # A router may not have missed the old one yet: another process has to be there.
            return self.before.joined() and await stage.target.replicas(self.pool) >= self.replicas

        took_s = await stage.check_until(replaced, "it was replaced", REPLACED_S)
        stage.figure(replaced_after_s=took_s)


async def engines_of(stage: Stage) -> Engines:
    """Return the drill's pool as it is now.

    Raises:
        DrillImpossible: none of its processes is on this node.
    """
    pool = stage.target.names.pool
    before = Before(stage.target, (f":pool-{pool}:", "Engine"))
    return Engines(pool, await stage.target.replicas(pool), before)
