"""The GPU watcher: one process per node that acts on its GPUs' faults.

    source (DCGM, NVML, file) -> findings -> judge (core) -> decision -> steps, tried until done
                                                  |
                                       one log line, one count

It is on no request's path. Everything it does is bounded: restarts per GPU, nodes out of
service in the cluster, tries per minute. With ``dry_run`` it decides and says so, no more.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge

from serve_app.core.gpu_faults import (
    Action,
    Decision,
    Fault,
    FaultJudge,
    FaultLimits,
    Remedy,
)
from serve_app.gpu_engines import EngineNotFound, Engines
from serve_app.gpu_sources import FaultSource, SourceFailed
from serve_app.kubernetes import CLAIM, Kubernetes, KubernetesFailed, Node
from serve_app.ray_nodes import RayFailed

logger = logging.getLogger("headrace.gpu")

RETRY_S: Final = 5.0
RETRY_MAX_S: Final = 60.0
LOOK_AT_NODE_S: Final = 30.0
# So often an engine is tried to be ended, and a step that fails as nobody foresaw.
TRIES_MAX: Final = 6
# What a node's label says, as what took it out. To inspect it, it was drained.
_TAKEN_OUT: Final = {
    "cordon": Action.CORDON,
    "drain": Action.DRAIN,
    "replace": Action.REPLACE,
    "inspect": Action.DRAIN,
}


class RayDrain(Protocol):
    """What is asked of a RayNodes."""

    async def drain(self, names: Collection[str], notice_s: float, why: str) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """``node`` is Kubernetes' name of it, ``host_names`` what Ray may call it without pods.

    ``nodes_out_max``: so many nodes are out of service for their GPUs at a time, at most; a
    bad driver on all of them must not empty the cluster.
    """

    node: str
    host_names: tuple[str, ...] = ()
    drain_notice_s: float = 600.0
    replace_notice_s: float = 30.0
    nodes_out_max: int = 2
    limits: FaultLimits = field(default_factory=FaultLimits)
    dry_run: bool = False


class WatchMetrics:
    """What the watcher counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.source_up = Gauge(
            "headrace_gpu_source_up", "1 while GPU faults can be read.", registry=registry
        )
        self.lies_total = Counter(
            "headrace_gpu_lies_total", "Numbers of the source that cannot be.", registry=registry
        )
        self.decisions_total = Counter(
            "headrace_gpu_decisions_total",
            "Faults decided about, by what they call for and what is done.",
            ("remedy", "action"),
            registry=registry,
        )
        self.steps_failed_total = Counter(
            "headrace_gpu_steps_failed_total",
            "Steps that failed and are tried again, by step.",
            ("step",),
            registry=registry,
        )
        self.node_out = Gauge(
            "headrace_gpu_node_out", "1 while the node is out for its GPUs.", registry=registry
        )
        self.standby = Gauge(
            "headrace_gpu_standby", "1 while another watcher has the node.", registry=registry
        )


class StepFailed(Exception):
    """A step could not be done now; the message says why."""


class _Returned(Exception):
    """The node was returned to service while steps were left to do."""


@dataclass(slots=True)
class _Step:
    name: str
    run: Callable[[], Awaitable[str]]
    due_s: float
    failures: int = 0
    gpu: str = ""


