"""Notices that a node will be taken away: a file, and fake metadata services of two clouds."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from serve_app.config import SpotSettings
from serve_app.engine.eviction import (
    AwsNotices,
    EvictionNotice,
    EvictionSource,
    EvictionWatch,
    FileNotices,
    GceNotices,
    sources_of,
)
from tests.virtual_time import run

NOTICE = EvictionNotice(1_000.0, "aws")


class Metadata:
    """A cloud's metadata service on a node, strict about what it is asked."""

    def __init__(self) -> None:
        self.preempted = False
        self.action: str | None = None
        self.token = "t-1"
        self.status: int | None = None

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(self.answer))

    def answer(self, request: httpx.Request) -> httpx.Response:
        if self.status is not None:
            return httpx.Response(self.status)
        name = (request.method, request.url.path)
        if name == ("GET", "/computeMetadata/v1/instance/preempted"):
            if request.headers.get("metadata-flavor") != "Google":
                return httpx.Response(403)
            return httpx.Response(200, text="TRUE\n" if self.preempted else "FALSE")
        if name == ("PUT", "/latest/api/token"):
            assert int(request.headers["x-aws-ec2-metadata-token-ttl-seconds"]) > 0
            return httpx.Response(200, text=self.token)
        assert name == ("GET", "/latest/meta-data/spot/instance-action"), name
        if request.headers.get("x-aws-ec2-metadata-token") != self.token:
            return httpx.Response(401)
        if self.action is None:
            return httpx.Response(404, text="no such page")
        return httpx.Response(200, text=self.action)


async def test_gce_gives_notice_once_and_its_time_does_not_move() -> None:
    service = Metadata()
    now_s = 50.0
    source = GceNotices(service.client(), "http://metadata", 30.0, lambda: now_s)
    assert await source.look() is None
    service.preempted = True
    assert await source.look() == EvictionNotice(80.0, "gce")
    now_s = 70.0
    assert await source.look() == EvictionNotice(80.0, "gce")


async def test_aws_says_when_and_is_asked_with_a_token_that_is_renewed() -> None:
    service = Metadata()
    source = AwsNotices(service.client(), "http://metadata")
    assert await source.look() is None
    service.token = "t-2"
    assert await source.look() is None
    service.token = "t-3"
    service.action = '{"action": "terminate", "time": "2017-09-18T08:22:00Z"}'
    assert await source.look() == EvictionNotice(1_505_722_920.0, "aws")


async def test_a_file_gives_notice_from_when_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "going"
    source = FileNotices(file, 60.0, 150.0)
    assert await source.look() is None
    file.touch()
    os.utime(file, (100.0, 100.0))
    assert await source.look() == EvictionNotice(160.0, "file")
    os.utime(file, (80.0, 80.0))
    assert await source.look() is None, "an eviction that was over before this replica began"


class Script:
    """A source that says one thing after another, the last for ever."""

    def __init__(self, *says: EvictionNotice | Exception | None) -> None:
        self.says = list(says)
        self.asked = 0

    async def look(self) -> EvictionNotice | None:
        self.asked += 1
        said = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        if isinstance(said, Exception):
            raise said
        return said


def heard_in(seconds: float, *sources: EvictionSource) -> list[EvictionNotice]:
    """Return what a watch of these sources heard in so many virtual seconds."""

    async def main() -> list[EvictionNotice]:
        heard: list[EvictionNotice] = []
        watch = EvictionWatch(sources, heard.append, poll_s=1.0)
        watch.start()
        await asyncio.sleep(seconds)
        await watch.stop()
        return heard

    return run(main())


def test_a_notice_is_told_once_and_again_when_its_time_changes() -> None:
    earlier = EvictionNotice(900.0, "aws")
    assert heard_in(9.5, Script(None, NOTICE, NOTICE, earlier)) == [NOTICE, earlier]


def test_one_source_that_is_away_hides_no_other(caplog: pytest.LogCaptureFixture) -> None:
    class Silent:
        async def look(self) -> EvictionNotice | None:
            await asyncio.Event().wait()
            return None

    away = Script(OSError("nobody there"))
    assert heard_in(9.5, away, Silent(), Script(None, NOTICE)) == [NOTICE]
    assert away.asked == 10
    said = [each for each in caplog.records if each.getMessage() == "no word on evictions"]
    assert len(said) == 2, "each is told of once"


def test_a_source_that_was_away_is_heard_when_it_is_back() -> None:
    assert heard_in(9.5, Script(OSError("x"), None, OSError("x"), NOTICE)) == [NOTICE]


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, []),
        ({"source": "file", "file": "/somewhere"}, [FileNotices]),
        ({"source": "gce", "notice_s": 30}, [GceNotices]),
        ({"source": "aws", "url": "http://127.0.0.1:9"}, [AwsNotices]),
    ],
)
def test_settings_name_the_source(
    settings: dict[str, str], kinds: list[Callable[..., EvictionSource]]
) -> None:
    spot = SpotSettings.model_validate(settings)
    assert [type(each) for each in sources_of(spot, lambda: 0.0)] == kinds


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"source": "file"}, "file goes with `source: file`"),
        ({"file": "x"}, "file goes with `source: file`"),
        ({"url": "http://x"}, "url goes with"),
        ({"notice_s": 1}, "notice_s"),
        ({"source": "gce"}, "notice_s is at most 30"),
        ({"notice_s": 30, "poll_s": 10}, "poll_s is at most a fifth"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        SpotSettings.model_validate(settings)
