"""What a process says of its requests: metrics and one log line each.

Observers own a process's registries and turn domain events into samples; nothing else
touches a metric.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version

from prometheus_client import CollectorRegistry

from serve_app import __version__
from serve_app.audit import Audit, since, token_interval_s
from serve_app.core.limits import Refused
from serve_app.core.types import Notice, Outcome, PoolName, PriorityClass
from serve_app.gate import Gate
from serve_app.telemetry.exposition import Family, render_families
from serve_app.telemetry.logs import RequestLine, RequestLog
from serve_app.telemetry.metrics import NO_POOL, ProcessMetrics, RouterMetrics, class_label
from serve_app.telemetry.policy_metrics import TENANTS_SHOWN, TenantFigures

logger = logging.getLogger("headrace.router")


class RouterObserver:
    """A router's metrics and request log."""

    def __init__(self, process: str, log: RequestLog, wall_clock: Callable[[], float]) -> None:
        self._process = process
        self._log = log
        self._wall_clock = wall_clock
        self.metrics = metrics = RouterMetrics(CollectorRegistry())
        # What every request counts in: finding a metric's child costs more than counting.
        self._requests = cache(metrics.requests_total.labels)
        self._responses = cache(metrics.responses_total.labels)
        self._tokens = cache(metrics.tokens_total.labels)
        self._queue_wait = cache(metrics.queue_wait_seconds.labels)
        self._first_token = cache(metrics.time_to_first_token_seconds.labels)
        self._output_token = cache(metrics.time_per_output_token_seconds.labels)
        self._duration = cache(metrics.request_duration_seconds.labels)
        describe_build(self.metrics, "router")

    def audit(self, audit: Audit) -> None:
        """Count a request that ended and write its log line."""
        metrics, delivery = self.metrics, audit.delivery
        pool, class_ = audit.pool or NO_POOL, class_label(audit.served_class)
        outcome = audit.outcome.value if audit.outcome else "rejected"
        self._requests(pool, class_, outcome).inc()
        self._responses(audit.endpoint, str(audit.status)).inc()
        if audit.outcome is None:
            metrics.rejected_total.labels(pool, class_, audit.reason or "unknown").inc()
        if audit.outcome is Outcome.CANCELLED:
            metrics.client_disconnects_total.labels(pool).inc()
        retries = delivery.attempts - 1 - delivery.continuations
        if retries > 0:
            metrics.retries_total.labels(pool).inc(retries)
        if delivery.continued:
            metrics.continuations_total.labels(pool, "continued").inc(delivery.continued)
        if delivery.not_continued is not None:
            metrics.continuations_total.labels(pool, delivery.not_continued.value).inc()
        if audit.outcome is Outcome.FAILED and delivery.first_byte_at_s is not None:
            metrics.stream_errors_total.labels(pool).inc()
        if audit.degraded is not None:
            metrics.policies.degraded_total.labels(pool, class_, audit.degraded).inc()
        self._count_tokens(audit, pool)
        self._time(audit, pool, class_)
        self._log.write(request_line(audit, self._wall_clock()))

    def notice(self, notice: Notice) -> None:
        """Count and log what the core wants an operator to see."""
        self.metrics.notices_total.labels(notice.pool, notice.kind).inc()
        where = {"pool": notice.pool, "replica": notice.replica}
        logger.info(notice.kind, extra={**where, **notice.detail})

    def rate_limited(self, refused: Refused) -> None:
        """Count a request that its limits refused."""
        counter = self.metrics.policies.rate_limited_total
        counter.labels(refused.scope.value, refused.limit.value).inc()

    def limit_fetched(self, result: str) -> None:
        """Count a request that waited for parts of its limits."""
        self.metrics.policies.limit_fetches_total.labels(result).inc()

    def budget_refused(self, scope: str, reason: str) -> None:
        """Count a request that a budget refused."""
        self.metrics.policies.budget_refused_total.labels(scope, reason).inc()

    def prompt_counted(self, exact: bool) -> None:
        """Count a prompt whose exact length was wanted, and whether it could be had."""
        result = "counted" if exact else "estimated"
        self.metrics.policies.prompts_counted_total.labels(result).inc()

    def pool(self, pool: PoolName, gate: Gate, prompt_error_ratio: float) -> None:
        """Set a pool's gauges from what its core knows."""
        figures = gate.figures(pool)
        if figures is None:
            return
        self.metrics.pool_load(
            pool,
            queued=dict(zip(PriorityClass, figures.waiting, strict=True)),
            in_flight=gate.in_flight(pool),
            replicas=gate.replicas(pool),
            snapshot_age_s=gate.snapshot_age_s(pool),
        )
        tenants = [
            TenantFigures(tenant, debt, gate.output_error_ratio(pool, tenant))
            for tenant, debt in gate.noisiest_tenants(pool, TENANTS_SHOWN)
        ]
        self.metrics.policies.pool(
            pool, figures, prompt_error_ratio=prompt_error_ratio, tenants=tenants
        )

    def families(self) -> Mapping[str, Family]:
        """Render the registry for Control."""
        self._log.flush()
        return render_families(self.metrics.registry, {"process": self._process})

    def _count_tokens(self, audit: Audit, pool: str) -> None:
        delivery = audit.delivery
        if delivery.usage is not None:
            self._tokens(pool, "input").inc(delivery.usage.prompt_tokens)
            self._tokens(pool, "cached_input").inc(delivery.usage.cached_prompt_tokens)
        completed = audit.outcome is Outcome.COMPLETED
        count = delivery.usage.completion_tokens if delivery.usage else delivery.output_tokens
        if count:
            self._tokens(pool, "output" if completed else "wasted").inc(count)

    def _time(self, audit: Audit, pool: str, class_: str) -> None:
        delivery = audit.delivery
        if audit.queued_s is not None:
            self._queue_wait(pool, class_).observe(audit.queued_s)
        ttft_s = since(audit.arrived_at_s, delivery.first_byte_at_s)
        if ttft_s is not None and delivery.streamed:
            self._first_token(pool, class_).observe(ttft_s)
        duration_s = since(audit.arrived_at_s, audit.ended_at_s)
        if audit.outcome is Outcome.COMPLETED and duration_s is not None:
            self._duration(pool, class_).observe(duration_s)
            interval_s = token_interval_s(delivery)
            if interval_s is not None:
                self._output_token(pool, class_).observe(interval_s)


