"""A sweep over the simulated engine in virtual time finds what its physics say."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from serve_app.calibration import Endpoint, Plan, Shape, sweep
from serve_app.calibration_report import Measured, Subject, empty_fields, report, settings
from serve_app.core.engine_model import EngineModel, EngineParams, EventKind, Sequence
from serve_app.core.knee import Level, Served, Slo, find_knee
from serve_app.load_client import Exchange
from serve_app.pool_figures import PoolFigures, pools_in
from serve_app.terminal import CommandFailed

PROMPT, OUTPUT = 32, 128
PARAMS = EngineParams(context_s_per_token=2.2e-6, prefill_s_per_token=20e-6)
SLO = Slo(ttft_s=1.0, tpot_s=0.02)
PLAN = Plan(most=256, least_requests=40, level_s_max=1e6)


class VirtualEngine:
    """A closed loop of clients on the engine's model, in virtual time."""

    async def level(
        self, concurrency: int, plan: Plan, stay_s: float, on_answer: Callable[[int, int], None]
    ) -> Level:
        model = EngineModel(PARAMS)
        starts = [stay_s * number / concurrency for number in range(concurrency)]
        sent: dict[Sequence, float] = {}
        first: dict[Sequence, float] = {}
        served: list[Served] = []
        now_s = 0.0
        while len(served) < 6 * concurrency + 40:
            now_s = min([model.next_event_s(), *starts[:1]])
            for at_s, kind, sequence in model.advance(now_s):
                if kind is EventKind.FIRST_TOKEN:
                    first[sequence] = at_s
                elif kind is EventKind.FINISHED:
                    sent_s = sent.pop(sequence)
                    ttft_s, total_s = first.pop(sequence) - sent_s, at_s - sent_s
                    served.append(Served(ttft_s, total_s, at_s, PROMPT, 0, OUTPUT))
                    starts.insert(0, at_s)
            while starts and starts[0] <= now_s:
                del starts[0]
                sent[model.add("", now_s, prompt_tokens=PROMPT, output_tokens=OUTPUT)] = now_s
        steady = served[3 * concurrency :]
        return Level(concurrency, steady[-1].ended_s - steady[0].ended_s, tuple(steady))


def analytic_knee() -> float:
    """The concurrency at which a step takes the target: prompts fit into the weights' time."""
    fixed_s = PARAMS.overhead_s + PARAMS.weights_s
    per_request_s = PARAMS.context_s_per_token * (PROMPT + OUTPUT / 2) + PARAMS.batch_s_per_request
    return (SLO.tpot_s - fixed_s) / per_request_s


async def test_the_knee_of_the_simulated_engine_is_the_analytic_one() -> None:
    seen: list[int] = []
    levels = await sweep(
        VirtualEngine(), SLO, PLAN, lambda level: seen.append(level.concurrency), lambda *_: None
    )
    knee = find_knee(levels, SLO)
    assert knee is not None
    assert seen[:4] == [1, 2, 4, 8]
    assert knee.bounded_by == "targets"
    assert abs(knee.level.concurrency / analytic_knee() - 1.0) <= 0.03


async def test_one_moments_trouble_does_not_bound_the_search() -> None:
    class Stalls(VirtualEngine):
        asked = 0

        async def level(self, concurrency: int, *others: Any) -> Level:
            self.asked += 1
            level = await super().level(concurrency, *others)
            return level if self.asked != 3 else Level(concurrency, 1.0, (), refused=40)

    levels = await sweep(Stalls(), SLO, PLAN, lambda _: None, lambda *_: None)
    assert [level.concurrency for level in levels[:4]] == [1, 2, 4, 8]
    knee = find_knee(levels, SLO)
    assert knee is not None
    assert abs(knee.level.concurrency / analytic_knee() - 1.0) <= 0.03


async def test_a_sweep_ends_where_more_load_serves_no_more() -> None:
    generous = Slo(ttft_s=1e6, tpot_s=1e6)

    class Saturated:
        async def level(self, concurrency: int, *_: Any) -> Level:
            per_s = min(concurrency, 8)
            return Level(concurrency, 100 / per_s, (Served(0.1, 1.0, 0.0, 9, 0, 9),) * 100)

    levels = await sweep(Saturated(), generous, PLAN, lambda _: None, lambda *_: None)
    assert [level.concurrency for level in levels] == [1, 2, 4, 8, 16]
    knee = find_knee(levels, generous)
    assert knee is not None
    assert (knee.level.concurrency, knee.bounded_by) == (8, "peak")


