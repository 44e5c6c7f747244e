"""What a contender's processes use: CPU seconds and memory, by role."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil

Roles = Mapping[str, list[psutil.Process]]


@dataclass(frozen=True, slots=True)
class Used:
    """Use between two readings: ``cpu_s`` and, at the second, ``rss_bytes``, by role.

    ``elsewhere_cores`` is how many cores were kept busy by none of ours, nor by the load
    generator: above a tenth or so the other figures were disturbed.
    """

    cpu_s: dict[str, float]
    rss_bytes: dict[str, int]
    elsewhere_cores: float


class UsageMeter:
    """Reads processes at its making and again at ``read``."""

    def __init__(self, roles: Callable[[], Roles]) -> None:
        self._roles = roles
        self._first = _cpu_by_pid(roles())
        self._own_s = _cpu_s(psutil.Process())
        self._busy_s = _busy_s()

    def read(self, wall_s: float) -> Used:
        """Return what was used since the making; ``wall_s`` is how long ago that was."""
        busy_s, own_s = _busy_s() - self._busy_s, _cpu_s(psutil.Process()) - self._own_s
        roles = self._roles()
        last = _cpu_by_pid(roles)
        cpu_s: dict[str, float] = {}
        for role, processes in roles.items():
            spent = [last.get(each.pid, 0.0) - self._first.get(each.pid, 0.0) for each in processes]
            cpu_s[role] = sum(spent)
        ours_s = sum(cpu_s.values()) + own_s
        return Used(
            cpu_s={**cpu_s, "client": own_s},
            rss_bytes={role: sum(map(_rss_bytes, each)) for role, each in roles.items()},
            elsewhere_cores=max(0.0, busy_s - ours_s) / wall_s,
        )


def _cpu_by_pid(roles: Roles) -> dict[int, float]:
    return {each.pid: _cpu_s(each) for processes in roles.values() for each in processes}


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _rss_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _busy_s() -> float:
    """Return the seconds that all cores have been busy since boot."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)
