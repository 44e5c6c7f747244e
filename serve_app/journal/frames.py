"""Records in a file: framed, numbered and checksummed, so that what is torn is recognised.

    segment:  magic (8 bytes) | frame | frame | ... | zeros
    frame:    length u32 | crc32 u32 | sequence u64 | payload       little-endian

A segment is made full of zeros: appending to it changes no metadata, which makes it cheaper
to bring to the disk, and its room is there when the disk is full. A length of zero is
therefore the end. The checksum covers the sequence and the payload.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MAGIC: Final = b"hrjrnl\x00\x01"
PAYLOAD_BYTES_MAX: Final = 1 << 20
SEGMENT_SUFFIX: Final = ".seg"

_FRAME: Final = struct.Struct("<IIQ")
_SEQUENCE: Final = struct.Struct("<Q")
FRAME_BYTES: Final = _FRAME.size


@dataclass(frozen=True, slots=True)
class Entry:
    """A record and its number; numbers grow by one from record to record."""

    sequence: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Segment:
    """What could be read of a file. ``problem`` says why reading ended early, if it did."""

    entries: tuple[Entry, ...]
    problem: str | None = None


def frame(sequence: int, payload: bytes) -> bytes:
    """Return a record as it stands in a segment."""
    assert 0 < len(payload) <= PAYLOAD_BYTES_MAX, "a payload has a length that can be read back"
    checksum = zlib.crc32(payload, zlib.crc32(_SEQUENCE.pack(sequence)))
    return _FRAME.pack(len(payload), checksum, sequence) + payload


def read_segment(path: Path) -> Segment:
    """Read a segment up to its end, or up to the first frame that is not whole.

    Raises:
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    if not data.startswith(MAGIC):
        whole = data.strip(b"\0")
        return Segment((), f"no journal: it begins with {data[:8]!r}" if whole else None)
    entries: list[Entry] = []
    at = len(MAGIC)
    while at < len(data):
        found = _read_frame(data, at, entries[-1].sequence + 1 if entries else None)
        if isinstance(found, Entry):
            entries.append(found)
            at += FRAME_BYTES + len(found.payload)
            continue
        rest = data[at:].rstrip(b"\0")
        problem = f"{len(rest)} bytes after record {len(entries)} are {found}" if rest else None
        return Segment(tuple(entries), problem)
    return Segment(tuple(entries))


def segments(folder: Path) -> list[Path]:
    """Return a journal's segments, oldest first."""
    return sorted(folder.glob(f"*{SEGMENT_SUFFIX}"))


def _read_frame(data: bytes, at: int, sequence: int | None) -> Entry | str:
    """Return the frame at ``at``, or what is wrong with it."""
    if at + FRAME_BYTES > len(data):
        return "cut off"
    length, checksum, number = _FRAME.unpack_from(data, at)
    if not 0 < length <= PAYLOAD_BYTES_MAX:
        return "damaged"
    payload = data[at + FRAME_BYTES : at + FRAME_BYTES + length]
    if len(payload) < length:
        return "cut off"
    if zlib.crc32(payload, zlib.crc32(_SEQUENCE.pack(number))) != checksum:
        return "damaged"
    if sequence is not None and number != sequence:
        return f"out of order ({number} in place of {sequence})"
    return Entry(number, payload)