class GpuWatch:
    """Looks, decides and acts, once per ``tick``."""

    def __init__(
        self,
        settings: WatchSettings,
        source: FaultSource,
        engines: Engines,
        metrics: WatchMetrics,
        *,
        clock: Callable[[], float],
        kubernetes: Kubernetes | None = None,
        ray: RayDrain | None = None,
    ) -> None:
        self._settings = settings
        self._source = source
        self._engines = engines
        self._metrics = metrics
        self._clock = clock
        self._kubernetes = kubernetes
        self._ray = ray
        self._judge = FaultJudge(settings.limits)
        self._record_read = kubernetes is None
        self._restarts: list[_Step] = []
        self._steps: list[_Step] = []
        self._source_problem: str | None = None
        self._lies: list[str] = []
        self._looked_at_node_s = -LOOK_AT_NODE_S

    @property
    def busy(self) -> bool:
        """Whether steps are left to do."""
        return bool(self._steps or self._restarts)

    async def tick(self) -> None:
        """Read the source, decide about what is new, and go on with what is not done."""
        judge = self._judge
        await self._look_at_node()
        for decision in [judge.judge(each, self._clock()) for each in await self._look()]:
            self._tell(decision)
            if self._settings.dry_run:
                judge.stays(decision)
            else:
                self._plan(decision)
        await self._go_on()
        self._metrics.node_out.set(judge.out)

    async def _look_at_node(self) -> None:
        """Read the node's record until it is known, and then whether the node was returned."""
        now_s = self._clock()
        if self._kubernetes is None or now_s - self._looked_at_node_s < LOOK_AT_NODE_S:
            return
        if self._record_read and (self._steps or not self._judge.out):
            return
        self._looked_at_node_s = now_s
        try:
            if not self._record_read:
                await self._read_record(self._kubernetes)
                return
            node = await self._kubernetes.node(self._settings.node)
        except KubernetesFailed as error:
            logger.warning("gpu node not read", extra={"reason": str(error)})
            return
        if not node.unschedulable:
            await self._is_returned()

    async def _read_record(self, kubernetes: Kubernetes) -> None:
        """Go on from what an earlier watcher wrote of the node, and finish what it began."""
        node = await kubernetes.node(self._settings.node)
        out = Action.NOTHING
        if node.unschedulable and node.fault is not None:
            out = _TAKEN_OUT.get(node.fault, Action.NOTHING)
        # A claim that came to nothing, whoever cordoned the node meanwhile, or what a node was
        # taken out for and is no more.
        stale = node.fault == CLAIM or (node.fault is not None and not node.unschedulable)
        if stale and not self._steps and not self._settings.dry_run:
            await kubernetes.claim(self._settings.node, None)
        self._judge.learn(node.resets, out)
        self._record_read = True
        if out in (Action.DRAIN, Action.REPLACE) and not self._steps and not self._settings.dry_run:
            self._plan_drain(f"taken out earlier ({node.fault})", hurry=out is Action.REPLACE)

    async def _is_returned(self) -> bool:
        """Take the node for healthy again; return whether Kubernetes could be told.

        Its label goes first: who cordons it next may have other reasons than its GPUs.
        """
        if self._kubernetes is not None and not self._settings.dry_run:
            try:
                await self._kubernetes.claim(self._settings.node, None)
            except KubernetesFailed as error:
                logger.warning("gpu node not returned yet", extra={"reason": str(error)})
                return False
        self._steps.clear()
        self._judge.returned()
        logger.info("gpu node returned", extra={"node": self._settings.node})
        return True

    async def _look(self) -> list[Fault]:
        try:
            findings = await self._source.look()
        except Exception as error:  # what was decided before goes on without it
            self._metrics.source_up.set(0)
            reason = str(error) or type(error).__name__
            if self._source_problem is None:
                unforeseen = None if isinstance(error, SourceFailed) else error
                logger.error("gpu source failed", extra={"reason": reason}, exc_info=unforeseen)
            self._source_problem = reason
            return []
        if self._source_problem is not None:
            logger.info("gpu source back")
        self._source_problem = None
        self._metrics.source_up.set(1)
        self._metrics.lies_total.inc(len(findings.lies))
        if findings.lies and findings.lies != self._lies:
            logger.warning("gpu source lies", extra={"lies": findings.lies[:10]})
        self._lies = findings.lies
        return findings.faults

    def _tell(self, decision: Decision) -> None:
        fault = decision.fault
        self._metrics.decisions_total.labels(fault.remedy.value, decision.action.value).inc()
        fields = {
            "node": self._settings.node,
            "gpu": fault.gpu,
            "fault": fault.what,
            "remedy": fault.remedy.value,
            "action": decision.action.value,
            "why": decision.why,
            "inspect": decision.inspect,
            "dry_run": self._settings.dry_run,
        }
        level = logging.INFO if decision.action is Action.NOTHING else logging.WARNING
        if fault.remedy is Remedy.UNKNOWN:
            level = logging.ERROR
        logger.log(level, "gpu decision", extra=fields)

    def _plan(self, decision: Decision) -> None:
        """Add the steps of a decision to those that are left to do."""
        now_s, action, gpu = self._clock(), decision.action, decision.fault.gpu
        if action is Action.NOTHING:
            return
        if action is Action.RESTART_ENGINE:
            restart = _Step("restart_engine", lambda: self._restart(gpu), now_s, gpu=gpu)
            self._restarts.append(restart)
            return
        # What is under way for the node is part of this, and this is more.
        self._steps = [_Step("cordon", lambda: self._cordon(decision), now_s)]
        if action is not Action.CORDON:
            self._plan_drain(decision.fault.what, hurry=action is Action.REPLACE)

    def _plan_drain(self, why: str, *, hurry: bool) -> None:
        now_s, settings = self._clock(), self._settings
        notice_s = settings.replace_notice_s if hurry else settings.drain_notice_s
        evict = _Step("evict", self._evict, now_s + notice_s)

        async def drain() -> str:
            done = await self._drain(why, notice_s)
            # There may have been no room for long: the notice counts from when it is given.
            evict.due_s = self._clock() + notice_s
            return done

        self._steps += [_Step("drain", drain, now_s), evict]

    async def _go_on(self) -> None:
        """Try every restart, and the node's steps in their order until one fails."""
        for step in list(self._restarts):
            if step.due_s <= self._clock() and await self._try(step):
                self._restarts.remove(step)
        while self._steps and self._steps[0].due_s <= self._clock():
            step = self._steps[0]
            if not await self._try(step):
                return
            if self._steps and self._steps[0] is step:
                self._steps.pop(0)

    async def _try(self, step: _Step) -> bool:
        """Run a step; return whether it is over, done or given up."""
        fields = {"node": self._settings.node, "step": step.name}
        try:
            done = await step.run()
        except _Returned:
            return await self._is_returned()
        except Exception as error:  # noqa: BLE001  # one that nobody foresaw stops no watcher
            step.failures += 1
            wait_s = min(RETRY_MAX_S, RETRY_S * 2 ** (step.failures - 1))
            step.due_s = self._clock() + wait_s
            self._metrics.steps_failed_total.labels(step.name).inc()
            over = self._is_given_up(step, error)
            again = {"given_up": "true"} if over else {"again_in_s": str(wait_s)}
            reason = str(error) or type(error).__name__
            logger.error("gpu step failed", extra=fields | {"reason": reason} | again)
            if over and step.gpu:
                self._judge.not_restarted(step.gpu)
            return over
        logger.warning("gpu step done", extra=fields | {"done": done})
        return True

    def _is_given_up(self, step: _Step, error: Exception) -> bool:
        if isinstance(error, EngineNotFound):
            return True  # there is nothing to restart
        foreseen = isinstance(error, (StepFailed, KubernetesFailed, RayFailed))
        return not foreseen and step.failures >= TRIES_MAX

    async def _restart(self, gpu: str) -> str:
        return f"ended engines {self._engines.restart(gpu)}"

    async def _cordon(self, decision: Decision) -> str:
        kubernetes, settings = self._kubernetes, self._settings
        if kubernetes is None:
            self._judge.cordoned()
            return "no Kubernetes: keep the machine out of service yourself"
        if not self._record_read:
            # Before it is overwritten: how often the node's GPUs were reset.
            node = await kubernetes.node(settings.node)
            self._judge.learn(node.resets, Action.NOTHING)
            self._record_read = True
        await self._take_place(kubernetes)
        what = "inspect" if decision.inspect else decision.action.value
        why = f"{decision.fault.what} on {decision.fault.gpu}: {decision.why}"
        await kubernetes.cordon(settings.node, what, why[:1000], self._judge.resets)
        self._judge.cordoned()
        return f"cordoned: {why}"

    async def _take_place(self, kubernetes: Kubernetes) -> None:
        """Make sure that one more node may be out, whoever else is about to take one out.

        A node is claimed before the others are looked at, so that of two watchers at least
        one sees the other; who sees too many waits. Those first in order keep their claims,
        the others withdraw theirs: then the first find room.

        Raises:
            StepFailed: there is no room now.
        """
        name, most = self._settings.node, self._settings.nodes_out_max
        for is_claimed in (False, True):
            held = await kubernetes.nodes_held()
            mine = [each for each in held if each.name == name]
            if any(each.unschedulable for each in mine):
                return
            others = sorted(
                (each for each in held if each.name != name), key=lambda each: each.name
            )
            if len(others) >= most:
                if mine and sum(_is_ahead(each, name) for each in others) >= most:
                    await kubernetes.claim(name, None)
                raise StepFailed(
                    f"{len(others)} nodes are out already ({', '.join(e.name for e in others)}); "
                    "raise --nodes-out-max or return one of them"
                )
            if not is_claimed:
                await kubernetes.claim(name)

    async def _drain(self, why: str, notice_s: float) -> str:
        await self._see_that_it_is_out()
        if self._ray is None:
            return "no --gcs-address: Ray is not told"
        names = set(self._settings.host_names)
        if self._kubernetes is not None:
            pods = await self._kubernetes.ray_pods(self._settings.node)
            # Without the head there is no cluster: it is not evicted, and takes on what comes.
            workers = [pod for pod in pods if not pod.head]
            names = {name for pod in workers for name in (pod.name, pod.address) if name}
        ids = await self._ray.drain(names, notice_s, why)
        return f"draining Ray nodes {ids}"

    async def _evict(self) -> str:
        if self._kubernetes is None:
            return "no Kubernetes: nothing to evict"
        await self._see_that_it_is_out()
        evicted, failed = [], []
        for pod in await self._kubernetes.ray_pods(self._settings.node):
            if pod.head:
                continue  # without it there is no cluster
            try:
                await self._kubernetes.evict(pod.name)
                evicted.append(pod.name)
            except KubernetesFailed as error:
                failed.append(f"{pod.name}: {error}")
        if failed:
            raise StepFailed("; ".join(failed))
        return f"evicted {evicted}"

    async def _see_that_it_is_out(self) -> None:
        """Raise _Returned if an operator has returned the node meanwhile."""
        if self._kubernetes is None:
            return
        if not (await self._kubernetes.node(self._settings.node)).unschedulable:
            raise _Returned


def _is_ahead(other: Node, name: str) -> bool:
    """Tell whether a node has its place before this one: it is out, or first by name."""
    return other.unschedulable or other.name < name
