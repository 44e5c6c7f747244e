"""One day's cost by three methods beside the exact one: who pays what on a mix of RAG and chat.

    python -m benchmarks.cost_methods --out out/cost_methods

A day of traffic, compressed, runs on one simulated replica: an 8B model on one H100. The
engine model knows how long a step takes whatever is in it, so every step's exact Shapley
value can be computed, with its real maximum of weights and computation in it. Beside it:

- ours: the affine shares of ``core/attribution.py``, with coefficients fitted on the way;
- by average tokens: the replica's time over all tokens, prompt and output alike;
- OpenCost's (1.121): time split into input and output by the sums of vLLM's histograms
  ``request_prefill_time_seconds`` and ``request_time_per_output_token_seconds``, each over
  its tokens. It stops at the model; here its rates are applied to each tenant's tokens.

All four give out the same time: that of the steps. Idle time is no part of it.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import comb
from pathlib import Path

from benchmarks.mixes import BLOCKS_PER_HASH, chat_rag_agent
from serve_app.core.attribution import Account, Use
from serve_app.core.cost_meter import CostMeter, EngineCosts
from serve_app.core.engine_model import EngineModel, EngineParams, EventKind, StepRun
from serve_app.core.model_steps import ModelSteps
from serve_app.core.types import Outcome
from serve_app.sim.records import percentile
from serve_app.sim.workload import Arrival, Traffic, arrivals, day_shape

DAY_S = 3600.0
SEED = 6
METHODS = ("ours", "opencost", "average")
TITLES = {"ours": "Headrace", "opencost": "OpenCost's", "average": "average tokens"}


@dataclass(slots=True)
class Request:
    """One request and what it cost by the exact method, in seconds of the replica."""

    arrival: Arrival
    account: Account
    exact_s: float = 0.0
    started_s: float = 0.0
    first_token_s: float = 0.0
    ended_s: float = 0.0

    @property
    def tokens(self) -> int:
        return self.arrival.prompt_tokens + self.arrival.output_tokens


@dataclass(slots=True)
class Day:
    """What a day left behind: the requests, and the replica's own account."""

    requests: list[Request] = field(default_factory=list)
    costs: EngineCosts | None = None

    @property
    def steps_s(self) -> float:
        return sum(each.exact_s for each in self.requests)


def traffic(rate_per_s: float, day_s: float) -> tuple[Traffic, ...]:
    """Return a day of the mix; ``rate_per_s`` is the peak of all together."""
    shape = day_shape(day_s, 0.2, 1.0)
    return chat_rag_agent(0.6 * rate_per_s, 0.25 * rate_per_s, 0.15 * rate_per_s, shape)


# ---- the exact value of a step -----------------------------------------------------


def exact_shares_s(
    params: EngineParams, contexts: Sequence[int], chunks: Sequence[int]
) -> tuple[list[float], list[float]]:
    """Return the Shapley value of each decoding sequence and each prompt chunk of a step.

    Of the engine model's own cost function: ``overhead + max(weights, prefill * tokens) +
    context * contexts + batch * sequences``, and nothing for an empty step. Sequences that
    decode differ in nothing but their context, so coalitions are counted and not listed:
    O(decodes * 2^chunks).
    """
    decodes, count = len(contexts), len(contexts) + len(chunks)
    even_s = params.overhead_s / count + params.batch_s_per_request

    def longer_s(tokens: int) -> float:
        return max(params.weights_s, params.prefill_s_per_token * tokens) if tokens else 0.0

    def added_s(tokens: int, others: Sequence[int], alike: int) -> float:
        """Return what ``tokens`` more add, averaged over every order of arrival."""
        total = 0.0
        for members in range(1 << len(others)):
            inside = [chunk for at, chunk in enumerate(others) if members >> at & 1]
            for joined in range(alike + 1):
                size = joined + len(inside)
                weight = comb(alike, joined) / (count * comb(count - 1, size))
                base = sum(inside) + joined
                total += weight * (longer_s(base + tokens) - longer_s(base))
        return total

    decode_s = added_s(1, chunks, decodes - 1) + even_s if decodes else 0.0
    first = [decode_s + params.context_s_per_token * context for context in contexts]
    second = [
        added_s(chunk, [*chunks[:at], *chunks[at + 1 :]], decodes) + even_s
        for at, chunk in enumerate(chunks)
    ]
    return first, second


# ---- a day -------------------------------------------------------------------------


