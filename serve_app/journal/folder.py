"""A journal's folder: locked by the process that writes it, for as long as that lives.

The lock is the kernel's and ends with its process, however that ends. A folder gets its
name only once it is locked, so that nobody takes a new journal for one left behind.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import Final

LOCK: Final = "lock"
UNFINISHED: Final = ".new-"


class LockedFolder:
    """A folder whose lock this process holds."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    def remove(self) -> None:
        """Delete the folder and let the lock go."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Let the lock go; whoever looks next finds the folder. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def make_locked(root: Path, name: str) -> LockedFolder:
    """Make a folder of this name below ``root`` and lock it.

    Raises:
        OSError: it cannot be made, or exists already.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = root / f"{UNFINISHED}{name}-{os.getpid()}"
    unfinished.mkdir(mode=0o700)
    lock = os.open(unfinished / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(unfinished, root / name)
        sync_folder(root)
    except OSError:
        os.close(lock)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return LockedFolder(root / name, lock)


def take_over(path: Path) -> LockedFolder | None:
    """Lock a folder that its owner left; None if it is locked, gone, or no journal's."""
    if path.name.startswith("."):
        return None
    try:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had it may have deleted it between our opening and our locking.
        gone = os.fstat(lock).st_nlink == 0
    except OSError:
        gone = True
    if gone:
        os.close(lock)
        return None
    return LockedFolder(path, lock)


def sync_folder(path: Path) -> None:
    """Bring a folder's list of names to the disk."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
