"""A bad rolling update stops by itself, fails no request, and the good one goes back in."""

from __future__ import annotations

import asyncio
import copy
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import httpx
import yaml

from serve_app.drills.frame import DrillImpossible, Stage
from serve_app.drills.load import Load
from serve_app.drills.target import Deployment

RATE_PER_S = 5.0
BAD_S = 20.0
DEPLOY_S = 60.0
# Serve waits longer and longer between starts that fail, up to a minute.
BACK_S = 240.0
# More context than the KV cache holds: the engine refuses to start.
TOO_LONG = 10**9


async def run(stage: Stage) -> None:
    """Deploy a configuration whose engines cannot start, then the one before it."""
    target = stage.target
    deployment, pool = target.deployment, target.names.pool
    if deployment is None or not deployment.dashboard:
        raise DrillImpossible("it needs --dashboard URL and --config FILE, the one that is good")
    wanted = await target.replicas(pool)
    broken = _broken(deployment.document, pool)
    load = Load(target, target.names.model)
    async with load.at_rate(RATE_PER_S):
        stage.inject(f"an update of pool {pool} whose engines cannot start")
        try:
            await _deploy(deployment, broken)
            lowest = await _lowest(stage, pool)
        finally:
            stage.say("back to the configuration before")
            await _to_its_end(_deploy(deployment, deployment.document))
        stage.check(lowest > 0, f"{lowest} of {wanted} replicas served throughout")

        async def whole() -> bool:
            return await target.replicas(pool) >= wanted

        took_s = await stage.check_until(whole, f"all {wanted} replicas serve again", BACK_S)
    stage.check(load.answered > 0, "requests came in throughout")
    stage.check(not load.failures, f"none failed ({load.described()})")
    stage.figure(answered=load.answered, slowest_s=load.slowest_s, least_replicas=lowest)
    stage.figure(rolled_back_after_s=took_s)


async def _lowest(stage: Stage, pool: str) -> int:
    """Return the fewest replicas that were there while the bad update tried."""
    ends_s = stage.clock() + BAD_S
    seen: list[int] = []
    while not seen or stage.clock() < ends_s:
        try:
            seen.append(await stage.target.replicas(pool))
        except httpx.HTTPError:
            # One answer that is missing says nothing about the replicas.
            if stage.clock() >= ends_s:
                break
        await stage.sleep(0.5)
    return min(seen, default=0)


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Do it even if the drill is cancelled meanwhile, which is passed on afterwards."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


def _broken(document: Any, pool: str) -> dict[str, Any]:
    """Return a configuration in which a pool's engines cannot start."""
    changed: dict[str, Any] = copy.deepcopy(dict(document))
    for application in changed["applications"]:
        if (application.get("args") or {}).get("name") == pool:
            application["args"]["engine"]["max_model_len"] = TOO_LONG
            return changed
    raise DrillImpossible(f"the configuration has no pool {pool}")


async def _deploy(deployment: Deployment, document: Any) -> None:
    # It may hold what is secret: the file is the user's alone, and removed.
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(yaml.safe_dump(dict(document), sort_keys=False))
        file.flush()
        await _serve_deploy(deployment, file.name)


async def _serve_deploy(deployment: Deployment, file: str) -> None:
    serve = Path(sys.executable).with_name("serve")
    process = await asyncio.create_subprocess_exec(
        *(str(serve), "deploy", file, "--address", deployment.dashboard),
        env=dict(deployment.environment),
        cwd=deployment.folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        # A terminal's Ctrl-C is for the drill, which still has to go back.
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(DEPLOY_S):
            printed, _ = await process.communicate()
    except TimeoutError as error:
        raise DrillImpossible("`serve deploy` did not end") from error
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode:
        raise DrillImpossible(f"`serve deploy` failed: {printed.decode()[-500:]}")