def request_line(audit: Audit, ended_wall_s: float) -> RequestLine:
    """Return a request's log line: who, what, decided how, ended how; never content."""
    delivery, key, usage = audit.delivery, audit.key, audit.delivery.usage
    return RequestLine(
        ended_at_s=ended_wall_s,
        request_id=audit.request_id,
        endpoint=audit.endpoint,
        status=audit.status,
        decision=audit.decision,
        outcome=audit.outcome.value if audit.outcome else "rejected",
        reason=audit.reason,
        client_request_id=audit.client_label,
        tenant=key.tenant if key else None,
        user=key.user if key else None,
        key_id=key.key_id if key else None,
        model=audit.model,
        pool=audit.pool,
        replica=audit.replica,
        class_asked=class_label(audit.asked_class) or None,
        class_served=class_label(audit.served_class) or None,
        degraded=audit.degraded,
        attempts=delivery.attempts or None,
        continuations=delivery.continuations or None,
        not_continued=delivery.not_continued,
        finish_reason=delivery.finish_reason,
        input_tokens=usage.prompt_tokens if usage else None,
        cached_input_tokens=usage.cached_prompt_tokens if usage else None,
        output_tokens=usage.completion_tokens if usage else delivery.output_tokens,
        queue_wait_s=audit.queued_s,
        time_to_first_token_s=since(audit.arrived_at_s, delivery.first_byte_at_s),
        time_per_output_token_s=token_interval_s(delivery),
        duration_s=since(audit.arrived_at_s, audit.ended_at_s),
    )


def describe_build(metrics: ProcessMetrics, role: str) -> None:
    """Set the build information of a process."""
    metrics.build_info.labels(__version__, version("ray"), role).set(1)
