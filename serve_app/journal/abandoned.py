"""Journals whose process is gone: found by their free locks, read, and then deleted."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve_app.journal.folder import LockedFolder, take_over
from serve_app.journal.frames import Entry, read_segment, segments

logger = logging.getLogger("headrace.journal")


class Abandoned:
    """A journal that this process has taken over. It blocks: use it on a thread."""

    def __init__(self, folder: LockedFolder) -> None:
        self._folder = folder
        self.name = folder.path.name
        self.problems: list[str] = []

    def batches(self) -> Iterator[list[Entry]]:
        """Yield the records of each segment, oldest first, whatever is wrong with its end.

        ``problems`` then says what could not be read, and where.
        """
        for path in segments(self._folder.path):
            segment = read_segment(path)
            if segment.problem is not None:
                problem = f"{path.name}: {segment.problem}"
                self.problems.append(problem)
                logger.error(
                    "journal repaired",
                    extra={"journal": self.name, "problem": problem, "kept": len(segment.entries)},
                )
            if segment.entries:
                yield list(segment.entries)

    def discard(self) -> None:
        """Delete the journal: every record of it is in the ledger."""
        self._folder.remove()


@contextmanager
def abandoned(path: Path) -> Iterator[Abandoned | None]:
    """Take over the journal in a folder while the block runs; None if it has an owner.

    What is not discarded then is there for whoever looks next.
    """
    folder = take_over(path)
    if folder is None:
        yield None
        return
    try:
        yield Abandoned(folder)
    finally:
        folder.release()


def journals(root: Path) -> list[Path]:
    """Return the folders of all journals below ``root``, owned or not."""
    try:
        return sorted(path for path in root.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []
