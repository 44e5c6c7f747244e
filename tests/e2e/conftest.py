"""Stacks for the end-to-end tests: real processes, real HTTP, the unmodified client.

Run these through `make test` or `scripts/isolated`: they then have a network of their
own. A test that kills or reconfigures something starts a stack of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack import ROOT, Stack, running_stack

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here starts a Ray cluster."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.ray)


def pytest_report_header() -> str:
    isolated = os.environ.get("HEADRACE_ISOLATED") == "1"
    network = "of their own" if isolated else "this machine's (scripts/isolated gives an own one)"
    return f"stacks' network: {network}"


@pytest.fixture(scope="session")
def sim_stack() -> Iterator[Stack]:
    """The simulated engines of configs/sim.yaml; shared, so leave it as it is."""
    with running_stack(ROOT / "configs" / "sim.yaml") as stack:
        yield stack


@pytest.fixture(scope="session")
def local_stack() -> Iterator[Stack]:
    """The real model of configs/local.yaml; shared, so leave it as it is."""
    with running_stack(ROOT / "configs" / "local.yaml", ready_timeout_s=600) as stack:
        yield stack
