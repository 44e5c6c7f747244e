"""vLLM's own schedulers, with a stand-in for the model: what they did is what was written.

No engine is started: the loop of vLLM's engine process is imitated, in a time of its own.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from pathlib import Path
from random import Random
from typing import Any

import pytest

from serve_app import models
from serve_app.config import VllmSettings
from serve_app.core.attribution import Account, Use
from serve_app.core.cost_meter import CostMeter, Steps
from serve_app.core.types import Outcome
from serve_app.engine.step_log import StepLog
from serve_app.engine.step_reader import StepReader
from serve_app.engine.vllm_args import engine_and_frontend_args
from tests.unit.engine.test_step_log import Pipe

pytestmark = pytest.mark.model

BLOCK_TOKENS = 16
STEP_S, TOKEN_S = 0.01, 0.0001
CONFIGS = {"synchronous": False, "asynchronous": True}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def asynchronous(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def vllm_config(*, asynchronous: bool, **settings: Any) -> Any:
    path = Path(models.resolve("smollm2", models.default_cache_dir()))
    values = {"model": "smollm2", "max_model_len": 1024, "max_num_seqs": 8} | settings
    arguments, _ = engine_and_frontend_args(VllmSettings(**values), path)
    config = arguments.create_engine_config()
    # As vLLM resolves it for a GPU; on a CPU it never is.
    config.scheduler_config.async_scheduling = asynchronous
    return config


class Core:
    """The loop of vLLM's engine process around a scheduler, and the replica that reads."""

    def __init__(self, config: Any, kv_blocks: int) -> None:
        import torch
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import (
            FullAttentionSpec,
            KVCacheConfig,
            KVCacheGroupSpec,
        )
        from vllm.v1.structured_output import StructuredOutputManager

        from serve_app.engine.vllm_scheduler import recording_scheduler

        chosen = recording_scheduler(config)
        assert chosen is not None
        config.scheduler_config.scheduler_cls = chosen
        config.cache_config.num_gpu_blocks = kv_blocks
        config.cache_config.block_size = BLOCK_TOKENS
        spec = FullAttentionSpec(
            block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=8, dtype=torch.bfloat16
        )
        groups = [KVCacheGroupSpec(["layer"], spec)]
        self.scheduler = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(kv_blocks, [], groups),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_TOKENS,
            hash_block_size=BLOCK_TOKENS,
            log_stats=True,
        )
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)
        self.depth = 2 if config.scheduler_config.async_scheduling else 1
        self.under_way: deque[Any] = deque()
        self.overlapped = 0
        self.now_s = 100.0
        self.pipe = Pipe()
        self.scheduler.steps = StepLog(self.pipe, lambda: self.now_s)
        self.meter = CostMeter(self.now_s, BLOCK_TOKENS)
        self.meter.ready(self.now_s)
        self.reader = StepReader(self.pipe, self.meter, lambda: self.now_s)
        self.accounts: dict[str, Account] = {}
        self.ended: dict[str, str] = {}
        self.cached: dict[str, int] = {}
        self.written: list[Steps] = []
        stepped = self.meter.stepped
        self.meter.stepped = lambda steps: (self.written.append(steps), stepped(steps))[1]
        self.true_tokens: dict[Account, int] = defaultdict(int)
        self.preemptions = 0

    def add(self, name: str, prompt: list[int], output_tokens: int) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        self.accounts[name] = account = self.meter.open("acme")
        self.reader.expect(name, account)
        params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
        params.update_from_generation_config({}, 0)
        self.scheduler.add_request(Request(name, prompt, params, None, block_hasher=self.hasher))

    def abort(self, name: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.end(name, Outcome.CANCELLED)

    def end(self, name: str, outcome: Outcome) -> None:
        self.reader.read()
        self.ended[name] = outcome.value
        self.meter.close(self.accounts[name], outcome)

    def turn(self) -> bool:
        """Take one turn as EngineCore does; whether there was anything to do."""
        scheduler = self.scheduler
        self.now_s += 0.0001
        if scheduler.has_requests() and len(self.under_way) < self.depth:
            output = scheduler.schedule()
            requests = scheduler.requests
            for name, count in output.num_scheduled_tokens.items():
                self.true_tokens[self.accounts[name]] += count
            for new in output.scheduled_new_reqs:
                self.cached[new.req_id] = new.num_computed_tokens
            samples = {
                name: not requests[name].is_prefill_chunk for name in output.num_scheduled_tokens
            }
            self.under_way.append((output, samples))
            if len(self.under_way) < self.depth and samples:
                return True
        if not self.under_way:
            return False
        self.overlapped += len(self.under_way) > 1
        self.complete(*self.under_way.popleft())
        return True

    def complete(self, output: Any, samples: dict[str, bool]) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        names = list(samples)
        if names:
            self.now_s += STEP_S + TOKEN_S * output.total_num_scheduled_tokens
        outputs = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=[[7] if samples[name] else [] for name in names],
            ),
        )
        for each in outputs.values():
            for one in each.outputs:
                if one.finish_reason is not None and one.request_id not in self.ended:
                    self.end(one.request_id, Outcome.COMPLETED)

    def figures(self) -> Any:
        self.reader.read()
        return self.meter.read(self.now_s)


def written_tokens(core: Core) -> dict[Account, int]:
    tokens: dict[Account, int] = defaultdict(int)
    for steps in core.written:
        for account, _ in steps.decodes:
            tokens[account] += steps.steps
        for chunk in steps.prefills:
            tokens[chunk.account] += chunk.tokens
    return tokens


