"""Stacks for the end-to-end tests: real processes, real HTTP, the unmodified client.

Run these through `make test` or `scripts/isolated`: they then have a network of their
own. Tests share stacks, each with the others that need the same one (what is reconfigured is
a test's own). A shared stack ends after the last test that uses it: an idle one takes a
quarter of a core from the others.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

from tests.e2e import fleet, policies, sim
from tests.stack import ROOT, Stack, running_stack

HERE = Path(__file__).resolve().parent
SHARED: dict[str, Callable[[], AbstractContextManager[Stack]]] = {
    "sim_stack": sim.running,
    "local_stack": lambda: running_stack(ROOT / "configs" / "local.yaml", ready_timeout_s=600),
    "policies_stack": policies.running,
    "fleet_stack": fleet.running,
}
OPEN = pytest.StashKey[dict[str, ExitStack]]()
WANTED = pytest.StashKey[Counter[str]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here starts a Ray cluster; the users of a shared stack come together."""
    places = [place for place, item in enumerate(items) if HERE in item.path.parents]
    ours = sorted((items[place] for place in places), key=shared_by, reverse=True)
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
    yield from shared(request, "local_stack")


@pytest.fixture(scope="session")
def policies_stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """One router before nine pools, its books in PostgreSQL; leave it as it is."""
    yield from shared(request, "policies_stack")


@pytest.fixture(scope="session")
def fleet_stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """Three routers before four pools; kill what you like, it is whole again for the next."""
    yield from shared(request, "fleet_stack")


@pytest.fixture(autouse=True)
def fleet_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave the fleet whole and idle."""
    yield
    if "fleet_stack" in request.fixturenames:
        fleet.settle(request.getfixturevalue("fleet_stack"))


def shared_by(item: pytest.Item) -> list[str]:
    return [name for name in SHARED if name in getattr(item, "fixturenames", ())]


def shared(request: pytest.FixtureRequest, name: str) -> Iterator[Stack]:
    """Start a stack that ends after its last user, or else with the session."""
    with request.session.stash[OPEN][name] as until_then:
        yield until_then.enter_context(SHARED[name]())