class Replica:
    """A replica in the model's time, metered as the simulated engine is, and exactly."""

    def __init__(self, params: EngineParams) -> None:
        self.day = Day()
        self._params = params
        self._meter = CostMeter(0.0, params.block_tokens)
        self._steps = ModelSteps(
            self._meter, lambda model_s: model_s, lambda sequence: sequence.name
        )
        self._model = EngineModel(params, on_run=self._stepped)
        self._by_account: dict[Account, Request] = {}
        self._meter.ready(0.0)

    def run(self, requests: Sequence[Arrival]) -> Day:
        for arrival in requests:
            self._advance(arrival.arrival_s)
            self._meter.occupied(arrival.arrival_s)
            request = Request(arrival, self._meter.open(arrival.tenant))
            self._by_account[request.account] = request
            self.day.requests.append(request)
            self._model.add(
                request.account,
                arrival.arrival_s,
                prompt_tokens=arrival.prompt_tokens,
                output_tokens=arrival.output_tokens,
                hashes=arrival.prefix_hashes,
            )
        now_s = 0.0
        while self._model.busy:
            now_s = self._model.next_event_s()
            self._advance(now_s)
        self.day.costs = self._meter.read(now_s)
        return self.day

    def _advance(self, until_s: float) -> None:
        for at_s, kind, sequence in self._model.advance(until_s):
            request = self._by_account[sequence.name]
            if kind is EventKind.FIRST_TOKEN:
                request.first_token_s = at_s
                request.started_s = sequence.started_s or at_s
            elif kind is EventKind.FINISHED:
                request.ended_s = at_s
                self._meter.close(request.account, Outcome.COMPLETED)
        if not self._model.busy:
            self._meter.vacant()

    def _stepped(self, run: StepRun) -> None:
        self._steps.stepped(run)
        # Contexts grow by one a step: the middle of the run stands for all of it.
        grown = run.passed + (run.steps - 1) / 2
        contexts = [context for _, context in run.decodes]
        chunks = [chunk for _, chunk in run.prefills]
        decodes, prefills = exact_shares_s(self._params, contexts, chunks)
        more_s = self._params.context_s_per_token * grown
        for (sequence, _), share_s in zip(run.decodes, decodes, strict=True):
            self._by_account[sequence.name].exact_s += run.steps * (share_s + more_s)
        for (sequence, _), share_s in zip(run.prefills, prefills, strict=True):
            self._by_account[sequence.name].exact_s += share_s


# ---- the methods -------------------------------------------------------------------


def by_average_tokens(day: Day) -> list[float]:
    """Return each request's cost at one price for every token."""
    per_token_s = day.steps_s / sum(each.tokens for each in day.requests)
    return [per_token_s * each.tokens for each in day.requests]


def by_opencost(day: Day) -> list[float]:
    """Return each request's cost at OpenCost's prices of an input and an output token.

    vLLM observes a request's prefill time once, and the time per output token once as well:
    its mean over the request.
    """
    input_s = sum(each.first_token_s - each.started_s for each in day.requests)
    output_s = sum(
        (each.ended_s - each.first_token_s) / max(1, each.arrival.output_tokens - 1)
        for each in day.requests
    )
    prompts = sum(each.arrival.prompt_tokens for each in day.requests)
    outputs = sum(each.arrival.output_tokens for each in day.requests)
    per_input_s = day.steps_s * input_s / (input_s + output_s) / prompts
    per_output_s = day.steps_s * output_s / (input_s + output_s) / outputs
    return [
        per_input_s * each.arrival.prompt_tokens + per_output_s * each.arrival.output_tokens
        for each in day.requests
    ]


def by_attribution(day: Day) -> list[float]:
    """Return what the product's own account says of each request."""
    return [each.account.engine_s for each in day.requests]


BY: Mapping[str, Callable[[Day], list[float]]] = {
    "ours": by_attribution,
    "opencost": by_opencost,
    "average": by_average_tokens,
}


# ---- figures -----------------------------------------------------------------------


