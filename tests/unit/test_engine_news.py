"""Whoever starts an engine must see how far it is, and at once why it cannot start."""

import json
from pathlib import Path
from typing import Any

import pytest

from serve_app.commands._engine_news import EngineFailed, EngineNews


class Screen:
    """A folder of logs, and what was said of them."""

    def __init__(self, folder: Path) -> None:
        self.lines: list[str] = []
        self._log = folder / "worker-1-2-3.err"
        self.news = EngineNews(folder, self.lines.append)

    def write(self, text: str) -> None:
        with self._log.open("a") as file:
            file.write(text)

    def event(self, event: str, **fields: Any) -> None:
        record = {"time": "t", "level": "info", "logger": "headrace.engine", "event": event}
        self.write(json.dumps(record | fields, separators=(",", ":")) + "\n")


@pytest.fixture
def screen(tmp_path: Path) -> Screen:
    return Screen(tmp_path)


def test_each_stage_is_said_once_and_other_lines_never(screen: Screen) -> None:
    screen.write("Loading safetensors checkpoint shards: 100%\n{broken\n")
    screen.event("engine starting", pool="small", doing="loading the model")
    screen.event("generation ended early", request_id="r")
    screen.news.tell()
    screen.news.tell()
    assert screen.lines == ["small: loading the model"]


def test_a_line_half_written_is_read_when_it_is_whole(screen: Screen) -> None:
    screen.write('{"logger":"headrace.engine","event":"engine starting","pool":"small",')
    screen.news.tell()
    assert screen.lines == []
    screen.write('"doing":"importing"}\n')
    screen.news.tell()
    assert screen.lines == ["small: importing"]


def test_a_ready_engine_says_what_it_holds_and_where_the_time_went(screen: Screen) -> None:
    stages_s = {"load": 8.04, "warm_up": 0.1}
    screen.event("engine started", pool="small", slots=32, kv_tokens=46592, stages_s=stages_s)
    screen.news.tell()
    [line] = screen.lines
    assert line == (
        "small: ready with 32 slots, 46,592 tokens of KV cache (load 8.0 s, warm-up 0.1 s)"
    )


def test_a_reason_that_stays_ends_the_wait_and_another_does_not(screen: Screen) -> None:
    screen.event("engine failed to start", pool="small", reason="out of\nmemory", hopeless=False)
    screen.news.tell()
    assert screen.lines == ["small: failed to start, trying again: out of memory"]
    screen.event("engine failed to start", pool="small", reason="no such dtype", hopeless=True)
    with pytest.raises(EngineFailed, match="small cannot start: no such dtype"):
        screen.news.tell()


def test_no_logs_are_no_news(tmp_path: Path) -> None:
    EngineNews(tmp_path / "missing", print).tell()
