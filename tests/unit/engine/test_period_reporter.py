"""A replica's account of its time, from its start to its end."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.core.attribution import ReplicaTime, ReplicaUse, Use
from serve_app.core.calendar import NS_PER_S
from serve_app.engine.period_reporter import PeriodReporter, Place
from serve_app.usage import ReplicaPeriod, decode, encode
from tests.usage_records import HOUR_S, START_S

PLACE = Place("r1", "small", "gpu-1", "h100", 2.0)


@dataclass
class Costs:
    use: ReplicaUse


class Clock:
    """Monotonic seconds that pass when told, beside a wall that began on a whole hour."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def wall_ns(self) -> int:
        return START_S * NS_PER_S + round((self.now_s - 100) * NS_PER_S)


async def test_a_life_is_reported_from_birth_to_end_with_its_place() -> None:
    clock, noted = Clock(), list[ReplicaPeriod]()
    life = ReplicaTime(100 * NS_PER_S)
    clock.now_s = 130.0
    life.ready(130 * NS_PER_S)

    def costs() -> Costs:
        return Costs(life.read(round(clock.now_s * NS_PER_S)))

    reporter = PeriodReporter(
        PLACE, costs, noted.append, clock=clock, wall_ns=clock.wall_ns, born_s=100.0
    )
    reporter.start()
    assert [each.uses_ns for each in noted] == [{"start_up": 30 * NS_PER_S}]
    assert (noted[0].number, noted[0].hour, noted[0].from_ns) == (1, START_S, START_S * NS_PER_S)
    clock.now_s = 100.0 + HOUR_S + 5
    await reporter.stop()
    assert noted[1].uses_ns == {"idle": (HOUR_S + 5 - 30) * NS_PER_S}
    # It began in the first hour, and what ended until then is on that account.
    assert (noted[1].hour, noted[1].from_ns) == (START_S, noted[0].until_ns)
    assert reporter.hour == START_S + HOUR_S
    assert (noted[1].node, noted[1].instance, noted[1].gpus) == ("gpu-1", "h100", 2.0)
    assert decode(encode(noted[1])) == noted[1]
    await reporter.stop()
    assert len(noted) == 2


async def test_a_start_across_the_hour_is_reported_for_both() -> None:
    clock, noted = Clock(), list[ReplicaPeriod]()
    born_s = 100.0 - 20
    life = ReplicaTime(round(born_s * NS_PER_S))
    clock.now_s = 130.0
    life.ready(130 * NS_PER_S)

    def costs() -> Costs:
        return Costs(life.read(round(clock.now_s * NS_PER_S)))

    reporter = PeriodReporter(
        PLACE, costs, noted.append, clock=clock, wall_ns=clock.wall_ns, born_s=born_s
    )
    reporter.start()
    await reporter.stop()
    assert [(each.number, each.hour, each.uses_ns) for each in noted] == [
        (1, START_S - HOUR_S, {"start_up": 20 * NS_PER_S}),
        (2, START_S, {"start_up": 30 * NS_PER_S}),
    ]


async def test_an_engine_that_measures_nothing_has_lived_all_the_same() -> None:
    clock, noted = Clock(), list[ReplicaPeriod]()
    clock.now_s = 101.5
    reporter = PeriodReporter(
        PLACE, lambda: None, noted.append, clock=clock, wall_ns=clock.wall_ns, born_s=100.0
    )
    reporter.start()
    clock.now_s = 104.0
    await reporter.stop()
    unattributed = [each.uses_ns[Use.UNATTRIBUTED.value] for each in noted]
    assert unattributed == [1_500_000_000, 2_500_000_000]
    assert all(set(each.uses_ns) == {Use.UNATTRIBUTED.value} for each in noted)
