"""Costs summed up the ways that reports on them need: by pool, by model, by hour and user."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import Connection, and_, func, or_, select

from serve_app.core.attribution import Use
from serve_app.core.calendar import NS_PER_S
from serve_app.core.savings import ModelUse, Repetition
from serve_app.core.true_cost import HourCost, InstancePrice, Overhead
from serve_app.core.types import Outcome, PriorityClass
from serve_app.core.unit_economics import PoolUse, Product
from serve_app.ledger.costs import SplitHour, split_hours
from serve_app.ledger.schema import ENGINE_TIME, REPLICA_HOUR, USAGE_EVENT, USAGE_ROLLUP
from serve_app.ledger.statements import within
from serve_app.usage import Witness
from serve_app.usage_report import UsageQuery

_REPEATS_MIN: Final = 20


@dataclass(slots=True)
class PoolSums:
    """Pools and the models that they served; ``hours`` is how many there was any pool in.

    ``priced`` are the pools over the hours whose time has a price, with what they produced in
    them; one that has none of these is not there. ``unpriced`` are the others, by pool.
    ``models`` is time and cost by model and pool, and ``model_costs`` the cost in the hours
    whose time has a price.
    """

    pools: dict[str, PoolUse] = field(default_factory=dict)
    priced: dict[str, PoolUse] = field(default_factory=dict)
    unpriced: set[tuple[str, int]] = field(default_factory=set)
    models: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    model_costs: dict[tuple[str, str], int] = field(default_factory=dict)
    hours: int = 0


def uses_of(cost: HourCost) -> dict[Use, int]:
    """Return a replica-hour by use, with what no account says as unattributed."""
    uses = dict(cost.hour.uses_ns)
    missing_ns = cost.lasted_ns - sum(uses.values())
    uses[Use.UNATTRIBUTED] = uses.get(Use.UNATTRIBUTED, 0) + missing_ns
    return uses


def pool_sums(
    connection: Connection, query: UsageQuery, instances: Mapping[str, InstancePrice]
) -> PoolSums:
    """Return every pool's time and cost by use, and what it produced.

    A model that several pools served counts where most of its engine time was.
    """
    sums = PoolSums()
    hours: dict[tuple[str, int], PoolUse] = {}
    spent: dict[tuple[str, str, int], int] = defaultdict(int)
    for each in split_hours(connection, query, ("model",), instances):
        account = each.cost.hour
        use = hours.setdefault((account.pool, account.hour), PoolUse(account.pool))
        use.add(uses_of(each.cost), each.cost.cost_nanousd)
        use.provisional_ns += account.provisional_ns
        for part in each.cost.parts:
            if not isinstance(part.key, Overhead):
                key = (str(part.key[0]), account.pool)
                time_ns, cost = sums.models.get(key, (0, 0))
                sums.models[key] = time_ns + part.time_ns, cost + (part.cost_nanousd or 0)
                spent[(*key, account.hour)] += part.cost_nanousd or 0
    for (name, hour), use in hours.items():
        sums.pools.setdefault(name, PoolUse(name)).add_hour(use)
        if use.priced:
            sums.priced.setdefault(name, PoolUse(name)).add_hour(use)
        else:
            sums.unpriced.add((name, hour))
    for (model, name, hour), cost in spent.items():
        if (name, hour) not in sums.unpriced:
            sums.model_costs[model, name] = sums.model_costs.get((model, name), 0) + cost
    sums.hours = len({hour for _, hour in hours})
    _add_products(connection, query, sums)
    return sums


def add_good(
    connection: Connection,
    query: UsageQuery,
    sums: PoolSums,
    ttft_slo_s: Iterable[tuple[str, float]],
) -> None:
    """Add to pools what came in time: completed, its first token within its class's SLO."""
    event, homes = USAGE_EVENT.c, _homes(sums)
    in_time = or_(
        *(
            and_(
                event.priority_class == int(PriorityClass[name.upper()]),
                event.first_token_s <= slo_s,
            )
            for name, slo_s in ttft_slo_s
        )
    )
    columns = (func.count(), func.sum(event.prompt_tokens), func.sum(event.output_tokens))
    statement = within(select(event.model, event.hour, *columns), event.hour, query)
    statement = statement.where(
        event.witness == Witness.ROUTER.value, event.outcome == Outcome.COMPLETED.value, in_time
    )
    for row in connection.execute(statement.group_by(event.model, event.hour)):
        for pool in _producers(sums, homes.get(row[0], ""), row[1]):
            before = pool.good
            pool.good = Product(
                before.requests + int(row[2]),
                before.input_tokens + int(row[3]),
                before.output_tokens + int(row[4]),
            )


