"""How many simulated requests the engine model alone gets through in a second.

    python benchmarks/engine_model_speed.py [--requests 40000] [--seed 0] [--json]

Arrivals are Poisson; lengths are uniform around the means below. One replica, one
process. Rates are per second of processor time, so that a busy machine doesn't lie.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from dataclasses import asdict, dataclass

from serve_app.core.engine_model import EngineModel, EngineParams, EventKind


@dataclass(frozen=True, slots=True)
class Load:
    """One traffic shape. ``groups`` shared prefixes of ``prefix_tokens`` each, or none."""

    name: str
    rate: float
    prompt_tokens: int
    output_tokens: int
    kv_blocks: int = 26_313
    groups: int = 0
    prefix_tokens: int = 0
    blocks_per_hash: int = 1


LOADS = (
    Load("short requests, 120/s", 120, 60, 35),
    Load("chat, 60/s", 60, 175, 110),
    Load("chat, 30/s", 30, 175, 110),
    Load("long answers, 25/s", 25, 400, 400),
    Load("prefix-heavy, 6k shared", 20, 6200, 110, groups=20, prefix_tokens=6000),
    Load(
        "prefix-heavy, 512-token hashes",
        20,
        6200,
        110,
        groups=20,
        prefix_tokens=6144,
        blocks_per_hash=32,
    ),
    Load("preempting all the time", 60, 175, 110, kv_blocks=700),
)


@dataclass(frozen=True, slots=True)
class Result:
    """What one load took; ``requests_per_s`` is per second of processor time."""

    load: str
    requests_per_s: float
    wall_s: float
    simulated_s: float
    steps: int
    preemptions: int
    prefix_hit_ratio: float
    peak_running: int


def prefixes(load: Load, segment_tokens: int) -> list[tuple[int, ...]]:
    """Return the hashes of each group's shared prefix."""
    count = load.prefix_tokens // segment_tokens
    return [
        tuple(group * 1_000_000 + index for index in range(count)) for group in range(load.groups)
    ]


def run(load: Load, requests: int, seed: int) -> Result:
    """Drive one model to the end of ``requests`` requests."""
    params = EngineParams(kv_blocks=load.kv_blocks, blocks_per_hash=load.blocks_per_hash)
    rng = random.Random(seed)
    shared = prefixes(load, params.block_tokens * params.blocks_per_hash)
    spread = (load.prompt_tokens - load.prefix_tokens) * 3 // 4
    model = EngineModel(params)
    arrival_s = next_s = 0.0
    added = finished = peak = 0
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    next_s = math.inf
    while finished < requests:
        now_s = arrival_s if added < requests and arrival_s <= next_s else next_s
        for _, kind, _ in model.advance(now_s):
            finished += kind is EventKind.FINISHED
        if added < requests and now_s == arrival_s:
            model.add(
                added,
                now_s,
                prompt_tokens=load.prompt_tokens + rng.randint(-spread, spread),
                output_tokens=rng.randint(load.output_tokens // 5, load.output_tokens * 9 // 5),
                priority=added % 3,
                hashes=shared[rng.randrange(load.groups)] if shared else (),
            )
            added += 1
            arrival_s += rng.expovariate(load.rate)
        next_s = model.next_event_s()
        peak = max(peak, model.running)
    return Result(
        load=load.name,
        requests_per_s=requests / (time.process_time() - began_cpu_s),
        wall_s=time.perf_counter() - began_s,
        simulated_s=arrival_s,
        steps=model.steps_total,
        preemptions=model.preemptions_total,
        prefix_hit_ratio=model.prefix_hit_tokens / model.prefix_query_tokens,
        peak_running=peak,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON list instead")
    arguments = parser.parse_args()
    results = [run(load, arguments.requests, arguments.seed) for load in LOADS]
    if arguments.json:
        json.dump([asdict(result) for result in results], sys.stdout, indent=2)
        return
    print(f"{'load':32} {'requests/s':>11} {'steps':>9} {'preempted':>9} {'hits':>6} {'peak':>5}")
    for result in results:
        print(
            f"{result.load:32} {result.requests_per_s:11,.0f} {result.steps:9,} "
            f"{result.preemptions:9,} {result.prefix_hit_ratio:6.1%} {result.peak_running:5}"
        )


if __name__ == "__main__":
    main()
