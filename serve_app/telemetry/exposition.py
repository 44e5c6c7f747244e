"""Prometheus text (format 0.0.4) in two halves: each process renders, Control concatenates.

A process renders its registry into families, every sample already carrying the labels
that say which process it is. Merging joins families of the same name byte by byte and
parses nothing, so that Control's cost does not grow with what an engine exports.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TYPES = {
    "counter": "counter",
    "gauge": "gauge",
    "histogram": "histogram",
    "summary": "summary",
    "gaugehistogram": "histogram",
    "info": "gauge",
    "stateset": "gauge",
}
_NAME_SUFFIXES = {"counter": "_total", "info": "_info"}
_ILLEGAL_IN_METRIC = re.compile(r"[^a-zA-Z0-9_:]")
_ILLEGAL_IN_LABEL = re.compile(r"[^a-zA-Z0-9_]")


@dataclass(frozen=True, slots=True)
class Family:
    """One metric family of one process: its HELP and TYPE lines, and its samples' lines."""

    name: str
    header: bytes
    samples: bytes


def render_families(registry: CollectorRegistry, labels: Mapping[str, str]) -> dict[str, Family]:
    """Return a registry's families by name, ``labels`` added to every sample.

    A sample that has a label of one of these names keeps it as ``exported_<name>``, as
    Prometheus does with the labels of a target: what is added says which process speaks
    and must stay unique. Creation times are left out.
    """
    added = {_legal_label(name): value for name, value in labels.items()}
    rendered_labels = [_label(name, value) for name, value in sorted(added.items())]
    families: dict[str, Family] = {}
    for metric in registry.collect():
        for name, kind, samples in _split(metric):
            lines = [_sample(sample, rendered_labels, added.keys()) for sample in samples]
            families[name] = Family(
                name=name,
                header=_header(name, kind, metric.documentation),
                samples="".join(lines).encode(),
            )
    return families


def merge(processes: Iterable[Mapping[str, Family]]) -> bytes:
    """Return the exposition of several processes' families, sorted by family name.

    The header of a family is the first process's that has it.
    """
    parts: dict[str, list[bytes]] = {}
    for families in processes:
        for name, family in families.items():
            found = parts.get(name)
            if found is None:
                parts[name] = [family.header, family.samples]
            else:
                found.append(family.samples)
    return b"".join(part for name in sorted(parts) for part in parts[name])


def _split(metric: Metric) -> list[tuple[str, str, list[Sample]]]:
    """Return (family name, type, samples) of what a metric is in the text format.

    A gauge histogram's sum and count are gauges of their own there.
    """
    kind = _TYPES.get(metric.type, "untyped")
    base = _ILLEGAL_IN_METRIC.sub("_", metric.name)
    apart = {metric.name + suffix: base + suffix for suffix in ("_gsum", "_gcount")}
    own: list[Sample] = []
    gauges: dict[str, list[Sample]] = {}
    for sample in metric.samples:
        if sample.name in apart:
            gauges.setdefault(apart[sample.name], []).append(sample)
        elif sample.name != metric.name + "_created":
            own.append(sample)
    families = [(base + _NAME_SUFFIXES.get(metric.type, ""), kind, own)]
    families += [(name, "gauge", samples) for name, samples in gauges.items()]
    return families


def _header(name: str, kind: str, documentation: str) -> bytes:
    text = documentation.replace("\\", r"\\").replace("\n", r"\n")
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n".encode()


def _sample(sample: Sample, added: list[str], taken: Iterable[str]) -> str:
    labels = list(added)
    for label, value in sample.labels.items():
        name = _legal_label(label)
        labels.append(_label(f"exported_{name}" if name in taken else name, value))
    block = "{" + ",".join(labels) + "}" if labels else ""
    name = _ILLEGAL_IN_METRIC.sub("_", sample.name)
    stamp = "" if sample.timestamp is None else f" {int(float(sample.timestamp) * 1000)}"
    number = floatToGoString(sample.value)  # type: ignore[no-untyped-call]  # untyped there
    return f"{name}{block} {number}{stamp}\n"


def _legal_label(name: str) -> str:
    return _ILLEGAL_IN_LABEL.sub("_", name)


def _label(name: str, value: str) -> str:
    escaped = value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return f'{name}="{escaped}"'
