"""Readiness, and the application's metrics while Control does not answer."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from serve_app.operations import MetricsCopy, Readiness
from tests.virtual_time import run

READY = Readiness(
    keys_loaded=True, limits_loaded=True, pools={"a": 1, "b": 0}, fast_path=True, control_away=False
)


@pytest.mark.parametrize(
    ("state", "ready"),
    [
        (READY, True),
        (replace(READY, control_away=True), True),
        (replace(READY, keys_loaded=False), False),
        (replace(READY, limits_loaded=False), False),
        (replace(READY, draining=True), False),
        (replace(READY, pools={"a": 0, "b": 0}), False),
        (replace(READY, pools={"a": 0}, sleeping=frozenset({"a"})), True),
    ],
)
def test_a_router_is_ready_when_a_first_request_would_be_served(
    state: Readiness, ready: bool
) -> None:
    assert state.ready is ready


def test_a_scrape_that_hangs_gets_the_last_copy_with_its_age() -> None:
    async def scrape_twice() -> None:
        answers = [b"up 1\n"]

        async def scrape() -> bytes:
            if not answers:
                await asyncio.Event().wait()
            return answers.pop()

        clock = asyncio.get_running_loop().time
        copy = MetricsCopy(scrape, clock)
        assert (await copy.text()).endswith(b"headrace_scrape_age_seconds 0.000\n")
        began_s = clock()
        text = await copy.text()
        assert text.startswith(b"up 1\n")
        assert text.endswith(b"headrace_scrape_age_seconds %.3f\n" % (clock() - began_s))

    run(scrape_twice())