def model_uses(connection: Connection, query: UsageQuery, sums: PoolSums) -> list[ModelUse]:
    """Return what each model took where it mostly ran, its tokens and its longest request."""
    event = USAGE_EVENT.c
    longest = func.max(event.prompt_tokens + event.output_tokens)
    statement = within(select(event.model, longest), event.hour, query).group_by(event.model)
    longest_of = {row[0]: int(row[1]) for row in connection.execute(statement)}
    homes = _homes(sums)
    tokens_of: dict[str, int] = defaultdict(int)
    priced_of: dict[str, int] = defaultdict(int)
    for name, hour, values in _products(connection, query):
        tokens_of[name] += values[1] + values[3]
        if (homes.get(name, ""), hour) not in sums.unpriced:
            priced_of[name] += values[1] + values[3]
    return [
        ModelUse(
            model,
            pool,
            sums.models[model, pool][0],
            sums.model_costs.get((model, pool), 0),
            tokens_of[model],
            longest_of[model],
            priced_of[model],
        )
        for model, pool in sorted(homes.items())
        if model in longest_of
    ]


def repetitions(connection: Connection, query: UsageQuery) -> list[Repetition]:
    """Return prompts of one length that a tenant sent to a model again and again."""
    event = USAGE_EVENT.c
    keys = (event.tenant, event.model, event.prompt_tokens)
    count, cached = func.count(), func.sum(event.cached_prompt_tokens)
    statement = within(select(*keys, count, cached), event.hour, query)
    statement = statement.where(event.witness == Witness.ENGINE.value)
    statement = statement.group_by(*keys).having(count >= _REPEATS_MIN)
    rows = connection.execute(statement.order_by(*keys))
    return [Repetition(row[0], row[1], *(int(value) for value in row[2:])) for row in rows]


def token_rows(connection: Connection, query: UsageQuery) -> dict[str, list[tuple[int, int, int]]]:
    """Return by model: uncached prompt tokens, output tokens, engine time, hour by hour."""
    used, time = USAGE_ROLLUP.c, ENGINE_TIME.c
    tokens = select(
        *(used.hour, used.tenant, used.model),
        func.sum(used.billed_prompt_tokens - used.billed_cached_tokens),
        func.sum(used.billed_output_tokens),
    )
    tokens = within(tokens, used.hour, query).group_by(used.hour, used.tenant, used.model)
    times = select(time.hour, time.tenant, time.model, func.sum(time.engine_ns))
    times = within(times, time.hour, query).group_by(time.hour, time.tenant, time.model)
    time_of = {tuple(row[:3]): int(row[3]) for row in connection.execute(times)}
    rows: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for row in connection.execute(tokens):
        if tuple(row[:3]) in time_of:
            rows[row[2]].append((int(row[3]), int(row[4]), time_of[tuple(row[:3])]))
    return rows


@dataclass(slots=True)
class Spent:
    """What one subject took in an hour; ``cost_nanousd`` is None if a part of it has no price.

    ``loads`` is the load of the pools it was on (``loads_by_hour``) times its time there.
    """

    requests: int = 0
    time_ns: int = 0
    cost_nanousd: int | None = 0
    loads: float = 0.0

    @property
    def load(self) -> float:
        """The load at which it was served, on average; 0 if nobody knows."""
        return self.loads / self.time_ns if self.time_ns > 0 else 0.0

    def add(self, requests: int, time_ns: int, cost_nanousd: int | None, load: float = 0.0) -> None:
        """Take in a part of a replica-hour."""
        self.requests += requests
        self.time_ns += time_ns
        self.loads += load * time_ns
        known = self.cost_nanousd is not None and cost_nanousd is not None
        self.cost_nanousd = (self.cost_nanousd or 0) + (cost_nanousd or 0) if known else None


@dataclass(slots=True)
class HourSums:
    """What was spent by hour: by users as ``(tenant, user)``, and by models."""

    users: dict[tuple[str, str], dict[int, Spent]] = field(default_factory=dict)
    models: dict[str, dict[int, Spent]] = field(default_factory=dict)


def hour_sums(
    connection: Connection,
    query: UsageQuery,
    instances: Mapping[str, InstancePrice],
    loads: Mapping[tuple[str, int], float],
) -> HourSums:
    """Return what users and models spent by hour, with and without a price.

    ``loads`` is by model and hour, as ``loads_by_hour`` has it.
    """
    sums = HourSums()
    for each in split_hours(connection, query, ("tenant", "user_id", "model"), instances):
        _add_hour(sums, each, loads)
    return sums


