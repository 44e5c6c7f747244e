"""Steps written down in the engine's process and read in the replica's: nothing is lost between."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest

from serve_app.core.attribution import Account, Use
from serve_app.core.cost_meter import CostMeter, Steps
from serve_app.core.types import Outcome, TenantId
from serve_app.engine.step_log import UNSENT_RECORDS_MAX, StepLog
from serve_app.engine.step_reader import StepReader
from serve_app.engine.step_records import Record, StepInbox, Stepped, StepSender

BLOCK_TOKENS = 16


@dataclass
class Request:
    """As much of a request as the log asks of vLLM's."""

    num_prompt_tokens: int
    num_computed_tokens: int = 0


class Pipe:
    """Sender and inbox in one; while ``full``, nothing goes in."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.full = False
        self.packets = 0

    def send(self, records: list[Record]) -> int:
        if self.full:
            return 0
        self.packets += 1
        self.records += records
        return len(records)

    def receive(self) -> list[Record]:
        records, self.records = self.records, []
        return records


@dataclass
class Engine:
    """A scheduler of requests in a time of its own, with its log, reader and meter."""

    now_s: float = 10.0
    pipe: Pipe = field(default_factory=Pipe)

    def __post_init__(self) -> None:
        self.log = StepLog(self.pipe, lambda: self.now_s)
        self.meter = CostMeter(self.now_s, BLOCK_TOKENS)
        self.meter.ready(self.now_s)
        self.reader = self.read_into(self.meter)
        self.requests: dict[str, Request] = {}
        self.accounts: dict[str, Account] = {}
        self.seen: list[Steps] = []
        stepped = self.meter.stepped
        self.meter.stepped = lambda steps: (self.seen.append(steps), stepped(steps))[1]

    def read_into(self, meter: CostMeter) -> StepReader:
        return StepReader(self.pipe, meter, lambda: self.now_s)

    def add(self, name: str, prompt: int = 10, cached: int = 0) -> Account:
        account = self.meter.open("acme")
        self.accounts[name] = account
        self.reader.expect(name, account)
        self.log.joined(name)
        self.requests[name] = Request(prompt, cached)
        return account

    def schedule(self, **tokens: int) -> None:
        for name, count in tokens.items():
            self.requests[name].num_computed_tokens += count
        self.log.scheduled(tokens, self.requests, self.now_s)

    def complete(self, after_s: float, *leaving: str) -> None:
        self.now_s += after_s
        for name in leaving:
            self.drop(name)
        self.log.completed(busy=bool(self.requests))

    def drop(self, name: str) -> None:
        del self.requests[name]
        self.log.left(name)

    def abort(self, name: str) -> None:
        self.drop(name)
        self.log.looked(busy=bool(self.requests))

    def close(self, name: str, outcome: Outcome = Outcome.COMPLETED) -> Account:
        self.reader.read()
        self.meter.close(self.accounts[name], outcome)
        return self.accounts[name]

    def uses(self) -> dict[str, float]:
        """Return where the time went, in seconds, what is zero left out."""
        self.reader.read()
        use = self.meter.read(self.now_s).use
        assert sum(use.uses.values()) == use.lifetime_ns
        return {each.value: ns / 1e9 for each, ns in use.uses.items() if ns}


def test_a_request_alone_pays_for_its_steps_and_the_rest_is_idle() -> None:
    engine = Engine()
    engine.now_s += 2.0
    engine.add("a")
    engine.schedule(a=10)
    engine.complete(0.5)
    for _ in range(8):
        engine.now_s += 0.001  # the engine's turn between two steps belongs to the second
        engine.schedule(a=1)
        engine.complete(0.01)
    engine.schedule(a=1)
    engine.complete(0.01, "a")
    assert engine.close("a").engine_s == pytest.approx(0.5 + 8 * 0.011 + 0.01)
    engine.now_s += 3.0
    assert engine.uses() == pytest.approx({"idle": 5.0, "useful": 0.598})


def test_all_steps_of_a_request_are_read_before_its_end_is() -> None:
    engine = Engine()
    engine.add("a")
    engine.add("b")
    engine.schedule(a=10, b=10)
    engine.complete(0.001)
    engine.schedule(a=1, b=1)
    engine.complete(0.001, "a")
    engine.reader.read()
    assert engine.seen[-1].end_s == engine.now_s


def test_steps_of_one_composition_are_one_record_until_it_is_time_to_send() -> None:
    engine = Engine()
    for name in "ab":
        engine.add(name, cached=9)
    engine.schedule(a=1, b=1)
    engine.complete(0.001)
    packets = engine.pipe.packets
    for _ in range(100):
        engine.schedule(a=1, b=1)
        engine.complete(0.001)
    assert 4 <= engine.pipe.packets - packets <= 6
    engine.schedule(a=1, b=1)
    engine.complete(0.03)
    engine.reader.read()
    assert len({id(steps.decodes) for steps in engine.seen}) == 1
    assert engine.seen[-1].passed + engine.seen[-1].steps == sum(each.steps for each in engine.seen)
    assert [context for _, context in engine.seen[0].decodes] == [10, 10]
    engine.schedule(a=1)
    engine.complete(0.03)
    engine.reader.read()
    assert engine.seen[-1].passed == 0
    assert [context for _, context in engine.seen[-1].decodes] == [112]


def test_steps_that_overlap_are_divided_where_one_ends() -> None:
    engine = Engine()
    first = engine.add("a", 100)
    engine.schedule(a=100)
    engine.now_s += 0.01
    second = engine.add("b", 100)
    engine.schedule(b=100)  # composed while the first computes
    engine.complete(0.09)
    engine.complete(0.05)
    engine.reader.read()
    engine.meter.read(engine.now_s)
    assert (first.engine_s, second.engine_s) == pytest.approx((0.1, 0.05))
    assert engine.uses() == pytest.approx({"open": 0.15})


def test_a_step_under_way_when_its_request_was_aborted_is_still_its_own() -> None:
    engine = Engine()
    account = engine.add("a")
    engine.schedule(a=10)
    engine.abort("a")
    engine.close("a", Outcome.CANCELLED)
    engine.complete(0.25)
    assert engine.uses() == pytest.approx({"cancelled": 0.25})
    assert account.late_ns == 25 * 10**7
    engine.now_s += 1.0
    assert engine.uses() == pytest.approx({"cancelled": 0.25, "idle": 1.0})


def test_a_request_that_is_aborted_in_the_queue_leaves_the_engine_idle() -> None:
    engine = Engine()
    engine.add("a")
    engine.now_s += 0.125
    engine.abort("a")
    engine.now_s += 1.0
    engine.close("a", Outcome.CANCELLED)
    assert engine.uses() == pytest.approx({"unattributed": 0.125, "idle": 1.0})


def test_an_idle_engines_turns_are_idle_time() -> None:
    engine = Engine()
    engine.add("a")
    engine.schedule(a=10)
    engine.complete(0.1, "a")
    engine.schedule()  # its workers hear who has ended
    engine.complete(0.002)
    engine.now_s += 0.5
    engine.close("a")
    engine.add("b")
    engine.schedule(b=10)
    engine.complete(0.1, "b")
    engine.close("b")
    assert engine.uses() == pytest.approx({"useful": 0.2, "idle": 0.502})


def test_a_turn_in_which_nothing_is_computed_while_requests_wait_is_nobodys() -> None:
    engine = Engine()
    engine.add("a")
    engine.schedule()
    engine.complete(0.125)
    engine.schedule(a=10)
    engine.complete(0.1, "a")
    engine.close("a")
    assert engine.uses() == pytest.approx({"unattributed": 0.125, "useful": 0.1})


def test_an_engine_that_stands_still_between_two_steps_charges_nobody() -> None:
    engine = Engine()
    engine.add("a")
    engine.schedule(a=10)
    engine.complete(0.1)
    for _ in range(3):
        engine.schedule(a=1)
        engine.complete(0.005)
    engine.now_s += 5.0  # paused with a request in it
    engine.schedule(a=1)
    engine.complete(0.01, "a")
    engine.close("a")
    assert engine.uses() == pytest.approx({"unattributed": 5.0, "useful": 0.125})


def test_what_a_preemption_threw_away_is_repeated_work_and_no_more_is() -> None:
    engine = Engine()
    engine.add("a", 100)
    engine.schedule(a=100)
    engine.complete(0.1)
    engine.schedule(a=1)
    engine.complete(0.01)
    engine.log.preempted("a", 101)
    engine.requests["a"].num_computed_tokens = 16  # found in the prefix cache
    engine.schedule(a=86)
    engine.complete(0.1)
    engine.schedule(a=1)
    engine.complete(0.03)
    engine.reader.read()
    (chunk,) = engine.seen[-2].prefills
    assert (chunk.tokens, chunk.computed_tokens, chunk.repeated_tokens) == (86, 102, 85)
    assert chunk.read_tokens == 16
    assert [context for _, context in engine.seen[-1].decodes] == [103]
    (again_s,) = [value for name, value in engine.uses().items() if name == "open"]
    assert again_s == pytest.approx(0.24)
    assert engine.accounts["a"].recomputed_ns == pytest.approx(85 / 86 * 1e8, rel=0.01)


def test_a_preempted_request_that_finds_all_but_a_token_is_not_taken_for_going_on() -> None:
    engine = Engine()
    engine.add("a", 10, cached=9)
    for _ in range(20):
        engine.schedule(a=1)
        engine.complete(0.01)
    engine.log.preempted("a", 29)
    engine.requests["a"].num_computed_tokens = 15
    engine.schedule(a=1)
    engine.complete(0.03)
    engine.reader.read()
    (chunk,) = engine.seen[-1].prefills
    assert (chunk.computed_tokens, chunk.repeated_tokens) == (16, 1)


def test_what_an_engine_does_before_it_is_ready_is_start_up() -> None:
    engine = Engine()
    engine.meter = CostMeter(engine.now_s, BLOCK_TOKENS)
    engine.reader = engine.read_into(engine.meter)
    engine.add("warm-up")
    engine.schedule(**{"warm-up": 10})
    engine.complete(0.5, "warm-up")
    assert engine.close("warm-up").engine_s == 0.0
    engine.meter.ready(engine.now_s)
    engine.now_s += 1.0
    assert engine.uses() == pytest.approx({"start_up": 0.5, "idle": 1.0})


def test_the_last_token_of_a_prompt_alone_counts_as_decoding() -> None:
    engine = Engine()
    engine.add("a", 64, cached=63)
    engine.schedule(a=1)
    engine.complete(0.03)
    engine.reader.read()
    assert engine.seen[0].prefills == ()


def test_several_sequences_of_a_request_pay_into_one_account() -> None:
    engine = Engine()
    account = engine.add("a")
    for name in ("a-1", "a-2"):
        engine.reader.expect(name, account)
        engine.log.joined(name)
        engine.requests[name] = Request(10)
    engine.schedule(**{"a-1": 10, "a-2": 10})
    engine.complete(0.2, "a-1", "a-2", "a")
    assert engine.close("a").engine_s == pytest.approx(0.2)


def test_a_request_that_the_replica_does_not_know_of_is_booked_all_the_same() -> None:
    engine = Engine()
    engine.log.joined("vLLM's own")
    engine.requests["vLLM's own"] = Request(10)
    engine.schedule(**{"vLLM's own": 10})
    engine.complete(0.1, "vLLM's own")
    assert engine.uses() == pytest.approx({"useful": 0.1})


def test_records_that_find_no_room_wait_and_then_only_steps_are_lost() -> None:
    engine = Engine()
    engine.add("a")
    engine.schedule(a=10)
    engine.complete(0.001)
    engine.reader.read()
    engine.pipe.full = True
    for step in range(UNSENT_RECORDS_MAX + 10):
        # Two compositions in turn, so that nothing can be put together.
        name = f"b{step % 2}"
        if name not in engine.requests:
            engine.add(name)
        engine.schedule(**{name: 1})
        engine.complete(0.001)
    assert len(engine.log._unsent) < UNSENT_RECORDS_MAX
    engine.pipe.full = False
    engine.schedule(a=1)
    engine.complete(0.03, "a", "b0", "b1")
    for name in ("a", "b0", "b1"):
        engine.close(name)
    uses = engine.uses()
    assert engine.reader.lost_records > UNSENT_RECORDS_MAX - 10
    assert uses["unattributed"] == pytest.approx(engine.reader.lost_records * 0.001, abs=0.002)
    assert uses["useful"] == pytest.approx(0.03 + 0.001 + 0.01, abs=0.01)


def test_a_long_random_day_adds_up() -> None:
    engine, dice = Engine(), Random(7)
    began_s, idle_s = engine.now_s, 0.0
    ended: list[str] = []
    for number in range(5000):
        if dice.random() < 0.1 and len(engine.requests) < 6:
            engine.add(f"r{number}", dice.randrange(2, 200))
        if not engine.requests:
            wait_s = dice.choice([0.0, 0.2])
            idle_s += wait_s
            engine.now_s += wait_s
            continue
        tokens = {}
        for name, request in engine.requests.items():
            rest = request.num_prompt_tokens - request.num_computed_tokens
            tokens[name] = max(1, min(64, rest))
        engine.schedule(**tokens)
        leaving = [name for name in engine.requests if dice.random() < 0.03]
        if leaving and dice.random() < 0.3:
            engine.abort(leaving[0])
            engine.close(leaving[0], Outcome.CANCELLED)
            leaving = leaving[1:]
        engine.complete(dice.uniform(0.001, 0.03), *leaving)
        for name in leaving:
            engine.close(name)
        ended += leaving
    for name in list(engine.requests):
        engine.abort(name)
        engine.close(name, Outcome.CANCELLED)
    uses = engine.uses()
    assert len(ended) > 100
    assert sum(uses.values()) == pytest.approx(engine.now_s - began_s)
    assert uses["idle"] == pytest.approx(idle_s)
    assert uses.get("unattributed", 0.0) < 0.001 * (engine.now_s - began_s)
    assert "open" not in uses
    paid_s = sum(account.engine_s for account in engine.accounts.values())
    assert paid_s == pytest.approx(uses["useful"] + uses["cancelled"])
    assert not engine.reader._accounts
    assert not engine.log._numbers


def test_a_record_that_makes_no_sense_ends_the_reading_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = Engine()
    account = engine.add("a")
    engine.reader.read()
    engine.pipe.records.append(Stepped(10.0, 11.0, 1, [99, 5], []))
    engine.reader.read()
    engine.pipe.records.append(Stepped(10.0, 11.0, 1, [0, 5], []))
    engine.reader.read()
    assert [record.message for record in caplog.records] == [
        "the records of the engine's steps are no longer read"
    ]
    engine.meter.close(account, Outcome.COMPLETED)
    assert account.engine_s == 0.0


@pytest.mark.parametrize("breaks", ["the log", "the reading"])
@pytest.mark.parametrize("ready", [True, False])
def test_time_after_the_recording_broke_is_nobodys_and_never_idle(breaks: str, ready: bool) -> None:
    engine = Engine()
    if not ready:
        engine.meter = CostMeter(engine.now_s, BLOCK_TOKENS)
        engine.reader = engine.read_into(engine.meter)
    engine.now_s += 2.0
    assert engine.uses() == pytest.approx({"idle" if ready else "start_up": 2.0})
    if breaks == "the log":
        engine.log.stopped()
    else:
        engine.pipe.records.append(Stepped(10.0, 11.0, 1, [99, 5], []))
    before = engine.uses()
    if not ready:
        engine.meter.ready(engine.now_s)
        engine.uses()
    # What still comes is not believed.
    engine.log.looked(busy=False)
    for _ in range(3):
        engine.now_s += 60.0
        after = engine.uses()
    assert after == pytest.approx({**before, "unattributed": 180.0})


# ---- the socket --------------------------------------------------------------------


def test_a_packet_sent_has_arrived() -> None:
    inbox = StepInbox()
    sender = StepSender(inbox.path)
    meter = CostMeter(0.0, BLOCK_TOKENS)
    reader = StepReader(inbox, meter)
    account = Account(TenantId("acme"))
    reader.expect("a", account)
    log = StepLog(sender)
    meter.ready(0.0)
    log.joined("a")
    request = Request(4, 4)
    log.scheduled({"a": 4}, {"a": request}, 0.0)
    log.left("a")
    log.completed(busy=False)
    reader.read()
    meter.close(account, Outcome.COMPLETED)
    assert account.engine_ns > 0
    assert meter.read(0.0).use.uses[Use.USEFUL] == account.engine_ns
    inbox.close()
    inbox.close()


def test_a_full_socket_takes_what_fits_and_loses_nothing() -> None:
    inbox = StepInbox()
    sender = StepSender(inbox.path)
    pipe, engine = Pipe(), Engine()
    engine.log = StepLog(pipe, lambda: engine.now_s)
    for number in range(5000):
        engine.add(f"request {number} " + "x" * 2000)
    records = pipe.receive()
    engine.abort(next(iter(engine.requests)))
    records += pipe.receive()
    first = sender.send(records)
    assert 0 < first < len(records)
    received = list(inbox.receive())
    while first < len(records):
        first += sender.send(records[first:])
        received += inbox.receive()
    assert [each.number for each in received if hasattr(each, "request_id")] == list(range(5000))
    inbox.close()


def test_an_engine_whose_replica_does_not_listen_or_is_gone_goes_on() -> None:
    inbox = StepInbox()
    sender = StepSender(inbox.path)
    list(inbox.receive())
    inbox.close()
    for target in (sender, StepSender(None), StepSender(inbox.path)):
        log = StepLog(target)
        log.joined("a")
        log.scheduled({"a": 4}, {"a": Request(4, 4)}, 0.0)
        log.left("a")
        log.completed(busy=False)
        assert log._unsent == []