def figures(day: Day) -> dict[str, object]:
    """Return shares by tenant and errors by request, of every method."""
    costs = day.costs
    assert costs is not None
    uses = costs.use.uses
    tenants: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    errors: dict[str, dict[str, float | None]] = {}
    for each in day.requests:
        row = tenants[each.arrival.tenant]
        row["requests"] += 1
        row["prompt_tokens"] += each.arrival.prompt_tokens
        row["output_tokens"] += each.arrival.output_tokens
        row["exact"] += each.exact_s
    for method in METHODS:
        paid = BY[method](day)
        ratios = [abs(pay / each.exact_s - 1) for pay, each in zip(paid, day.requests, strict=True)]
        moved = sum(abs(pay - each.exact_s) for pay, each in zip(paid, day.requests, strict=True))
        errors[method] = {
            "sum_ratio": sum(paid) / day.steps_s,
            "misplaced_ratio": moved / 2 / day.steps_s,
            "p50": percentile(ratios, 0.5),
            "p95": percentile(ratios, 0.95),
            "most": max(ratios),
        }
        for pay, each in zip(paid, day.requests, strict=True):
            tenants[each.arrival.tenant][method] += pay
    return {
        "requests": len(day.requests),
        "steps_s": day.steps_s,
        "lifetime_s": costs.use.lifetime_ns / 1e9,
        "idle_ratio": uses[Use.IDLE] / costs.use.lifetime_ns,
        "unattributed_ratio": uses[Use.UNATTRIBUTED] / costs.use.lifetime_ns,
        "provisional_ratio": costs.use.provisional_ns / costs.use.lifetime_ns,
        "fit_error_ratio": costs.fit_error_ratio,
        "tenants": {name: dict(row) for name, row in sorted(tenants.items())},
        "errors": errors,
    }


def table(found: Mapping[str, object]) -> str:
    """Return the figures as Markdown."""
    tenants, errors = found["tenants"], found["errors"]
    assert isinstance(tenants, dict)
    assert isinstance(errors, dict)
    lines = [
        "| tenant | requests | prompt tokens | output tokens | exact, s | "
        + " | ".join(TITLES[method] for method in METHODS)
        + " |",
        "|---|---|---|---|---|" + "---|" * len(METHODS),
    ]
    for name, row in tenants.items():
        cells = [f"{row[method]:.1f} ({row[method] / row['exact'] - 1:+.1%})" for method in METHODS]
        lines.append(
            f"| {name} | {row['requests']:.0f} | {row['prompt_tokens']:.0f} | "
            f"{row['output_tokens']:.0f} | {row['exact']:.1f} | " + " | ".join(cells) + " |"
        )
    lines += [
        "",
        "| method | paid by the wrong request | error of a request p50 | p95 | most |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS:
        row = errors[method]
        lines.append(
            f"| {TITLES[method]} | {row['misplaced_ratio']:.1%} | {row['p50']:.1%} | "
            f"{row['p95']:.1%} | {row['most']:.1%} |"
        )
    lines += [
        "",
        f"{found['requests']} requests; steps {found['steps_s']:.0f} s of "
        f"{found['lifetime_s']:.0f} s, idle {found['idle_ratio']:.1%}, unattributed "
        f"{found['unattributed_ratio']:.4%}, split by default coefficients "
        f"{found['provisional_ratio']:.1%}; fit error {found['fit_error_ratio']:.1%} of a step.",
    ]
    return "\n".join(lines)


def draw(found: Mapping[str, object], file: Path) -> None:
    """Draw each tenant's share of the bill by every method."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    tenants = found["tenants"]
    assert isinstance(tenants, dict)
    columns = ("exact", *METHODS)
    names = ("exact", *(TITLES[method] for method in METHODS))
    whole = {column: sum(row[column] for row in tenants.values()) for column in columns}
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2))
    bottom = [0.0] * len(columns)
    for name, row in tenants.items():
        heights = [100 * row[column] / whole[column] for column in columns]
        axes.bar(names, heights, bottom=bottom, label=name)
        bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
    axes.set_ylabel("share of the bill, %")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def simulate(rate_per_s: float, day_s: float, seed: int) -> Day:
    """Run a day; the same arguments give the same day."""
    params = EngineParams(blocks_per_hash=BLOCKS_PER_HASH)
    requests = list(arrivals(traffic(rate_per_s, day_s), day_s, seed))
    return Replica(params).run(requests)


def main() -> int:
    """Run the day and print the tables. Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost_methods")
    parser.add_argument("--rate-per-s", type=float, default=8.0, help="requests/s at the peak")
    parser.add_argument("--day-s", type=float, default=DAY_S, help="length of the day")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, metavar="DIR", help="figures and plot go here")
    args = parser.parse_args()
    found = figures(simulate(args.rate_per_s, args.day_s, args.seed))
    print(table(found))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1) + "\n"
        (args.out / "cost_methods.json").write_text(text, encoding="utf-8")
        draw(found, args.out / "cost_methods.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
