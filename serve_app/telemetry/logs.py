"""Structured logs: events through ``logging``, and one line per request. JSON lines.

A request's line has a closed set of fields (the audit record): no prompt, no output, no
key and no header can get into it. Lines are buffered and written together, because one
write per request costs a router more than the line itself.
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Protocol

import msgspec
import orjson

ROOT_LOGGER = "headrace"
FLUSH_BYTES = 64 * 1024
MAX_TEXT_CHARACTERS = 256

_FORMATTED_FIELDS = {"message", "asctime", "taskName"}


class TextStream(Protocol):
    """Where lines go."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...


class RequestLine(msgspec.Struct, frozen=True):
    """The audit record of one request: who, what, decided how, ended how. Never content.

    ``ended_at_s`` is wall time since the epoch; ``*_s`` else are durations in seconds.
    ``client_request_id`` is the client's own label. A field that does not apply is None
    and left out of the line.
    """

    ended_at_s: float
    request_id: str
    endpoint: str
    status: int
    decision: str
    outcome: str | None = None
    reason: str | None = None
    client_request_id: str | None = None
    tenant: str | None = None
    user: str | None = None
    key_id: str | None = None
    model: str | None = None
    revision: str | None = None
    pool: str | None = None
    replica: str | None = None
    class_asked: str | None = None
    class_served: str | None = None
    degraded: str | None = None
    attempts: int | None = None
    continuations: int | None = None
    not_continued: str | None = None
    finish_reason: str | None = None
    input_tokens: int | None = None
    cached_input_tokens: int | None = None
    output_tokens: int | None = None
    queue_wait_s: float | None = None
    time_to_first_token_s: float | None = None
    time_per_output_token_s: float | None = None
    duration_s: float | None = None


_REQUEST_FIELDS = tuple(name for name in RequestLine.__struct_fields__ if name != "ended_at_s")


class RequestLog:
    """Writes request lines, many at a time. Whoever owns it calls ``flush`` every second.

    Not thread-safe: one event loop's only. At most ``flush_bytes`` and one line wait.
    """

    def __init__(self, stream: TextStream, *, flush_bytes: int = FLUSH_BYTES) -> None:
        assert flush_bytes > 0
        self._stream = stream
        self._flush_bytes = flush_bytes
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self.lost_lines = 0

    def write(self, line: RequestLine) -> None:
        """Add one line; texts are cut at MAX_TEXT_CHARACTERS."""
        data = render_request_line(line)
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes >= self._flush_bytes:
            self.flush()

    def flush(self) -> None:
        """Hand everything that waits to the stream.

        A stream that cannot be written loses these lines, counted in ``lost_lines``:
        requests are not failed for their log.
        """
        if not self._waiting:
            return
        lines, self._waiting, self._waiting_bytes = self._waiting, [], 0
        try:
            self._stream.write(b"".join(lines).decode())
            self._stream.flush()
        except (OSError, ValueError):
            self.lost_lines += len(lines)


class JsonFormatter(logging.Formatter):
    """A log record as one JSON object: time, level, logger, event, and its extras."""

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, object] = {
            "time": _wall_time(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        # Ray and vLLM install record factories that add fields of their own to every record.
        common = vars(logging.makeLogRecord({})).keys() | _FORMATTED_FIELDS
        for name, value in vars(record).items():
            if name not in common and name not in event:
                event[name] = value
        if record.exc_info and record.exc_info[0] is not None:
            event["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def process_stderr() -> TextStream:
    """Return the process's own standard error, file descriptor 2.

    In a replica Serve puts a logger in place of ``sys.stderr`` which, with its throughput
    flags, holds a thousand records back before it writes one.
    """
    return open(2, "w", encoding="utf-8", errors="replace", closefd=False)


def configure(stream: TextStream | None = None, *, level: int = logging.INFO) -> None:
    """Send Headrace's log events to ``stream`` (standard error) as JSON lines.

    Repeating it replaces the earlier stream. Other libraries' loggers are left alone.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger(ROOT_LOGGER)
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def render_request_line(line: RequestLine) -> bytes:
    """Return the line as JSON with a line feed at its end, None fields left out."""
    record: dict[str, object] = {"time": _wall_time(line.ended_at_s), "event": "request"}
    for name in _REQUEST_FIELDS:
        value = getattr(line, name)
        if value is not None:
            record[name] = _bounded(value)
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def _bounded(value: str | int | float) -> str | int | float:
    """Return a float to the microsecond, a text cut and without what UTF-8 cannot carry."""
    if isinstance(value, str):
        text = value[:MAX_TEXT_CHARACTERS]
        return text if text.isascii() else text.encode("utf-8", "replace").decode()
    return round(value, 6) if isinstance(value, float) else value


def _wall_time(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds")
