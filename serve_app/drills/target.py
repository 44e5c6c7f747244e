"""The stack under a drill: its HTTP side, its metrics, and its processes on this node."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from serve_app.drills.frame import DrillImpossible, NotMeasured

TIMEOUT_S: Final = 60.0
KEY_KNOWN_S: Final = 20.0
ADMIN_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Names:
    """What a drill uses of a stack. ``tight`` is a pool small enough to be filled.

    ``quota_tenant`` has a limit of requests per minute that a drill can reach.
    """

    pool: str = "sim"
    model: str = "sim"
    tight: str = "tight"
    tight_model: str = "tight"
    quota_tenant: str = "drill-quota"


@dataclass(frozen=True, slots=True)
class Deployment:
    """How a configuration is handed to the stack: Ray's dashboard, and the one that is good."""

    dashboard: str
    document: Mapping[str, Any]
    environment: Mapping[str, str]
    folder: Path


class Target:
    """A running stack. Processes are found on this node only: a remote one's cannot be killed."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        names: Names,
        *,
        root: int | None = None,
        deployment: Deployment | None = None,
    ) -> None:
        """``client`` has the stack's URL and an admin key; ``root`` is its first process."""
        self.client = client
        self.names = names
        self.deployment = deployment
        self._root = root

    def headers(self, key: str | None = None) -> dict[str, str]:
        """Return the headers that make a request another key's."""
        return {} if key is None else {"authorization": f"Bearer {key}"}

    async def samples(self) -> list[Any]:
        """Return every sample of the application's one scrape."""
        answer = await self.client.get("/metrics", timeout=TIMEOUT_S)
        answer.raise_for_status()
        families = text_string_to_metric_families(answer.text)
        return [sample for family in families for sample in family.samples]

    async def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples with these labels.

        A counter that has none is 0: it is not there before its first event.

        Raises:
            NotMeasured: there is no sample of a metric that is no counter.
        """
        values = [
            float(sample.value)
            for sample in await self.samples()
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        if not values and not name.endswith("_total"):
            raise NotMeasured(f"the stack's metrics have no {name} with {labels}")
        return sum(values)

    async def replicas(self, pool: str) -> int:
        """Return how many replicas of a pool the answering router knows."""
        answer = await self.client.get("/ready", timeout=TIMEOUT_S)
        found: int = answer.json()["pools"].get(pool, {}).get("replicas", 0)
        return found

    async def idle(self) -> bool:
        """Whether engines and routers hold no request, by their own latest report.

        Raises:
            NotMeasured: one of them says nothing.
        """
        samples = await self.samples()
        held = {f"headrace_{name}" for name in _HELD}
        if lacking := held - {each.name for each in samples}:
            raise NotMeasured(f"the stack's metrics have no {', '.join(sorted(lacking))}")
        return all(not each.value for each in samples if each.name in held)

    async def simulated(self) -> bool | None:
        """Whether every replica says that its engine is the simulated one; None: not all said."""
        samples = await self.samples()
        kinds = [each.value for each in samples if each.name == "headrace_engine_simulated"]
        replicas = [each for each in samples if each.name == "headrace_replica_up"]
        if not all(kinds):
            return False
        return True if kinds and len(kinds) == len(replicas) else None

    @asynccontextmanager
    async def key(self, **fields: Any) -> AsyncIterator[str]:
        """Create a key and give its secret once routers know it; end it on every way out."""
        answer = await self.client.post(
            "/admin/keys", json={"name": "drill", **fields}, timeout=ADMIN_S
        )
        if answer.status_code != 201:
            raise DrillImpossible(f"no key could be made: {answer.status_code} {answer.text:.200}")
        made = answer.json()
        try:
            await self._until_known(self.headers(made["key"]))
            yield str(made["key"])
        finally:
            await self.client.delete(f"/admin/keys/{made['id']}", timeout=ADMIN_S)

    async def _until_known(self, headers: dict[str, str]) -> None:
        async with asyncio.timeout(KEY_KNOWN_S):
            known = 0
            while known < _ROUNDS:  # every router is asked, whichever answers
                seen = await self.client.get("/v1/models", headers=headers)
                known = known + 1 if seen.status_code == 200 else 0
                await asyncio.sleep(0.1)

    def alive(self, *words: str) -> list[psutil.Process]:
        """Return this node's processes of the stack whose title has all these words.

        Raises:
            DrillImpossible: nobody said below which process they are: another stack on this
                machine must not be hurt for this one.
        """
        if self._root is None:
            raise DrillImpossible("give --root PID, its `headrace up` or raylet on this node")
        try:
            candidates = psutil.Process(self._root).children(recursive=True)
        except psutil.NoSuchProcess:
            candidates = []
        return [each for each in candidates if _title_has(each, ("ServeReplica:", *words))]

    def processes(self, *words: str) -> list[psutil.Process]:
        """Return those that are ``alive``, to be killed.

        Raises:
            DrillImpossible: there is none.
        """
        found = self.alive(*words)
        if not found:
            raise DrillImpossible(
                f"no process of {' '.join(words)} below {self._root} on this node: "
                "run the drill where it runs"
            )
        return found


class Before:
    """A deployment's processes on this node as they were before a fault."""

    def __init__(self, target: Target, words: tuple[str, ...]) -> None:
        """``words`` are those of ``Target.processes``, which raises if there is none."""
        self.processes = target.processes(*words)
        self._target = target
        self._words = words

    def joined(self) -> bool:
        """Whether a process is there now that was not before."""
        known = {each.pid for each in self.processes}
        return any(each.pid not in known for each in self._target.alive(*self._words))


def kill(processes: Sequence[psutil.Process]) -> None:
    """End processes at once, as a crash does."""
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


_HELD: Final = ("engine_running", "engine_waiting", "in_flight", "queue_depth")
_ROUNDS: Final = 6


def _title_has(process: psutil.Process, words: Sequence[str]) -> bool:
    try:
        line = " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return False
    return all(word in line for word in words)
