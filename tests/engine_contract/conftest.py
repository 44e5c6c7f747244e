"""The engines under contract. Each is started once and serves every test of the session."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Generator
from pathlib import Path

import pytest
import pytest_asyncio

from serve_app.config import SimSettings
from serve_app.core.types import PoolName, ReplicaId
from serve_app.engine.api import Engine
from serve_app.engine.sim import SimEngine
from tests.steady_clock import SteadyClock

# As large as the real model of the suite, and fast enough to be waited for.
SIM = SimSettings(max_model_len=1024, max_num_seqs=4, token_budget=1024, kv_blocks=512)


HERE = Path(__file__).resolve().parent


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None]:
    """One worker runs all of these, and what ends an engine after all others.

    An engine takes a minute to start; pytest orders tests by the engine they use.
    """
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("engines"))
    yield
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


async def start_sim_engine() -> SimEngine:
    """Start a simulated engine in real time: a token every seven milliseconds."""
    engine = SimEngine(SIM, PoolName("contract"), ReplicaId("sim-0"), SteadyClock())
    await engine.start()
    return engine


@pytest_asyncio.fixture(
    scope="session",
    loop_scope="session",
    params=["sim", pytest.param("vllm", marks=pytest.mark.model)],
)
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    """Yield each engine in turn, started."""
    started: Engine
    if request.param == "vllm":
        # Imported here: the simulated half of the suite runs where vLLM is not installed.
        from .vllm_fixture import start_vllm_engine

        started = await start_vllm_engine()
        # A million objects of torch's and vLLM's that every later collection would walk.
        gc.collect()
        gc.freeze()
    else:
        started = await start_sim_engine()
    try:
        yield started
    finally:
        await started.stop()


def pytest_sessionfinish() -> None:
    """What was frozen is let go of like everything else: Triton's bindings look for leaks."""
    gc.unfreeze()
