"""OpenCost's answers, the strange ones included, and its absence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from fractions import Fraction

import httpx
import pytest

from serve_app.core.reconciliation import NodeBill
from serve_app.ledger import opencost
from serve_app.ledger.opencost import OpenCost, OpenCostUnavailable

HOUR = (1_767_225_600, 1_767_229_200)

# Written after the field names of OpenCost's own encoder (core/pkg/opencost/asset_json.go).
NODE = """{"type":"Node","properties":{"category":"Compute","provider":"AWS","cluster":"c",
"name":"gpu-1","providerID":"i-1"},"labels":{},"start":"2026-01-01T00:00:00Z",
"end":"2026-01-01T01:00:00Z","minutes":60.0,"nodeType":"p5.4xlarge","cpuCores":16.0,
"GPUHours":1.0,"preemptible":0.0,"discount":0.3,"cpuCost":0.25,"gpuCost":2.5,"gpuCount":1.0,
"ramCost":0.09,"adjustment":-0.1,"totalCost":2.64123}"""
DISK = '{"type":"Disk","properties":{"name":"pv-1"},"totalCost":9.0}'
GPU_1 = NodeBill("gpu-1", 2_641_230_000, Fraction(1))


def answering(body: str, status: int = 200) -> OpenCost:
    return client(lambda request: httpx.Response(status, text=body))


def client(answer: Callable[[httpx.Request], httpx.Response]) -> OpenCost:
    return OpenCost("http://opencost:9003/", transport=httpx.MockTransport(answer))


def node(fields: str) -> str:
    return f'{{"code":200,"data":{{"a/Node/Kubernetes/i-9/gpu-9":{{"type":"Node",{fields}}}}}}}'


@pytest.mark.parametrize(
    "body",
    [
        f'{{"code":200,"data":{{"key":{NODE},"disk":{DISK}}}}}',
        f'{{"code":200,"status":"success","data":[{{"key":{NODE}}},{{"disk":{DISK}}},null]}}',
        f'{{"data":[{{"key":{NODE}}}],"message":""}}',
    ],
    ids=["an object", "a list of sets", "without a code"],
)
async def test_nodes_are_found_in_every_shape_of_answer_and_other_assets_are_not(
    body: str,
) -> None:
    assert await answering(body).node_bills(*HOUR) == (GPU_1,)


@pytest.mark.parametrize(
    ("fields", "total_nanousd", "gpu_hours"),
    [
        ('"totalCost":null,"GPUHours":1', None, Fraction(1)),
        ('"totalCost":NaN,"GPUHours":NaN', None, None),
        ('"totalCost":"NaN"', None, None),
        ('"totalCost":Infinity', None, None),
        ('"totalCost":-3.0', None, None),
        ('"totalCost":1e400', None, None),
        ('"totalCost":true', None, None),
        ('"totalCost":{"x":1}', None, None),
        ('"GPUHours":0', None, Fraction(0)),
        ('"totalCost":0', 0, None),
        ('"totalCost":"2.5","gpuHours":"8"', 2_500_000_000, Fraction(8)),
        ('"totalCost":0.00001', 10_000, None),
        ('"totalCost":25.000000000000004', 25_000_000_000, None),
    ],
)
async def test_a_figure_that_is_no_number_is_none_and_never_zero(
    fields: str, total_nanousd: int | None, gpu_hours: Fraction | None
) -> None:
    bills = await answering(node(fields)).node_bills(*HOUR)
    assert bills == (NodeBill("gpu-9", total_nanousd, gpu_hours),)


async def test_behind_the_ui_the_routes_are_under_model_and_that_is_remembered() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        if request.url.path != "/model/assets":
            return httpx.Response(200, text="<html>OpenCost</html>")
        assert request.url.params["window"] == "2026-01-01T00:00:00Z,2026-01-01T01:00:00Z"
        return httpx.Response(200, text=f'{{"code":200,"data":{{"key":{NODE}}}}}')

    bills = client(answer)
    assert await bills.node_bills(*HOUR) == await bills.node_bills(*HOUR) == (GPU_1,)
    assert asked == ["/assets", "/model/assets", "/model/assets"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("", 200),
        ("[]", 200),
        ('{"code":200,"data":null}', 200),
        ('{"code":500,"message":"no data for window"}', 200),
        ("[" * 100_000, 200),
        ("down", 503),
        ("gone", 404),
    ],
)
async def test_an_answer_that_is_none_is_an_outage(body: str, status: int) -> None:
    with pytest.raises(OpenCostUnavailable):
        await answering(body, status).node_bills(*HOUR)


async def test_a_refused_connection_and_an_endless_answer_are_outages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(OpenCostUnavailable, match="refused"):
        await client(refuse).node_bills(*HOUR)
    monkeypatch.setattr(opencost, "BODY_BYTES_MAX", 100)
    with pytest.raises(OpenCostUnavailable, match="more than 100 bytes"):
        await answering("x" * 101).node_bills(*HOUR)


async def test_an_answer_that_does_not_come_is_given_up() -> None:
    async def never(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    slow = OpenCost("http://x", timeout_s=0.01, transport=httpx.MockTransport(never))
    with pytest.raises(OpenCostUnavailable, match="within"):
        await slow.node_bills(*HOUR)
    await slow.close()


async def test_less_than_an_hour_is_not_asked_for() -> None:
    with pytest.raises(ValueError, match="hour"):
        await answering("{}").node_bills(HOUR[0], HOUR[0] + 60)
