"""From successive readings of a GPU's counters to faults; readings that cannot be are refused."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from serve_app.core.gpu_faults import ECC_XID, XID_MAX, Fault, Remedy, xid_fault

COUNT_MAX: Final = 10**9
GPUS_MAX: Final = 64

LAST_XID: Final = "DCGM_FI_DEV_XID_ERRORS"
XID_COUNT: Final = "DCGM_EXP_XID_ERRORS_COUNT"
ECC_DOUBLE_BIT: Final = "DCGM_FI_DEV_ECC_DBE_VOL_TOTAL"
REMAP_FAILED: Final = "DCGM_FI_DEV_ROW_REMAP_FAILURE"
SIGNALS: Final = frozenset({LAST_XID, XID_COUNT, ECC_DOUBLE_BIT, REMAP_FAILED})

# Numbers that tell of all the time since the driver was loaded.
_STANDING: Final = frozenset({LAST_XID, ECC_DOUBLE_BIT})


@dataclass(frozen=True, slots=True)
class Sample:
    """One number of DCGM's. ``xid`` is the label of XID_COUNT, None for the others."""

    gpu: str
    signal: str
    value: float
    xid: int | None = None


@dataclass(slots=True)
class Findings:
    """What a reading showed. ``lies`` are values that cannot be, worded for the log."""

    faults: list[Fault] = field(default_factory=list)
    lies: list[str] = field(default_factory=list)


_Key = tuple[str, str, int | None]


class ReadingHistory:
    """Compares each reading with the one before.

    What the first reading shows is where it stands, not news. So is each GPU's first last XID
    and ECC count, whenever it comes: a last XID stays in DCGM for as long as the driver runs,
    and was some earlier watcher's. A counter that went back was reset with its GPU, and counts
    from there; XID_COUNT covers a window, falls by itself, and is gone when the window has
    passed.
    """

    def __init__(self) -> None:
        self._last: dict[_Key, int] = {}
        self._gpus: set[str] = set()
        self._read = False

    def look(self, samples: Iterable[Sample]) -> Findings:
        """Return what is new in a reading."""
        found = Findings()
        counted: set[tuple[str, int]] = set()
        new_last: list[tuple[str, int]] = []
        seen: set[_Key] = set()
        for sample in samples:
            value = _checked(sample, found.lies)
            key = (sample.gpu, sample.signal, sample.xid)
            seen.add(key)
            if value is None or not self._has_room(key, found.lies):
                continue
            before = self._last.get(key)
            self._last[key] = value
            self._gpus.add(sample.gpu)
            if before is None and (not self._read or sample.signal in _STANDING):
                continue
            before = before or 0
            if sample.signal == LAST_XID and value and value != before:
                new_last.append((sample.gpu, value))
            elif sample.signal == XID_COUNT and value > before and sample.xid is not None:
                counted.add((sample.gpu, sample.xid))
                found.faults.append(xid_fault(sample.gpu, sample.xid))
            elif sample.signal == ECC_DOUBLE_BIT:
                self._look_at_ecc(sample.gpu, before, value, found)
            elif sample.signal == REMAP_FAILED and value and not before:
                what = "a memory row could not be remapped"
                found.faults.append(Fault(sample.gpu, what, Remedy.REPLACE_NODE))
        # Both tell of the same event where both are exported.
        found.faults += [xid_fault(*each) for each in new_last if each not in counted]
        self._read = True
        self._forget_counts(seen)
        return found

    def _forget_counts(self, seen: set[_Key]) -> None:
        # The exporter drops a count with its window: the next one of that XID is news.
        gone = [key for key in self._last if key[1] == XID_COUNT and key not in seen]
        for key in gone:
            del self._last[key]
        if gone:
            self._gpus = {gpu for gpu, _, _ in self._last}

    def _look_at_ecc(self, gpu: str, before: int, value: int, found: Findings) -> None:
        if value < before:
            found.lies.append(f"{ECC_DOUBLE_BIT} of {gpu} went back from {before} to {value}")
        elif value > before:
            what = f"{value - before} uncorrectable ECC errors"
            found.faults.append(Fault(gpu, what, xid_fault(gpu, ECC_XID).remedy))

    def _has_room(self, key: _Key, lies: list[str]) -> bool:
        if key[0] in self._gpus or len(self._gpus) < GPUS_MAX:
            return True
        lies.append(f"more than {GPUS_MAX} GPUs on a node; {key[0]!r:.80} is left out")
        return False


def _checked(sample: Sample, lies: list[str]) -> int | None:
    """Return a number that can be, else None with what is wrong with it."""
    value, of = sample.value, f"{sample.signal} of {sample.gpu!r:.80}"
    most = XID_MAX if sample.signal == LAST_XID else COUNT_MAX
    if not math.isfinite(value):
        lies.append(f"{of} is {value}")
    elif value < 0 or value > most or value != int(value):
        lies.append(f"{of} is {value:g}: not a whole number from 0 to {most}")
    elif sample.signal == XID_COUNT and sample.xid is None and value == 0:
        return None  # no XID within the window
    elif sample.signal == XID_COUNT and (sample.xid is None or not 0 < sample.xid <= XID_MAX):
        lies.append(f"{of} has no XID from 1 to {XID_MAX}")
    else:
        return int(value)
    return None
