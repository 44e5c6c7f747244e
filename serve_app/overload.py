"""What a router refuses so that it lives: its loop late, its memory or its descriptors at an end.

The gate bounds what engines are asked for. Here is bounded what the router's own process may be
asked for, whoever asks: it is refused before its body is read where that can be known, by what
would otherwise fail for everybody.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import psutil

from serve_app.core.types import PriorityClass, TenantId
from serve_app.errors import RateLimited, Unavailable

# So many probes in a row are late when the loop has more to do than it can. One pause, such as
# a garbage collection, makes one of them late, and is over when that is known.
LATE_PROBES: Final = 3
# Keys whose ceiling is Critical are let in until it is so much later, and so near the limit.
CRITICAL_TIMES: Final = 4.0
DESCRIPTORS_RATIO: Final = 0.9
CRITICAL_DESCRIPTORS_RATIO: Final = 0.97
# Counting costs microseconds for each of them.
PROBES_PER_COUNT: Final = 4
# Of what bodies may take one tenant takes this share at most.
TENANT_RATIO: Final = 0.5
RETRY_AFTER_S: Final = 1.0


class Overloaded(Unavailable):
    """A 503 that also closes the connection: what the process lacks it gives back."""

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers of the error, and the end of the connection."""
        return [*super().headers(), (b"connection", b"close")]


class Overload:
    """Whether the process can take one more request; told of its loop by ``note_lag``.

    Source of the first rule: a queue that stands, not one that is long for a moment, is an
    overload (CoDel, Nichols and Jacobson 2012).
    """

    def __init__(self, loop_lag_s: float, descriptors: Callable[[], tuple[int, int]]) -> None:
        """``descriptors`` returns how many are open and may be; OSError where none is left."""
        self._bounds_s = (loop_lag_s, CRITICAL_TIMES * loop_lag_s)
        self._late_probes = [0, 0]
        self._descriptors = descriptors
        self._probes = 0
        self.open_descriptors, self._descriptors_max = descriptors()

    def note_lag(self, lag_s: float) -> None:
        """Take how late the loop woke a timer; call it some times a second."""
        for which, bound_s in enumerate(self._bounds_s):
            self._late_probes[which] = self._late_probes[which] + 1 if lag_s >= bound_s else 0
        self._probes += 1
        if self._probes % PROBES_PER_COUNT == 0:
            try:
                self.open_descriptors, self._descriptors_max = self._descriptors()
            except OSError:
                # Counting takes a descriptor, too: there is none left.
                self.open_descriptors = self._descriptors_max

    def check(self, ceiling: PriorityClass) -> None:
        """Let a request of a key with this ceiling in.

        Raises:
            Overloaded: the process can't take it.
        """
        critical = ceiling is PriorityClass.CRITICAL
        if self._late_probes[critical] >= LATE_PROBES:
            raise _overloaded("overloaded_loop")
        ratio = CRITICAL_DESCRIPTORS_RATIO if critical else DESCRIPTORS_RATIO
        if self.open_descriptors >= ratio * self._descriptors_max:
            raise _overloaded("overloaded_descriptors")


class BodyMemory:
    """The bytes of all request bodies that a router holds: read, queued and running."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._tenants: dict[TenantId, int] = {}
        self.held_bytes = 0

    @contextmanager
    def of(self, tenant: TenantId) -> Iterator[Callable[[int], None]]:
        """Hold a body within; yield what to call with the bytes of each piece that comes.

        That raises ``Overloaded`` where there is no room, ``RateLimited`` where the tenant has
        its share already.
        """
        own_bytes = 0

        def more(size_bytes: int) -> None:
            nonlocal own_bytes
            self._take(tenant, size_bytes)
            own_bytes += size_bytes

        try:
            yield more
        finally:
            self._give_back(tenant, own_bytes)

    def _take(self, tenant: TenantId, size_bytes: int) -> None:
        if self.held_bytes + size_bytes > self._most_bytes:
            raise _overloaded("overloaded_memory")
        of_tenant = self._tenants.get(tenant, 0) + size_bytes
        if of_tenant > TENANT_RATIO * self._most_bytes:
            raise RateLimited(
                "The bodies of your open requests are too large together; retry later.",
                code="overloaded_memory",
                retry_after_s=RETRY_AFTER_S,
            )
        self.held_bytes += size_bytes
        self._tenants[tenant] = of_tenant

    def _give_back(self, tenant: TenantId, size_bytes: int) -> None:
        self.held_bytes -= size_bytes
        left = self._tenants.get(tenant, 0) - size_bytes
        if left:
            self._tenants[tenant] = left
        else:
            self._tenants.pop(tenant, None)


def open_descriptors() -> tuple[int, int]:
    """Return how many descriptors this process has open, and how many it may have."""
    return psutil.Process().num_fds(), resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _overloaded(code: str) -> Overloaded:
    return Overloaded(
        "The gateway is overloaded; retry later.", code=code, retry_after_s=RETRY_AFTER_S
    )
