"""Fairness by tokens and by measured engine seconds, side by side in the simulator.

    python -m benchmarks.fairness_costs

Three tenants of equal weight ask more than the fleet can serve, and every token of theirs
costs something else: chat decodes, RAG reads long prompts, an agent's long preamble is
cached. Under ``fairness.by_engine_seconds`` each is to get a third of the engines' time;
by token weights each gets a third of the tokens' worth, whatever that takes.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.mixes import BLOCKS_PER_HASH, chat_rag_agent
from serve_app.sim.records import jain_index, percentile
from serve_app.sim.scenarios import default_setup
from serve_app.sim.setup import Setup
from serve_app.sim.simulator import simulate
from serve_app.sim.workload import Traffic

TENANTS = ("agent", "chat", "rag")
CONTENDERS = {"token weights": False, "engine seconds": True}


def traffic(load: float) -> tuple[Traffic, ...]:
    """Return the three tenants' requests; at a load of 1 each alone could fill a third."""
    return chat_rag_agent(42.0 * load, 15.0 * load, 80.0 * load)


def setup(*, by_engine_seconds: bool, duration_s: float) -> Setup:
    """Return eight replicas under the product's policies, fair by one cost or the other."""
    base = default_setup()
    pools = []
    for pool in base.pools:
        fairness = replace(pool.policy.fairness, by_engine_seconds=by_engine_seconds)
        engine = replace(pool.engine, blocks_per_hash=BLOCKS_PER_HASH)
        pools.append(replace(pool, policy=replace(pool.policy, fairness=fairness), engine=engine))
    return replace(base, pools=tuple(pools), duration_s=duration_s, measure_cost=True)


def run(name: str, load: float, duration_s: float, seed: int) -> dict[str, Any]:
    """Return one contender's figures: engine time and service by tenant."""
    made = setup(by_engine_seconds=CONTENDERS[name], duration_s=duration_s)
    run_ = simulate(made, traffic(load), seed)
    engine_s: dict[str, float] = defaultdict(float)
    served: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    tokens: dict[str, int] = defaultdict(int)
    waits: dict[str, list[float]] = defaultdict(list)
    for each in run_.questions:
        if not made.measures(each.arrival.arrival_s):
            continue
        tenant = each.arrival.tenant
        asked[tenant] += 1
        if each.ttft_s is not None and each.outcome is not None:
            served[tenant] += 1
            engine_s[tenant] += each.engine_s
            tokens[tenant] += each.arrival.prompt_tokens + each.output_tokens
            waits[tenant].append(each.ttft_s)
    whole_s = sum(engine_s.values())
    return {
        "jain_engine_s": jain_index([engine_s[tenant] for tenant in TENANTS]),
        "engine_s": whole_s,
        "share": {tenant: engine_s[tenant] / whole_s for tenant in TENANTS},
        "served_ratio": {tenant: served[tenant] / asked[tenant] for tenant in TENANTS},
        "tokens": {tenant: tokens[tenant] for tenant in TENANTS},
        "ttft_p99_s": {tenant: percentile(waits[tenant], 0.99) for tenant in TENANTS},
        "served_per_s": sum(served.values()) / (duration_s - made.warmup_s),
    }


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return the means over the seeds as Markdown."""
    shares = " | ".join(f"{tenant}: share, answered" for tenant in TENANTS)
    lines = [
        f"| fair by | Jain of engine time | {shares} | answered/s |",
        "|---|---|" + "---|" * len(TENANTS) + "---|",
    ]
    for name, rows in found.items():
        cells = [
            f"{fmean(row['share'][tenant] for row in rows):.1%}, "
            f"{fmean(row['served_ratio'][tenant] for row in rows):.0%}"
            for tenant in TENANTS
        ]
        jain = fmean(row["jain_engine_s"] for row in rows)
        rate = fmean(row["served_per_s"] for row in rows)
        lines.append(f"| {name} | {jain:.4f} | {' | '.join(cells)} | {rate:.1f} |")
    return "\n".join(lines)


def main() -> int:
    """Run both and print the table. Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fairness_costs")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1")
    parser.add_argument("--load", type=float, default=1.6, help="of each tenant's third")
    parser.add_argument("--duration-s", type=float, default=120.0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    found = {
        name: [run(name, args.load, args.duration_s, seed) for seed in range(args.seeds)]
        for name in CONTENDERS
    }
    print(table(found))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
