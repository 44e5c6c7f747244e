"""What starting engines say of themselves in Ray's logs on this machine.

A replica says nothing to whoever deployed it until its constructor ends, which takes an
engine seconds to minutes, and a failed one Serve tries again before it says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ENGINE_LOGGER = b'"logger":"headrace.engine"'


class EngineFailed(Exception):
    """An engine cannot start, and would not if it were tried again."""


class EngineNews:
    """Reads the events that engines log to Ray's session folder, each once.

    ``folder`` is the session's ``logs``; ``say`` gets a line of text per event.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self._read_bytes: dict[Path, int] = {}

    def tell(self) -> None:
        """Say what was logged since the last call.

        Raises:
            EngineFailed: an engine failed for a reason that stays.
        """
        for event in self._events():
            pool = event.get("pool", "engine")
            match event.get("event"):
                case "engine starting":
                    self._say(f"{pool}: {event.get('doing')}")
                case "engine started":
                    self._say(f"{pool}: {_summary(event)}")
                case "engine failed to start":
                    reason = " ".join(str(event.get("reason")).split())
                    if event.get("hopeless"):
                        raise EngineFailed(f"{pool} cannot start: {reason}")
                    self._say(f"{pool}: failed to start, trying again: {reason}")

    def _events(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self._folder.glob("worker-*.err")):
            begin_bytes = self._read_bytes.get(path, 0)
            if path.stat().st_size <= begin_bytes:
                continue
            with path.open("rb") as file:
                file.seek(begin_bytes)
                data = file.read()
            whole_bytes = data.rfind(b"\n") + 1
            self._read_bytes[path] = begin_bytes + whole_bytes
            for line in data[:whole_bytes].splitlines():
                if line.startswith(b"{") and ENGINE_LOGGER in line:
                    yield json.loads(line)


def _summary(event: dict[str, Any]) -> str:
    stages: dict[str, float] = event.get("stages_s") or {}
    took = ", ".join(
        f"{name.replace('_', '-')} {spent_s:.1f} s" for name, spent_s in stages.items()
    )
    holds = f"{event.get('slots')} slots, {event.get('kv_tokens', 0):,} tokens of KV cache"
    return f"ready with {holds}" + (f" ({took})" if took else "")
