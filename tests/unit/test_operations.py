"""The application's metrics while Control does not answer."""

from __future__ import annotations

import asyncio

from serve_app.operations import MetricsCopy
from tests.virtual_time import run


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
