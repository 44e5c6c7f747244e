"""Stacks for the end-to-end tests: real processes, real HTTP, the unmodified client.

Run these through `make test` or `scripts/isolated`: they then have a network of their
own. A test that kills or reconfigures something starts a stack of its own. What uses a
shared stack runs first, and each ends after the last test that uses it: an idle one takes
a quarter of a core from the others.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.stack import ROOT, Stack, running_stack

HERE = Path(__file__).resolve().parent
SHARED = {"sim_stack": "sim.yaml", "local_stack": "local.yaml"}
OPEN = pytest.StashKey[dict[str, ExitStack]]()
WANTED = pytest.StashKey[Counter[str]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here starts a Ray cluster; users of the shared stacks come first."""
    places = [place for place, item in enumerate(items) if HERE in item.path.parents]
    ours = sorted((items[place] for place in places), key=lambda item: not shared_by(item))
    for place, item in zip(places, ours, strict=True):
        item.add_marker(pytest.mark.ray)
        items[place] = item


def pytest_collection_finish(session: pytest.Session) -> None:
    """Count who will use the shared stacks."""
    session.stash[OPEN] = {name: ExitStack() for name in SHARED}
    session.stash[WANTED] = Counter(name for item in session.items for name in shared_by(item))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """End the stacks that nobody will use any more."""
    for name in shared_by(item):
        item.session.stash[WANTED][name] -= 1
        if not item.session.stash[WANTED][name]:
            item.session.stash[OPEN][name].close()


def pytest_report_header() -> str:
    isolated = os.environ.get("HEADRACE_ISOLATED") == "1"
    network = "of their own" if isolated else "this machine's (scripts/isolated gives an own one)"
    return f"stacks' network: {network}"


@pytest.fixture(scope="session")
def sim_stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """The simulated engines of configs/sim.yaml; shared, so leave it as it is."""
    yield from shared(request, "sim_stack")


@pytest.fixture(scope="session")
def local_stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """The real model of configs/local.yaml; shared, so leave it as it is."""
    yield from shared(request, "local_stack", ready_timeout_s=600)


def shared_by(item: pytest.Item) -> list[str]:
    return [name for name in SHARED if name in getattr(item, "fixturenames", ())]


def shared(
    request: pytest.FixtureRequest, name: str, ready_timeout_s: float = 240
) -> Iterator[Stack]:
    """Start a stack that ends after its last user, or else with the session."""
    config = ROOT / "configs" / SHARED[name]
    with request.session.stash[OPEN][name] as until_then:
        yield until_then.enter_context(running_stack(config, ready_timeout_s=ready_timeout_s))
