"""Journals whose process is gone: found by their free locks, read, and then deleted.

A file that is damaged may have whole records behind the damage: it is kept beside the journals.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from serve_app.journal.folder import LockedFolder, sync_folder, take_over
from serve_app.journal.frames import Entry, read_segment, segments

logger = logging.getLogger("headrace.journal")

DAMAGED_SUFFIX: Final = ".damaged"


class Abandoned:
    """A journal that this process has taken over. It blocks: use it on a thread."""

    def __init__(self, folder: LockedFolder) -> None:
        self._folder = folder
        self.name = folder.path.name
        self.problems: list[str] = []
        self._damaged: set[Path] = set()

    def batches(self) -> Iterator[list[Entry]]:
        """Yield the records of each segment, oldest first, whatever is wrong with its end.

        ``problems`` then says what could not be read, and where.
        """
        for path in segments(self._folder.path):
            segment = read_segment(path)
            if segment.problem is not None:
                problem = f"{path.name}: {segment.problem}"
                self.problems.append(problem)
                self._damaged.add(path)
                logger.error(
                    "journal repaired",
                    extra={"journal": self.name, "problem": problem, "kept": len(segment.entries)},
                )
            if segment.entries:
                yield list(segment.entries)

    def discard(self) -> None:
        """Delete the journal: every record that could be read is in the ledger.

        Raises:
            OSError: a damaged file cannot be kept; the journal stays as it is.
        """
        for path in sorted(self._damaged):
            _keep_aside(path)
        self._folder.remove()


def _keep_aside(path: Path) -> None:
    """Move a segment out of its journal, to where nobody looks for journals."""
    journal = path.parent
    name = f"{journal.name}-{path.stem}"
    aside = journal.with_name(name + DAMAGED_SUFFIX)
    number = 1
    while aside.exists():
        number += 1
        aside = journal.with_name(f"{name}-{number}{DAMAGED_SUFFIX}")
    path.rename(aside)
    sync_folder(journal.parent)
    logger.error("a damaged file of a journal is kept", extra={"file": str(aside)})


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