def loads_by_hour(
    connection: Connection, query: UsageQuery, tokens: Mapping[tuple[str, int], int]
) -> dict[tuple[str, int], float]:
    """Return the load of the pool that a model was on, by ``(model, hour)``.

    It is the tokens of all of the pool's models per second of its replicas, idle ones as
    well. A model that several pools served is where most of its engine time was.
    """
    time, lived = ENGINE_TIME.c, REPLICA_HOUR.c
    columns = (time.model, time.hour, lived.pool)
    same = (lived.hour == time.hour) & (lived.replica == time.replica)
    used = select(*columns, func.sum(time.engine_ns)).join_from(ENGINE_TIME, REPLICA_HOUR, same)
    homes: dict[tuple[str, int], tuple[int, str]] = {}
    for row in connection.execute(within(used, time.hour, query).group_by(*columns)):
        mostly = (int(row[3]), row[2])
        place = (str(row[0]), int(row[1]))
        homes[place] = max(homes.get(place, mostly), mostly)
    lives = select(lived.pool, lived.hour, func.sum(lived.until_ns - lived.from_ns))
    lives = within(lives, lived.hour, query).group_by(lived.pool, lived.hour)
    lived_ns: dict[tuple[str, int], int] = {}
    for row in connection.execute(lives):
        lived_ns[row[0], row[1]] = int(row[2])
    made: dict[tuple[str, int], int] = defaultdict(int)
    for (model, hour), (_, pool) in homes.items():
        made[pool, hour] += tokens.get((model, hour), 0)
    return {
        (model, hour): made[pool, hour] * NS_PER_S / lived_ns[pool, hour]
        for (model, hour), (_, pool) in homes.items()
        if lived_ns[pool, hour] > 0
    }


def tokens_by_hour(connection: Connection, query: UsageQuery) -> dict[tuple[str, int], int]:
    """Return how many tokens each model took and gave, by ``(model, hour)``."""
    used = USAGE_ROLLUP.c
    total = func.sum(used.billed_prompt_tokens + used.billed_output_tokens)
    statement = within(select(used.model, used.hour, total), used.hour, query)
    rows = connection.execute(statement.group_by(used.model, used.hour))
    return {(row[0], row[1]): int(row[2]) for row in rows}


def _add_hour(sums: HourSums, each: SplitHour, loads: Mapping[tuple[str, int], float]) -> None:
    hour = each.cost.hour.hour
    for part in each.cost.parts:
        if isinstance(part.key, Overhead):
            continue
        tenant, user, model = map(str, part.key)
        requests = each.counts[part.key].requests
        for series in (
            sums.users.setdefault((tenant, user), {}),
            sums.models.setdefault(model, {}),
        ):
            load = loads.get((model, hour), 0.0)
            series.setdefault(hour, Spent()).add(requests, part.time_ns, part.cost_nanousd, load)


def _homes(sums: PoolSums) -> dict[str, str]:
    homes: dict[str, str] = {}
    for (model, pool), (time_ns, _) in sorted(sums.models.items()):
        if model not in homes or time_ns > sums.models[model, homes[model]][0]:
            homes[model] = pool
    return homes


def _producers(sums: PoolSums, name: str, hour: int) -> Iterator[PoolUse]:
    """Yield what has to count what a pool produced in an hour."""
    if name in sums.pools:
        yield sums.pools[name]
    if name in sums.priced and (name, hour) not in sums.unpriced:
        yield sums.priced[name]


def _products(
    connection: Connection, query: UsageQuery
) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    used = USAGE_ROLLUP.c
    names = ("requests", "billed_prompt_tokens", "billed_cached_tokens", "billed_output_tokens")
    columns = [func.sum(used[name]) for name in (*names, "amount_nanousd")]
    statement = within(select(used.model, used.hour, *columns), used.hour, query)
    for row in connection.execute(statement.group_by(used.model, used.hour)):
        yield row[0], row[1], tuple(map(int, row[2:]))


def _add_products(connection: Connection, query: UsageQuery, sums: PoolSums) -> None:
    homes = _homes(sums)
    for model, hour, (requests, prompt, cached, output, amount) in _products(connection, query):
        for pool in _producers(sums, homes.get(model, ""), hour):
            pool.requests += requests
            pool.input_tokens += prompt
            pool.cached_tokens += cached
            pool.output_tokens += output
            pool.amount_nanousd += amount
