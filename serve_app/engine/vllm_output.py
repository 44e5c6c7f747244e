"""What vLLM's processes print, read back when they fail.

The engine and its workers are processes of vLLM's own. When one of them fails, the
replica learns only that it did ("See root cause above"); the cause stands in the output
they share with it. In a replica that output is a file of Ray's.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

LONGEST_READ_BYTES = 2**20
LONGEST_CAUSE_CHARACTERS = 600

# A logged traceback's last line: `(Worker pid=7) ERROR 01-31 12:00:00 [file.py:1] ValueError: no`
_ERROR_LINE = re.compile(r"ERROR \S+ \S+ \[[^\]]*\] ([\w.]*(?:Error|Exception): \S.*)")
_SECOND_HAND = ("initialization failed", "died unexpectedly", "EngineCore encountered")


class OwnOutput:
    """What this process and its children print to standard output and error from now on."""

    def __init__(self) -> None:
        self._begins_bytes: dict[Path, int] = {}
        for descriptor in (1, 2):
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode):
                path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
                self._begins_bytes[path] = status.st_size

    def read(self) -> str:
        """Return the last of it, at most LONGEST_READ_BYTES per file; "" if it is no file."""
        texts = []
        for path, begin_bytes in self._begins_bytes.items():
            try:
                with path.open("rb") as file:
                    size_bytes = file.seek(0, os.SEEK_END)
                    file.seek(max(begin_bytes, size_bytes - LONGEST_READ_BYTES))
                    texts.append(file.read().decode(errors="replace"))
            except OSError:
                continue
        return "\n".join(texts)


def root_cause(output: str) -> str | None:
    """Return the first error that a process of vLLM logged, None if there is none.

    The first is the innermost: a process that fails because another did says so later.
    """
    for found in _ERROR_LINE.finditer(output):
        error = found.group(1)
        if not any(phrase in error for phrase in _SECOND_HAND):
            kind, _, message = error.partition(": ")
            return f"{kind.rpartition('.')[2]}: {message}"[:LONGEST_CAUSE_CHARACTERS]
    return None
