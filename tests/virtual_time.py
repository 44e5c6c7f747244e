"""An event loop whose time is virtual: a sleep takes none, and passes as soon as all else waits.

    run(main())      ``asyncio.get_running_loop().time`` is the clock to hand to what is tested

For code that waits for timers only; a socket or a thread would wait for real time.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")

TURN_S = 1e-7


class _Selector(selectors.DefaultSelector):
    """Lets the loop's clock jump to its next timer where a real one would sleep."""

    now_s = 1000.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("everything waits, and for no timer")
            self.now_s += timeout
        # Every turn takes a little, or what is due within rounding would never be.
        self.now_s += TURN_S
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Seconds since some moment, as always."""
        return self._virtual.now_s


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Run ``main`` on a loop of its own."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def in_virtual_time(
    test: Callable[Parameters, Coroutine[Any, Any, Result]],
) -> Callable[Parameters, Result]:
    """Have an asynchronous test run so."""

    @functools.wraps(test)
    def wrapper(*arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        return run(test(*arguments, **named))

    return wrapper
