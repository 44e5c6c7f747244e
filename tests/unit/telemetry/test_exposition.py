"""Rendered and merged families read back by Prometheus' own parser."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Summary
from prometheus_client.metrics_core import GaugeHistogramMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from serve_app.telemetry.exposition import merge, render_families

Labels = dict[str, str]


def parsed(text: bytes) -> dict[str, Metric]:
    families = list(text_string_to_metric_families(text.decode()))
    names = [family.name for family in families]
    assert len(names) == len(set(names)), "a family stands in two places"
    return {family.name: family for family in families}


def values(metric: Metric) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for s in metric.samples}


class Fixed:
    """A collector of given metrics, as vLLM's and others' are."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def registry_of(*metrics: Metric) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(Fixed(metrics))  # type: ignore[arg-type]  # a collector by shape
    return registry


def test_a_histogram_survives_with_its_buckets_sum_and_count() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("wait_seconds", "Wait.", ["pool"], buckets=(0.1, 1.0), registry=registry)
    for wait_s in (0.05, 0.5, 5.0):
        histogram.labels("a").observe(wait_s)

    family = parsed(merge([render_families(registry, {"replica": "r1"})]))["wait_seconds"]

    assert family.type == "histogram"
    assert family.documentation == "Wait."
    own = (("pool", "a"), ("replica", "r1"))
    assert values(family) == {
        ("wait_seconds_bucket", (("le", "0.1"), *own)): 1.0,
        ("wait_seconds_bucket", (("le", "1.0"), *own)): 2.0,
        ("wait_seconds_bucket", (("le", "+Inf"), *own)): 3.0,
        ("wait_seconds_count", own): 3.0,
        ("wait_seconds_sum", own): 5.55,
    }


def test_creation_times_are_left_out() -> None:
    registry = CollectorRegistry()
    Counter("sent", "Sent.", registry=registry).inc()
    Histogram("wait_seconds", "Wait.", registry=registry)
    Summary("size_bytes", "Size.", registry=registry).observe(3)

    text = merge([render_families(registry, {})])

    assert b"_created" not in text
    assert values(parsed(text)["sent"]) == {("sent_total", ()): 1.0}
    assert values(parsed(text)["size_bytes"]) == {
        ("size_bytes_count", ()): 1.0,
        ("size_bytes_sum", ()): 3.0,
    }


def test_a_metric_that_ends_in_created_by_its_own_name_stays() -> None:
    registry = registry_of(GaugeMetricFamily("files_created", "Files.", value=4))

    assert values(parsed(merge([render_families(registry, {})]))["files_created"]) == {
        ("files_created", ()): 4.0
    }


def test_processes_merge_into_one_family_each() -> None:
    def process(name: str, value: int) -> CollectorRegistry:
        registry = CollectorRegistry()
        Gauge("depth", "Depth.", registry=registry).set(value)
        Counter("only_in_" + name, "Own.", registry=registry).inc(value)
        return registry

    families = [
        render_families(process(name, value), {"process": name})
        for name, value in (("b", 2), ("a", 1))
    ]
    text = merge(families)

    assert text.count(b"# TYPE depth gauge") == 1
    assert values(parsed(text)["depth"]) == {
        ("depth", (("process", "a"),)): 1.0,
        ("depth", (("process", "b"),)): 2.0,
    }
    assert {"only_in_a", "only_in_b"} <= set(parsed(text))


def test_nothing_merges_to_nothing() -> None:
    assert merge([]) == b""
    assert merge([render_families(CollectorRegistry(), {"process": "a"})]) == b""


def test_a_family_without_samples_keeps_its_header() -> None:
    registry = CollectorRegistry()
    Counter("sent", "Sent.", ["pool"], registry=registry)

    assert merge([render_families(registry, {"process": "a"})]) == (
        b"# HELP sent_total Sent.\n# TYPE sent_total counter\n"
    )


def test_vllms_names_keep_their_colons() -> None:
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_running", "Running.", ["engine"], registry=registry).labels("0").set(7)

    text = merge([render_families(registry, {"pool": "p"})])

    assert values(parsed(text)["vllm:num_requests_running"]) == {
        ("vllm:num_requests_running", (("engine", "0"), ("pool", "p"))): 7.0
    }


def test_a_samples_own_label_of_the_same_name_is_kept_as_exported() -> None:
    registry = CollectorRegistry()
    gauge = Gauge("load", "Load.", ["pool"], registry=registry)
    gauge.labels("x").set(1)
    gauge.labels("y").set(2)

    text = merge([render_families(registry, {"pool": "p", "replica": "r"})])

    assert values(parsed(text)["load"]) == {
        ("load", (("exported_pool", "x"), ("pool", "p"), ("replica", "r"))): 1.0,
        ("load", (("exported_pool", "y"), ("pool", "p"), ("replica", "r"))): 2.0,
    }


def test_info_and_gauge_histogram_become_what_the_text_format_knows() -> None:
    registry = CollectorRegistry()
    Info("engine", "Engine.", registry=registry).info({"version": "1"})
    ages = GaugeHistogramMetricFamily(
        "age", "Age.", buckets=[("1.0", 2), ("+Inf", 3)], gsum_value=4.5
    )
    registry.register(Fixed([ages]))  # type: ignore[arg-type]  # a collector by shape

    families = parsed(merge([render_families(registry, {})]))

    assert families["engine_info"].type == "gauge"
    assert values(families["engine_info"]) == {("engine_info", (("version", "1"),)): 1.0}
    assert families["age"].type == "histogram"
    assert values(families["age_gcount"]) == {("age_gcount", ()): 3.0}
    assert values(families["age_gsum"]) == {("age_gsum", ()): 4.5}


def test_help_texts_of_several_lines_stay_one_line() -> None:
    registry = registry_of(GaugeMetricFamily("depth", "one\ntwo \\ three", value=1))

    family = parsed(merge([render_families(registry, {})]))["depth"]

    assert family.documentation == "one\ntwo \\ three"


def test_special_values_are_written_as_prometheus_reads_them() -> None:
    registry = CollectorRegistry()
    gauge = Gauge("ratio", "Ratio.", ["kind"], registry=registry)
    gauge.labels("inf").set(float("inf"))
    gauge.labels("nan").set(float("nan"))

    samples = {
        s.labels["kind"]: s.value
        for s in parsed(merge([render_families(registry, {})]))["ratio"].samples
    }

    assert samples["inf"] == float("inf")
    assert samples["nan"] != samples["nan"]


# The parser's own line splitting stops at these; Prometheus' does not produce them.
LABEL_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"])) | st.sampled_from(
    ['"', "\\", "\n", '\\"', "\\n", "a\nb", '{x="y"}', ",", "# HELP"]
)


@given(own=LABEL_TEXT, added=LABEL_TEXT)
def test_any_label_value_survives_the_round_trip(own: str, added: str) -> None:
    registry = CollectorRegistry()
    Gauge("depth", "Depth.", ["pool"], registry=registry).labels(own).set(1)

    [sample] = parsed(merge([render_families(registry, {"replica": added})]))["depth"].samples

    assert sample.labels == {"pool": own, "replica": added}
    assert sample.value == 1.0
