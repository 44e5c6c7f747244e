"""Why a request is refused at its offer, and when it should come back.

In order: throttled clients, brownout, prompts no replica can hold, then, for a request
that would have to wait: heavy Sheddable ones that do not fit the KV cache, full queues, a
tenant's share of the queue, and predicted misses of the TTFT target.
"""

from __future__ import annotations

from serve_app.core.admission import SHEDDABLE, STANDARD, advice_s
from serve_app.core.entry import Entry
from serve_app.core.pool import Pool
from serve_app.core.types import Reject, RejectReason

QUEUE_SHARE = 4
HEAVY_KV_RATIO = 0.1
UNLOADED_FACTOR = 2.0


def refusal_at_offer(pool: Pool, entry: Entry, now_s: float) -> RejectReason | None:
    """Return why not to consider a request at all, whatever room there is."""
    ticket, rank = entry.ticket, entry.rank
    if pool.policy.client_throttle and pool.throttle.refuses(
        ticket.key, rank, ticket.request_id, now_s
    ):
        return RejectReason.CLIENT_THROTTLED
    if sheds(pool, rank):
        return RejectReason.SHED
    if entry.deadline_s <= now_s:
        return RejectReason.QUEUE_TIMEOUT
    if pool.load.live and ticket.prompt_tokens >= pool.load.largest_kv_tokens:
        return RejectReason.KV_BUDGET
    return None


def refusal_to_wait(pool: Pool, entry: Entry, now_s: float) -> RejectReason | None:
    """Return why a request that found no room must not wait for it either."""
    rank, policy = entry.rank, pool.policy
    queue, capacity = pool.queues[rank], pool.capacities[rank]
    waiting = len(queue)
    if waiting >= capacity:
        return RejectReason.QUEUE_FULL
    if policy.ordering == "fair":
        mine = queue.waiting_of(entry.flow)
        if mine and mine >= QUEUE_SHARE * (capacity - waiting):
            return RejectReason.TENANT_CONCURRENCY
        if rank == SHEDDABLE and _is_heavy(pool, entry) and not pool.load.fits_somewhere(entry):
            return RejectReason.KV_BUDGET
    if policy.early_rejection and waiting and pool.empty_since_s is None:
        entry.predicted_ttft_s = predicted_s = predict_ttft_s(pool, entry, now_s)
        if predicted_s is not None and predicted_s > _target_s(pool, entry):
            return RejectReason.TTFT_UNREACHABLE
    return None


def sheds(pool: Pool, rank: int) -> bool:
    """Whether the brownout ladder refuses a class now; "arrival" pools have no classes."""
    if pool.policy.ordering == "arrival":
        return False
    if rank == SHEDDABLE:
        return pool.ladder.sheds_sheddable
    return rank == STANDARD and pool.ladder.sheds_standard


def predict_wait_s(pool: Pool, entry: Entry, now_s: float) -> float | None:
    """Return the wait of a request offered now, or None before any wait was measured.

    What its class's fair queue serves before it, over the rate at which the class has been
    served while it waited, which already reflects more important classes.
    """
    rate = pool.rates[entry.rank].per_s(now_s)
    if rate is None:
        return None
    return pool.queues[entry.rank].wait_s(entry.flow, entry.ticket.weight, rate, now_s)


def predict_ttft_s(pool: Pool, entry: Entry, now_s: float) -> float | None:
    """Return the expected offer-to-first-token time of a request that has to wait.

    None while either predictor has not seen enough to be believed.
    """
    wait_s = predict_wait_s(pool, entry, now_s)
    if wait_s is None or not pool.ttft.trusted:
        return None
    live = pool.load.live
    count = max(1, len(live))
    prefill_tokens = sum([each.own_uncached_prompt_tokens for each in live]) / count
    in_flight = sum([each.own + each.others for each in live]) / count
    return wait_s + pool.ttft.predict_s(prefill_tokens + entry.ticket.prompt_tokens, in_flight)


def retry_after_s(pool: Pool, entry: Entry, reason: RejectReason, now_s: float) -> float | None:
    """Return when the client should come back; None if that cannot help.

    From the predicted time until the class's queue has drained, within the pool's bounds
    and spread by a hash of the request id.
    """
    policy = pool.policy
    if (
        reason is RejectReason.KV_BUDGET
        and entry.ticket.prompt_tokens >= pool.load.largest_kv_tokens
    ):
        return None
    rate = pool.rates[entry.rank].per_s(now_s)
    wait_s = pool.queues[entry.rank].backlog / rate if rate else 0.0
    if reason is RejectReason.TTFT_UNREACHABLE and entry.predicted_ttft_s is not None:
        wait_s = entry.predicted_ttft_s - _target_s(pool, entry)
    elif reason is RejectReason.SHED:
        wait_s = max(wait_s, policy.brownout.stable_s)
    elif reason is RejectReason.NO_REPLICA:
        wait_s = max(wait_s, policy.hold_without_replica_s)
    elif reason is RejectReason.CLIENT_THROTTLED:
        wait_s = pool.throttle.remaining_s(entry.ticket.key, entry.rank, now_s)
    return advice_s(wait_s, entry.ticket.request_id, policy)


def refuse(pool: Pool, entry: Entry, reason: RejectReason, now_s: float) -> Reject:
    """Return the refusal of a request and hold its client to the advice in it.

    A client that has a part of its answer gets no advice: it is too late for a header.
    """
    retry_s = retry_after_s(pool, entry, reason, now_s)
    ticket = entry.ticket
    heeds = not entry.tokens and reason is not RejectReason.CLIENT_THROTTLED
    if retry_s is not None and heeds:
        pool.throttle.refused(ticket.key, entry.rank, retry_s, now_s)
    detail = ""
    if reason is RejectReason.KV_BUDGET and retry_s is None:
        detail = (
            f"about {ticket.prompt_tokens} tokens, where an engine holds "
            f"{pool.load.largest_kv_tokens}"
        )
    return Reject(ticket.request_id, reason, retry_s, detail)


def _target_s(pool: Pool, entry: Entry) -> float:
    """Return the TTFT to judge a request by: its class's, or twice its own unloaded TTFT.

    A prompt too long for the target on an idle replica is not refused for its length.
    """
    unloaded_s = pool.ttft.predict_s(entry.ticket.prompt_tokens, 0.0)
    return max(pool.policy.classes[entry.rank].ttft_slo_s, UNLOADED_FACTOR * unloaded_s)


def _is_heavy(pool: Pool, entry: Entry) -> bool:
    return bool(pool.load.live) and entry.need_tokens >= HEAVY_KV_RATIO * (
        pool.load.largest_kv_tokens
    )