class FakeService:
    """An endpoint that answers like ours: so many tokens, each some milliseconds."""

    def __init__(self, refused: int = 10**9, status: int = 429) -> None:
        """Every so many requests one is ``refused``, with ``status``."""
        self.refused, self.status = refused, status
        self.asked = self.open = self.most = self.cut = 0

    async def post(self, path: str, body: bytes) -> Exchange:
        assert path == "/v1/chat/completions"
        asked = json.loads(body)
        self.asked += 1
        if self.asked % self.refused == 0:
            error = json.dumps({"error": {"message": "no room", "code": "queue_full"}}).encode()
            return exchange(self.status, [error])
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            prompt_tokens = 10 + 2 * len(asked["messages"][0]["content"].split())
            return await self._stream(prompt_tokens, asked["max_tokens"])
        finally:
            self.open -= 1

    async def _stream(self, prompt_tokens: int, tokens: int) -> Exchange:
        began_s = time.perf_counter()
        await asyncio.sleep(0.001 * tokens)
        writes = [b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n']
        writes += [b'data: {"choices":[{"delta":{"content":"word"}}]}\n\n'] * tokens
        if self.cut:
            writes.append(b'data: {"error":{"message":"the engine is gone"}}\n\n')
        else:
            counts = b'{"prompt_tokens":%d,"completion_tokens":%d}' % (prompt_tokens, tokens)
            writes += [b'data: {"choices":[],"usage":%b}\n\n' % counts, b"data: [DONE]\n\n"]
        return exchange(200, writes, began_s)


def exchange(status: int, writes: list[bytes], began_s: float = 0.0) -> Exchange:
    """Return an answer of which every write came by itself, the last one now."""
    head = b"HTTP/1.1 %d x\r\ncontent-length: %d\r\n\r\n" % (status, sum(map(len, writes)))
    step_s = (time.perf_counter() - began_s) / len(writes)
    times_s = [began_s + step_s * number for number in range(1, len(writes) + 1)]
    return Exchange([head + writes[0], *writes[1:]], times_s)


def endpoint(service: FakeService, **changes: Any) -> Endpoint:
    shape = Shape(**{"model": "m", "prompt_tokens": 210, "output_tokens": 4} | changes)
    return Endpoint(service, shape)


async def test_a_level_keeps_its_clients_busy_and_prompts_have_their_length() -> None:
    service = FakeService()
    live = endpoint(service)
    await live.learn_lengths()
    told: list[tuple[int, int]] = []
    level = await live.level(3, Plan(8, 20, 60.0), 0.01, lambda *each: told.append(each))
    assert service.most == 3
    assert len(level.served) == told[-1][0] == told[-1][1] == 21
    assert {each.prompt_tokens for each in level.served} == {210}
    assert all(0 < each.ttft_s < each.total_s for each in level.served)
    assert level.window_s > 0


async def test_refusals_and_cut_streams_are_counted_and_do_not_end_the_level() -> None:
    service = FakeService(refused=5)
    live = endpoint(service)
    await live.learn_lengths()
    level = await live.level(2, Plan(8, 20, 60.0), 0.01, lambda *_: None)
    assert 1 <= level.refused <= 5
    assert level.refused + len(level.served) == 21
    service.cut = 1
    with pytest.raises(CommandFailed, match="refuses even one"):
        await live.learn_lengths()


async def test_an_endpoint_that_fails_ends_the_sweep_with_its_words() -> None:
    service = FakeService()
    live = endpoint(service)
    await live.learn_lengths()
    service.refused, service.status = 7, 401
    with pytest.raises(CommandFailed, match="answers 401: no room; give a key"):
        await live.level(3, Plan(8, 20, 60.0), 0.01, lambda *_: None)


METRICS = """\
# TYPE headrace_engine_slots gauge
headrace_engine_slots{pool="chat",replica="a"} 64
headrace_engine_slots{pool="chat",replica="b"} 64
headrace_engine_slots{pool="code",replica="c"} 8
# TYPE headrace_engine_running gauge
headrace_engine_running{pool="chat",replica="a"} 3
# TYPE headrace_start_seconds gauge
headrace_start_seconds{pool="chat",replica="a",stage="load"} 30
headrace_start_seconds{pool="chat",replica="b",stage="load"} 41
# TYPE headrace_engine_step_cost_seconds gauge
headrace_engine_step_cost_seconds{part="step",pool="chat",replica="a"} 0.006
headrace_engine_step_cost_seconds{part="step",pool="chat",replica="b"} 0.008
# TYPE headrace_engine_coefficients_provisional gauge
headrace_engine_coefficients_provisional{pool="chat",replica="b"} 1
# TYPE headrace_queue_wait_seconds histogram
headrace_queue_wait_seconds_bucket{class="standard",le="+Inf",pool="chat",router="r"} 4
headrace_queue_wait_seconds_sum{class="standard",pool="chat",router="r"} 2.5
headrace_queue_wait_seconds_count{class="standard",pool="chat",router="r"} 4
"""


def test_pools_are_read_from_the_metrics_of_all_their_replicas() -> None:
    pools = pools_in(METRICS)
    chat = pools["chat"]
    assert pools.keys() == {"chat", "code"}
    assert (chat.replicas, chat.slots, chat.running) == (2, 128, 3)
    assert chat.step_s == {"step": pytest.approx(0.007)}
    assert chat.start_s == {"load": 41.0}
    assert chat.provisional
    assert (chat.queued, chat.queued_s) == (4, 2.5)


def measured(**changes: Any) -> Measured:
    answer = Served(0.1, 1.1, 1.0, 200, 0, 51)
    levels = (Level(1, 50.0, (answer,) * 50), Level(8, 10.0, (answer,) * 100))
    knee = find_knee(levels, Slo(0.5, 0.05))
    assert knee is not None
    after = PoolFigures(2, 64, step_s={"step": 0.01, "prefill_token": 1e-5})
    values = {
        "levels": levels,
        "knee": knee,
        "before": PoolFigures(2, 64),
        "after": after,
        "kv_peak_ratio": 0.5,
        "began": "2026-01-01T00:00:00+00:00",
        "warm_up_s": 3.0,
        "steady_s": 60.0,
    }
    return Measured(**values | changes)


SUBJECT = Subject("chat", {"headrace": "1"}, "as served", "one card", 2.0)
SHAPE = Shape("m", 200, 51)


def test_the_report_has_every_field_and_the_settings_follow_from_it() -> None:
    told = report(SUBJECT, SHAPE, Slo(0.5, 0.05), measured())
    assert list(empty_fields(told)) == []
    assert told["results"]["knee"]["concurrency_per_replica"] == 4.0
    prices = told["decisions"]["usd_per_million_tokens"]
    # Two replicas for two dollars each, 2,510 tokens a second.
    assert prices["total"] == pytest.approx(4.0 / 3600 / 2510 * 1e6, rel=1e-3)
    spent = 2000 * prices["input"] + 510 * prices["output"]
    assert spent == pytest.approx(2510 * prices["total"], rel=1e-3)
    values = settings(SUBJECT, measured())
    assert "max_concurrency_per_replica: 4" in values
    assert "step_s: 1.000e-02" in values


def test_settings_are_what_a_configuration_takes() -> None:
    import yaml

    from serve_app.config import StepCosts
    from serve_app.config_policy import ScalingSettings

    parsed = yaml.safe_load(settings(SUBJECT, measured()))
    ScalingSettings.model_validate(parsed["pools"]["chat"]["scaling"])
    step = {"step": 0.01, "prefill_token": 1e-5, "decode_sequence": 0.0, "kv_token": 2e-8}
    whole = yaml.safe_load(settings(SUBJECT, measured(after=PoolFigures(2, 64, step_s=step))))
    costs = StepCosts.model_validate(whole["engine"]["step_costs"]).to_core()
    assert (costs.step_ps, costs.kv_token_ps, costs.provisional) == (10**10, 20_000, False)


def test_what_was_not_fitted_is_in_no_setting_and_the_report_says_so() -> None:
    provisional = measured(after=PoolFigures(1, 64, step_s={"step": 1.0}, provisional=True))
    assert "step_costs" not in settings(SUBJECT, provisional)
    told = report(SUBJECT, SHAPE, Slo(0.5, 0.05), provisional)
    assert told["results"]["step_cost_s"] == "none seen"
    assert list(empty_fields({"a": {"b": None, "c": [""]}, "d": {}})) == ["a.b", "a.c[0]", "d"]
