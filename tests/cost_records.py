"""Replicas' accounts and the requests on them, for tests: they agree to the nanosecond."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import insert

from serve_app.core.attribution import Use
from serve_app.core.calendar import HOUR_NS, NS_PER_S
from serve_app.core.types import KeyId, PoolName, PriorityClass, TenantId
from serve_app.ledger.database import Database
from serve_app.ledger.schema import (
    ENGINE_TIME,
    PROVISIONAL_NS,
    REPLICA_HOUR,
    SUMS,
    USAGE_ROLLUP,
    USES_NS,
)
from serve_app.usage import LedgerRecord, ReplicaPeriod, Witness
from tests.usage_records import HOUR_S, START_S, charge, record


def period(number: int = 1, hour: int = START_S, lasted_ns: int = HOUR_NS, **fields: Any) -> Any:
    """Return a replica's account of an hour: idle unless ``uses_ns`` says otherwise."""
    values: dict[str, Any] = {
        "replica": "r1",
        "number": number,
        "pool": "small",
        "node": "gpu-1",
        "instance": "h100",
        "gpus": 1.0,
        "hour": hour,
        "from_ns": hour * NS_PER_S,
        "until_ns": hour * NS_PER_S + lasted_ns,
        "uses_ns": {Use.IDLE.value: lasted_ns},
    }
    return ReplicaPeriod(**(values | fields))


@dataclass(frozen=True)
class Person:
    """Who sends what: requests an hour, tokens, engine milliseconds for each."""

    tenant: str
    user: str
    model: str
    hourly: int
    prompt: int = 1000
    cached: int = 0
    output: int = 200
    engine_ms: float = 500.0


