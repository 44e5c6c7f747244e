"""One GPU watcher per node: who holds the lock acts, others stand by."""

from __future__ import annotations

import logging
from pathlib import Path

from filelock import FileLock, Timeout

from serve_app.gpu_health import WatchMetrics

logger = logging.getLogger("headrace.gpu")


class Turn:
    """One watcher per node: who holds the lock acts, others stand by."""

    def __init__(self, lock_file: Path, metrics: WatchMetrics) -> None:
        """Raises OSError when the file's folder cannot be made."""
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(lock_file)
        self._metrics = metrics
        self._told = False

    def mine(self) -> bool:
        """Return whether it is this process's turn; it then stays so until it ends."""
        if self._lock.is_locked:
            return True
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            self._metrics.standby.set(1)
            if not self._told:
                logger.warning("gpu standby", extra={"lock": self._lock.lock_file})
            self._told = True
            return False
        self._metrics.standby.set(0)
        logger.info("gpu watching", extra={"lock": self._lock.lock_file})
        return True

    def over(self) -> None:
        """Let another watcher act."""
        self._lock.release()
