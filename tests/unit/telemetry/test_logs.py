"""Request lines and events as a log reader sees them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from serve_app.telemetry.logs import (
    MAX_TEXT_CHARACTERS,
    RequestLine,
    RequestLog,
    configure,
    render_request_line,
)

LINE = RequestLine(
    ended_at_s=1_700_000_000.25,
    request_id="req-1",
    endpoint="chat",
    status=200,
    decision="dispatched",
    outcome="completed",
    tenant="acme",
    output_tokens=0,
    duration_s=0.123456789,
)


class FullDisk(io.StringIO):
    def flush(self) -> None:
        raise OSError("No space left on device")


@pytest.fixture
def headrace_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("headrace")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield logger
    logger.handlers[:], logger.level, logger.propagate = before


def test_a_request_line_is_one_json_object_without_empty_fields() -> None:
    text = render_request_line(LINE).decode()

    assert text.endswith("\n")
    assert text.count("\n") == 1
    assert json.loads(text) == {
        "time": "2023-11-14T22:13:20.250+00:00",
        "event": "request",
        "request_id": "req-1",
        "endpoint": "chat",
        "status": 200,
        "decision": "dispatched",
        "outcome": "completed",
        "tenant": "acme",
        "output_tokens": 0,
        "duration_s": 0.123457,
    }


def test_the_audit_record_has_no_field_for_content_or_keys() -> None:
    names = set(RequestLine.__struct_fields__)

    assert not names & {"prompt", "messages", "body", "output", "text", "key", "secret", "headers"}


def test_hostile_text_stays_inside_its_field() -> None:
    hostile = 'x"}\n{"event":"request","tenant":"forged\ud800' + "a" * 10_000
    line = RequestLine(1.0, "r", "chat", 404, "refused", model=hostile)

    text = render_request_line(line).decode()

    assert text.count("\n") == 1
    assert json.loads(text)["model"].startswith('x"}\n{')
    assert len(json.loads(text)["model"]) == MAX_TEXT_CHARACTERS


def test_lines_wait_until_flushed() -> None:
    stream = io.StringIO()
    log = RequestLog(stream)

    log.write(LINE)
    log.write(LINE)
    assert stream.getvalue() == ""

    log.flush()
    log.flush()
    assert len(stream.getvalue().splitlines()) == 2


def test_a_full_buffer_flushes_itself() -> None:
    stream = io.StringIO()
    size_bytes = len(render_request_line(LINE))
    log = RequestLog(stream, flush_bytes=2 * size_bytes)

    log.write(LINE)
    assert stream.getvalue() == ""
    log.write(LINE)
    assert len(stream.getvalue().splitlines()) == 2


def test_a_stream_that_fails_loses_lines_and_counts_them() -> None:
    log = RequestLog(FullDisk())
    log.write(LINE)
    log.write(LINE)

    log.flush()
    assert log.lost_lines == 2

    log.flush()
    assert log.lost_lines == 2, "lost lines are not kept for another try"


def test_what_a_library_adds_to_every_record_stays_out(headrace_logger: logging.Logger) -> None:
    usual = logging.getLogRecordFactory()

    def stamped(*args: Any, **options: Any) -> logging.LogRecord:
        record = usual(*args, **options)
        record.stamp = "library's own"
        return record

    logging.setLogRecordFactory(stamped)
    stream = io.StringIO()
    configure(stream)
    try:
        headrace_logger.info("engine started", extra={"pool": "chat"})
    finally:
        logging.setLogRecordFactory(usual)
    event = json.loads(stream.getvalue())
    assert event["pool"] == "chat"
    assert "stamp" not in event


def test_events_are_json_with_their_extras(headrace_logger: logging.Logger) -> None:
    stream = io.StringIO()
    configure(stream)

    headrace_logger.getChild("engine").info("engine started", extra={"pool": "chat", "slots": 8})

    event = json.loads(stream.getvalue())
    assert event.pop("time")
    assert event == {
        "level": "info",
        "logger": "headrace.engine",
        "event": "engine started",
        "pool": "chat",
        "slots": 8,
    }


def test_an_exception_stays_on_one_line(headrace_logger: logging.Logger) -> None:
    stream = io.StringIO()
    configure(stream)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        headrace_logger.exception("it failed")

    [text] = stream.getvalue().splitlines()
    assert "ValueError: two\nlines" in json.loads(text)["exception"]


def test_configuring_twice_writes_each_event_once(headrace_logger: logging.Logger) -> None:
    first, second = io.StringIO(), io.StringIO()
    configure(first)
    configure(second)

    headrace_logger.warning("once")

    assert first.getvalue() == ""
    assert len(second.getvalue().splitlines()) == 1