@dataclass(frozen=True)
class Town:
    """Replicas of each model and the people who use them, from ``start_s`` for some hours."""

    people: tuple[Person, ...]
    replicas: dict[str, int]
    hours: int
    start_s: int = START_S
    seed: int = 1
    # Changes a person for an hour: a runaway agent, a model that got dearer.
    change: Callable[[Person, int], Person] = field(default=lambda person, hour: person)
    # The part of a full hour's engine time that steps take whoever is in them: in a quiet hour
    # fewer share it, and a request takes longer.
    batched: float = 0.0

    def records(self) -> Iterator[LedgerRecord]:
        """Yield both witnesses of every request, and every replica's account of every hour."""
        chance = random.Random(self.seed)
        number = 0
        for index in range(self.hours):
            hour = self.start_s + index * HOUR_S
            used = {
                (model, place): dict.fromkeys((Use.USEFUL, Use.CANCELLED), 0)
                for model, count in self.replicas.items()
                for place in range(count)
            }
            for standing in self.people:
                person = self.change(standing, index)
                for _ in range(_about(person.hourly, index, chance)):
                    number += 1
                    place = chance.randrange(self.replicas[person.model])
                    outcome = "cancelled" if chance.random() < 0.02 else "completed"
                    use = Use.CANCELLED if outcome == "cancelled" else Use.USEFUL
                    engine_ns = round(person.engine_ms * 1e6 * chance.uniform(0.7, 1.4))
                    used[person.model, place][use] += engine_ns
                    at_s = hour + chance.random() * 3500
                    seen = {
                        "prompt_tokens": person.prompt,
                        "cached_prompt_tokens": person.cached,
                        "output_tokens": round(person.output * chance.uniform(0.7, 1.4)),
                        "outcome": outcome,
                        "replica": f"{person.model}-{place}",
                        "engine_ns": engine_ns,
                    }
                    of = charge(
                        number,
                        at_s,
                        tenant=TenantId(person.tenant),
                        user=person.user,
                        key=KeyId(f"k-{person.tenant}"),
                        model=person.model,
                        pool=PoolName(person.model),
                        priority_class=PriorityClass.STANDARD,
                        price_version=1,
                    )
                    yield record(of, ended_at_s=at_s + 1, **seen)
                    yield record(of, Witness.ENGINE, ended_at_s=at_s + 1, engine_hour=hour, **seen)
            for (model, place), uses in used.items():
                busy_ns = sum(uses.values())
                assert busy_ns <= HOUR_NS, "more work than an hour has"
                uses[Use.IDLE] = HOUR_NS - busy_ns
                yield period(
                    index + 1,
                    hour,
                    replica=f"{model}-{place}",
                    pool=model,
                    instance=model,
                    node=f"gpu-{model}-{place}",
                    uses_ns={use.value: time_ns for use, time_ns in uses.items()},
                )

    def write_sums(self, database: Database) -> None:
        """Write what ``records`` would add up to into the derived tables only: months are quick.

        Requests of one person and hour all cost the same, and the first replica runs them.
        """
        chance = random.Random(self.seed)
        tables: dict[Any, list[dict[str, Any]]] = {
            table: [] for table in (ENGINE_TIME, USAGE_ROLLUP, REPLICA_HOUR)
        }
        for index in range(self.hours):
            hour = self.start_s + index * HOUR_S
            busy = dict.fromkeys(self.replicas, 0)
            there = [
                (person, _about(person.hourly, index, chance))
                for person in (self.change(standing, index) for standing in self.people)
            ]
            for person, count in there:
                longer = self._longer(person.model, there)
                engine_ns = round(
                    count * person.engine_ms * 1e6 * longer * chance.uniform(0.8, 1.25)
                )
                busy[person.model] += engine_ns
                whose = {
                    "hour": hour,
                    "tenant": person.tenant,
                    "user_id": person.user,
                    "key_id": f"k-{person.tenant}",
                    "model": person.model,
                    "priority_class": int(PriorityClass.STANDARD),
                    "tag": "",
                }
                time = {"requests": count, "engine_ns": engine_ns, "wasted_ns": 0}
                tables[ENGINE_TIME].append(whose | time | {"replica": f"{person.model}-0"})
                tables[USAGE_ROLLUP].append(
                    whose
                    | dict.fromkeys(SUMS, 0)
                    | {
                        "requests": count,
                        "billed_prompt_tokens": count * person.prompt,
                        "billed_cached_tokens": count * person.cached,
                        "billed_output_tokens": count * person.output,
                    }
                )
            for model, count in self.replicas.items():
                for place in range(count):
                    useful_ns = busy[model] if place == 0 else 0
                    assert useful_ns <= HOUR_NS, "more work than an hour has"
                    tables[REPLICA_HOUR].append(
                        {
                            "hour": hour,
                            "replica": f"{model}-{place}",
                            "pool": model,
                            "node": f"gpu-{model}-{place}",
                            "instance": model,
                            "gpus": 1.0,
                            "from_ns": hour * NS_PER_S,
                            "until_ns": hour * NS_PER_S + HOUR_NS,
                            **dict.fromkeys((*USES_NS, PROVISIONAL_NS), 0),
                            "useful_ns": useful_ns,
                            "idle_ns": HOUR_NS - useful_ns,
                        }
                    )
        with database.transaction() as connection:
            for table, rows in tables.items():
                connection.execute(insert(table), rows)

    def _longer(self, model: str, there: Sequence[tuple[Person, int]]) -> float:
        """Return how much longer a request takes than with everybody there."""
        usual = sum(each.hourly * each.prompt for each in self.people if each.model == model)
        now = sum(count * each.prompt for each, count in there if each.model == model)
        return 1 - self.batched + self.batched * usual / now if now else 1.0


def _about(hourly: int, index: int, chance: random.Random) -> int:
    """Return a count for an hour: less at night and at weekends, and never quite the same."""
    of_day = 1.0 if 8 <= index % 24 < 20 else 0.4
    of_week = 1.0 if index // 24 % 7 < 5 else 0.5
    return round(hourly * of_day * of_week * chance.uniform(0.7, 1.3))
