"""Reading what is exported for Prometheus, and what the dashboard and the rules ask for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[1]
RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "cluster.json"
Labels = tuple[tuple[str, str], ...]
Samples = dict[tuple[str, Labels], float]


def parse(text: str) -> Samples:
    """Return the samples of the cluster by name and sorted labels."""
    families = text_string_to_metric_families(text)
    samples = [sample for family in families for sample in family.samples if sample.name.startswith("cluster_")]
    found = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}
    assert len(found) == len(samples), "no series is told twice"
    return found


def scrape(port: int) -> Samples:
    """Ask a server of this machine for its metrics."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return parse(answer.read().decode())


def value(samples: Samples, name: str, **labels: str) -> float:
    """Return one sample; 0 for a counter that has none yet."""
    return samples.get((name, tuple(sorted(labels.items()))), 0.0)


def names(samples: Samples) -> set[str]:
    """Return the names of all samples."""
    return {name for name, _ in samples}


def asked_for() -> dict[str, set[str]]:
    """Return the names of the metrics that the rules and the dashboard ask for, by expression."""
    return {expression: set(re.findall(r"\bcluster_\w+", expression)) for expression in _expressions()}


def _expressions() -> Iterator[str]:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]
    yield from _found(json.loads(DASHBOARD.read_text()))


def _found(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        for key, inner in part.items():
            if key in ("expr", "definition"):
                yield inner
            else:
                yield from _found(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _found(inner)