def test_the_scheduler_that_records_is_of_the_kind_that_vllm_chose(asynchronous: bool) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from serve_app.engine.vllm_scheduler import RecordsSteps, recording_scheduler

    config = vllm_config(asynchronous=asynchronous)
    chosen = recording_scheduler(config)
    assert chosen is not None
    config.scheduler_config.scheduler_cls = chosen
    resolved = config.scheduler_config.get_scheduler_cls()
    assert issubclass(resolved, RecordsSteps)
    assert issubclass(resolved, AsyncScheduler if asynchronous else Scheduler)
    assert issubclass(resolved, AsyncScheduler) == asynchronous
    # What EngineCore asks before it keeps a second step in flight.
    assert config.scheduler_config.async_scheduling == asynchronous
    assert config.max_concurrent_batches == (2 if asynchronous else 1)


def test_a_scheduler_of_somebody_elses_is_left_alone() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    from serve_app.engine.vllm_scheduler import recording_scheduler

    class Theirs(Scheduler):  # type: ignore[misc]  # vLLM is untyped here
        pass

    config = vllm_config(asynchronous=True)
    config.scheduler_config.scheduler_cls = Theirs
    assert recording_scheduler(config) is None
    config = vllm_config(asynchronous=True)
    config.parallel_config.data_parallel_size = 2
    assert recording_scheduler(config) is None


def test_a_fault_in_the_log_is_told_and_time_after_it_is_nobodys(asynchronous: bool) -> None:
    core = Core(vllm_config(asynchronous=asynchronous), kv_blocks=40)
    core.scheduler.steps.joined = None
    core.add("a", list(range(20)), 4)
    assert core.scheduler.steps is None
    core.figures()
    while core.turn():
        pass
    core.now_s += 60
    uses = core.figures().use.uses
    assert uses[Use.UNATTRIBUTED] > 60 * 10**9
    assert uses[Use.IDLE] == 0


def test_every_token_that_was_scheduled_is_written_under_its_request(asynchronous: bool) -> None:
    core, dice = Core(vllm_config(asynchronous=asynchronous), kv_blocks=40), Random(3)
    shared = [dice.randrange(9, 90) for _ in range(64)]
    idle_s = 0.0

    def alive() -> list[str]:
        return [name for name in core.accounts if name not in core.ended]

    for number in range(60):
        own = [dice.randrange(100, 900) for _ in range(dice.randrange(1, 120))]
        core.add(f"r{number}", (shared if number % 2 else []) + own, dice.randrange(1, 80))
        for _ in range(dice.choice([0, 5, 40])):
            core.turn()
        if dice.random() < 0.2 and alive():
            core.abort(dice.choice(alive()))
        if number % 20 == 19:
            while core.turn():
                pass
            assert not alive()
            core.now_s += 0.5
            idle_s += 0.5
    costs = core.figures()
    uses = {use.value: ns / 1e9 for use, ns in costs.use.uses.items()}
    assert written_tokens(core) == core.true_tokens
    assert (core.overlapped > 100) == asynchronous
    assert set(core.ended.values()) == {"completed", "cancelled"}
    assert sum(costs.use.uses.values()) == costs.use.lifetime_ns
    assert uses["idle"] == pytest.approx(idle_s, abs=0.02)
    assert uses["unattributed"] < 0.01 * costs.use.lifetime_ns / 1e9
    assert costs.use.uses[Use.OPEN] == 0
    # Preempted requests were computed anew, and a prefix that was found was not computed.
    repeated = sum(chunk.repeated_tokens for steps in core.written for chunk in steps.prefills)
    assert repeated > 0
    assert uses["preempted"] > 0
    assert sum(core.cached.values()) > 0
    assert not core.reader._accounts


def test_what_is_written_as_repeated_is_what_a_preemption_threw_away(asynchronous: bool) -> None:
    core = Core(vllm_config(asynchronous=asynchronous, enable_prefix_caching=False), kv_blocks=9)
    core.add("first", list(range(48)), 60)
    core.add("second", list(range(100, 148)), 60)
    while core.turn():
        pass
    core.reader.read()
    first, second = core.accounts["first"], core.accounts["second"]
    chunks = [chunk for steps in core.written for chunk in steps.prefills]
    repeated = sum(chunk.repeated_tokens for chunk in chunks if chunk.account is second)
    assert not any(chunk.repeated_tokens for chunk in chunks if chunk.account is first)
    # Each token of context is computed once, and those again that were lost; with steps in
    # flight vLLM may compute one more that nobody wants.
    assert core.true_tokens[first] - 107 in (0, 1)
    assert core.true_tokens[second] - 107 - repeated in (0, 1)
    assert repeated > 48
    assert second.recomputed_ns > 0
    assert first.recomputed_ns == 0


def test_a_fault_in_the_log_ends_the_recording_and_not_the_engine(asynchronous: bool) -> None:
    core = Core(vllm_config(asynchronous=asynchronous), kv_blocks=40)
    core.add("a", list(range(48)), 20)
    core.turn()
    core.scheduler.steps.completed = None
    while core.turn():
        pass
    assert core.ended == {"a": "completed"}
    assert core.scheduler.steps is None


async def test_nothing_is_measured_where_the_settings_say_so() -> None:
    from serve_app.engine.vllm_costs import VllmCosts

    costs = VllmCosts(asyncio.get_running_loop().time, measure=False)
    assert costs.listen() is None
    costs.ready()
    costs.drain()
    costs.close(costs.open("acme"), Outcome.COMPLETED)
    assert costs.figures() is None
