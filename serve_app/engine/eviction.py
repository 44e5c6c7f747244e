"""Notice that a replica's node will be taken away, from whoever knows first.

Ray knows of a node that was asked to end (SIGTERM, `ray drain-node`); a cloud's metadata
service of a spot node before that; a file of whatever else an operator has. Each is asked
every ``poll_s``; one that does not answer says nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import msgspec

from serve_app.config import SpotSettings
from serve_app.periodic import Periodic

logger = logging.getLogger("headrace.eviction")

ANSWER_S: Final = 2.0
GCE_URL: Final = "http://metadata.google.internal"
AWS_URL: Final = "http://169.254.169.254"
_TOKEN_S: Final = 300


@dataclass(frozen=True, slots=True)
class EvictionNotice:
    """A node will be gone at ``gone_at_s``, wall seconds; None if nobody said when."""

    gone_at_s: float | None
    source: str


class EvictionSource(Protocol):
    """One that may give notice."""

    async def look(self) -> EvictionNotice | None:
        """Return the notice, None while there is none, or raise if that cannot be said."""


class EvictionWatch:
    """Asks its sources for as long as it runs. On one event loop only."""

    def __init__(
        self,
        sources: Sequence[EvictionSource],
        on_notice: Callable[[EvictionNotice], None],
        poll_s: float,
    ) -> None:
        """``on_notice`` hears each notice once, and again if its time changes."""
        self._on_notice = on_notice
        self._heard: dict[int, EvictionNotice] = {}
        self._away: set[int] = set()
        failed = "a notice could not be followed"
        self._looking = [
            Periodic(partial(self._look, number, source), poll_s, logger, failed)
            for number, source in enumerate(sources)
        ]

    def start(self) -> None:
        """Begin on the running loop."""
        for each in self._looking:
            each.start()

    async def stop(self) -> None:
        """End. Idempotent."""
        for each in self._looking:
            await each.stop()

    async def _look(self, number: int, source: EvictionSource) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                notice = await source.look()
        except Exception as error:  # noqa: BLE001  # away in whatever way; it is asked again
            if number not in self._away:
                told = f"{type(error).__name__}: {error!s:.200}"
                logger.warning("no word on evictions", extra={"reason": told})
            self._away.add(number)
            return
        self._away.discard(number)
        if notice is not None and self._heard.get(number) != notice:
            self._heard[number] = notice
            self._on_notice(notice)


class FileNotices:
    """A file that appears: the notice was given when it was last written.

    One that was over before ``since_s``, by the wall clock, is of an eviction that is past
    or was called off.
    """

    def __init__(self, file: Path, notice_s: float, since_s: float) -> None:
        self._file = file
        self._notice_s = notice_s
        self._since_s = since_s

    async def look(self) -> EvictionNotice | None:
        """See EvictionSource."""
        with suppress(FileNotFoundError):
            written_s = (await asyncio.to_thread(os.stat, self._file)).st_mtime
            gone_at_s = written_s + self._notice_s
            return EvictionNotice(gone_at_s, "file") if gone_at_s > self._since_s else None
        return None


class Metadata(Protocol):
    """An HTTP client, as far as metadata services need one; httpx.AsyncClient is one."""

    async def request(self, method: str, url: str, *, headers: dict[str, str]) -> MetadataAnswer:
        """Ask."""


class MetadataAnswer(Protocol):
    """An HTTP answer."""

    @property
    def status_code(self) -> int: ...
    @property
    def text(self) -> str: ...


class GceNotices:
    """GCE's ``instance/preempted``: TRUE from 30 s before the end on."""

    def __init__(
        self, client: Metadata, url: str, notice_s: float, wall_clock: Callable[[], float]
    ) -> None:
        self._client = client
        self._url = url.rstrip("/") + "/computeMetadata/v1/instance/preempted"
        self._notice_s = notice_s
        self._wall_clock = wall_clock
        self._notice: EvictionNotice | None = None

    async def look(self) -> EvictionNotice | None:
        """See EvictionSource."""
        if self._notice is None:
            answer = await self._client.request(
                "GET", self._url, headers={"metadata-flavor": "Google"}
            )
            _must_be(answer, 200)
            if answer.text.strip() == "TRUE":
                self._notice = EvictionNotice(self._wall_clock() + self._notice_s, "gce")
        return self._notice


class _Action(msgspec.Struct):
    action: str
    time: datetime


class AwsNotices:
    """AWS's ``spot/instance-action`` by IMDSv2: 404 until two minutes before the end."""

    def __init__(self, client: Metadata, url: str) -> None:
        self._client = client
        self._url = url.rstrip("/") + "/latest"
        self._token: str | None = None

    async def look(self) -> EvictionNotice | None:
        """See EvictionSource."""
        answer = await self._ask(self._token or await self._renewed())
        if answer.status_code == 401:  # the token's time is over
            answer = await self._ask(await self._renewed())
        if answer.status_code == 404:
            return None
        _must_be(answer, 200)
        action = msgspec.json.decode(answer.text, type=_Action)
        return EvictionNotice(action.time.timestamp(), "aws")

    async def _ask(self, token: str) -> MetadataAnswer:
        return await self._client.request(
            "GET",
            self._url + "/meta-data/spot/instance-action",
            headers={"x-aws-ec2-metadata-token": token},
        )

    async def _renewed(self) -> str:
        ttl = {"x-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
        answer = await self._client.request("PUT", self._url + "/api/token", headers=ttl)
        _must_be(answer, 200)
        self._token = answer.text
        return answer.text


def sources_of(spot: SpotSettings, wall_clock: Callable[[], float]) -> list[EvictionSource]:
    """Return who else than Ray gives notice, as a pool's settings name it."""
    if spot.file is not None:
        return [FileNotices(Path(spot.file), spot.notice_s, wall_clock())]
    if spot.source == "node":
        return []
    import httpx  # a quarter of a second that other pools need not wait for

    # The service is on the node itself: no proxy knows it.
    client = httpx.AsyncClient(trust_env=False, timeout=ANSWER_S)
    if spot.source == "gce":
        return [GceNotices(client, spot.url or GCE_URL, spot.notice_s, wall_clock)]
    return [AwsNotices(client, spot.url or AWS_URL)]


def _must_be(answer: MetadataAnswer, status: int) -> None:
    if answer.status_code != status:
        raise ValueError(f"the metadata service answered {answer.status_code}")
