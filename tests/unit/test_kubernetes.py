"""The manifests and the chart: valid for Kubernetes, in line with each other, and all that they name is in the code."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import flower.options  # noqa: F401 - it defines what Flower can be told
import kubernetes_validate
import pytest
import tornado.options
import yaml
from celery.bin.worker import worker

from cluster_tasks.cli.cluster import cluster
from cluster_tasks.cli.main import main
from cluster_tasks.cli.ping import BEYOND_LEASE_S, ping
from cluster_tasks.metrics.families import SPECS
from cluster_tasks.settings import CONF_PREFIX, ENV_PREFIX, ClusterSettings, load_settings
from tests.servers import missing
from tests.unit.test_deployment import PROJECT, configuration
from workers.drain import EXIT_GRACE_S

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "deploy" / "kubernetes"
CHART = ROOT / "deploy" / "helm" / "cluster-tasks"
VERSIONS = ("1.25", "1.30", "1.37")
START_S = 10
"""What Python may take to start in a small pod."""
RENDERED_WITH = ("--set", "flower.basicAuth=me:secret", "--set", "keda.enabled=true", "--set", "workers.replicas=2")
Document = Mapping[str, Any]


def plain() -> list[Document]:
    """Everything in deploy/kubernetes."""
    return [each for file in sorted(MANIFESTS.rglob("*.yaml")) for each in yaml.safe_load_all(file.read_text())]


def rendered(*options: str) -> list[Document]:
    """What helm makes of the chart. Debian has no helm, so where there is none the test is skipped in CI, too."""
    if (helm := shutil.which("helm")) is None:
        pytest.skip("helm is not installed")
    told = subprocess.run(
        [helm, "template", "cluster-tasks", CHART, *options], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    return [each for each in yaml.safe_load_all(told.stdout) if each]


@pytest.fixture(scope="module", params=["manifests", "chart"])
def documents(request: pytest.FixtureRequest) -> list[Document]:
    """The manifests, and the chart as it comes."""
    return plain() if request.param == "manifests" else rendered(*RENDERED_WITH)


def of_kind(documents: Sequence[Document], *kinds: str) -> list[Document]:
    return [each for each in documents if each["kind"] in kinds]


def pods(documents: Sequence[Document]) -> dict[str, Document]:
    """The templates of pods, by component."""
    found = [each["spec"]["template"] for each in of_kind(documents, "Deployment", "StatefulSet")]
    return {pod["metadata"]["labels"]["app.kubernetes.io/component"]: pod for pod in found}


def container(documents: Sequence[Document], component: str) -> Document:
    (only,) = pods(documents)[component]["spec"]["containers"]
    return dict(only)


def commands(part: Any) -> Iterator[list[str]]:
    """All that is run, wherever it stands."""
    if isinstance(part, Mapping):
        if isinstance(part.get("command"), list):
            yield [*part["command"], *part.get("args", [])]
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from commands(inner)


def environment(documents: Sequence[Document]) -> dict[str, str]:
    """Every variable with its value; those of Secrets have none."""
    given = {name: value for each in of_kind(documents, "ConfigMap") for name, value in each["data"].items()}
    for pod in pods(documents).values():
        for each in pod["spec"]["containers"]:
            given |= {variable["name"]: variable.get("value", "") for variable in each.get("env", [])}
    return given


def queries(documents: Sequence[Document]) -> list[str]:
    triggers = [each for scaled in of_kind(documents, "ScaledObject") for each in scaled["spec"]["triggers"]]
    return [trigger["metadata"]["query"] for trigger in triggers]


# Valid


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_document(documents: list[Document], version: str) -> None:
    built_in = [each for each in documents if not each["apiVersion"].startswith("keda.sh/")]
    assert {each["kind"] for each in built_in} >= {
        "ConfigMap", "Deployment", "StatefulSet", "Service", "PodDisruptionBudget",
    }  # fmt: skip
    for each in built_in:
        kubernetes_validate.validate(each, version, strict=True)


def test_the_check_finds_a_field_that_is_misspelt(documents: list[Document]) -> None:
    wrong = {**of_kind(documents, "PodDisruptionBudget")[0], "spec": {"maxUnavailabel": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="maxUnavailabel"):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_what_selects_pods_selects_those_of_its_component(documents: list[Document]) -> None:
    labels = {component: pod["metadata"]["labels"] for component, pod in pods(documents).items()}
    assert labels.keys() == {"worker", "coordinator", "flower", "redis"}
    selecting = of_kind(documents, "Deployment", "StatefulSet", "Service", "PodDisruptionBudget")
    for each in selecting:
        selector = each["spec"]["selector"]
        wanted = selector.get("matchLabels", selector)
        found = [component for component, own in labels.items() if wanted.items() <= own.items()]
        assert found == [each["metadata"]["labels"]["app.kubernetes.io/component"]], each["metadata"]["name"]
    budgets = of_kind(documents, "PodDisruptionBudget")
    assert {each["metadata"]["labels"]["app.kubernetes.io/component"] for each in budgets} == {"worker", "coordinator"}


def test_ports_that_are_named_are_opened(documents: list[Document]) -> None:
    for each in of_kind(documents, "Service"):
        opened = container(documents, each["spec"]["selector"]["app.kubernetes.io/component"])["ports"]
        assert {port["targetPort"] for port in each["spec"]["ports"]} <= {port["name"] for port in opened}
    for component in pods(documents):
        own = container(documents, component)
        probes = [own[name] for name in own if name.endswith("Probe")]
        asked = {probe[way]["port"] for probe in probes for way in ("httpGet", "tcpSocket") if way in probe}
        assert asked <= {port["name"] for port in own.get("ports", [])}


def test_every_pod_runs_with_few_rights_and_without_variables_that_are_taken_for_settings(
    documents: list[Document],
) -> None:
    for pod in pods(documents).values():
        assert pod["spec"]["enableServiceLinks"] is False, "a Service named cluster would set CLUSTER_PORT"
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        for each in pod["spec"]["containers"]:
            assert each["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert each["resources"]["limits"]["memory"]
    (user,) = re.findall(r"--uid (\d+)", (ROOT / "Dockerfile").read_text())
    own = [pods(documents)[component]["spec"]["securityContext"] for component in ("worker", "coordinator", "flower")]
    assert {each["runAsUser"] for each in own} == {int(user)}


# In line with the code


COMMANDS: dict[tuple[str, ...], click.Command] = {
    ("celery", "worker"): worker,
    ("celery", "cluster", "coordinator"): cluster.commands["coordinator"],
    ("celery", "cluster", "drain"): cluster.commands["drain"],
    ("cluster-tasks", "ping"): ping,
}


def test_every_command_exists_with_its_options(documents: list[Document]) -> None:
    assert "ping" in main.commands
    seen = set()
    for words in commands(documents):
        program, *rest = words
        if program == "celery":
            assert rest[:2] == ["-A", "cluster_tasks"]
            rest = rest[2:]
        given = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        if program == "celery" and rest[0] == "flower":
            assert {option.removeprefix("--") for option in given} <= tornado.options.options.as_dict().keys()
        elif program in ("celery", "cluster-tasks"):
            name = next(each for each in COMMANDS if [program, *rest][: len(each)] == list(each))
            assert given <= {option for parameter in COMMANDS[name].params for option in parameter.opts}, words
            seen.add(name)
        else:
            assert program in ("redis-server", "sh")
    assert seen == COMMANDS.keys()


def test_every_variable_is_a_setting_and_its_value_is_taken(
    documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = environment(documents)
    own = {name: value for name, value in given.items() if name.startswith(ENV_PREFIX)}
    assert {name.removeprefix(ENV_PREFIX).lower() for name in own} <= ClusterSettings.model_fields.keys()
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    settings = load_settings({}, own)
    assert settings.metrics_host == "0.0.0.0", "the Service leads to it from other pods"
    others = given.keys() - own.keys()
    assert {name.removeprefix("FLOWER_").lower() for name in others} <= tornado.options.options.as_dict().keys()
    (redis,) = [each for each in of_kind(documents, "Service") if each["spec"]["ports"][0]["name"] == "redis"]
    host = settings.broker_url.get_secret_value().removeprefix("redis://").partition("/")[0]
    assert host == f"{redis['metadata']['name']}:{redis['spec']['ports'][0]['port']}"


def test_coordinators_serve_their_metrics_where_they_are_asked_for(documents: list[Document]) -> None:
    own, port = container(documents, "coordinator"), int(environment(documents)["CLUSTER_METRICS_PORT"])
    assert [each["containerPort"] for each in own["ports"]] == [port]
    annotations = pods(documents)["coordinator"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port)


def test_flower_asks_for_a_password_that_only_a_secret_knows(documents: list[Document]) -> None:
    (password,) = container(documents, "flower")["env"]
    assert password["name"] == "FLOWER_BASIC_AUTH"
    secret = password["valueFrom"]["secretKeyRef"]
    assert not secret.get("optional")
    for each in of_kind(documents, "Secret"):
        assert secret["key"] in each["stringData"]
        assert secret["name"] == each["metadata"]["name"]


# How pods are probed, and go


@pytest.mark.parametrize("component", ["worker", "coordinator"])
def test_a_pod_is_probed_by_the_name_of_its_node(documents: list[Document], component: str) -> None:
    own = container(documents, component)
    asked = {name: own[name]["exec"]["command"] for name in own if name.endswith("Probe") and "exec" in own[name]}
    name = own["command"][own["command"].index("-n") + 1]
    assert name == f"{component}@%h"
    for words in asked.values():
        assert words[:4] == ["cluster-tasks", "ping", "--node", name]
    assert {probe for probe, words in asked.items() if "--alive" in words} == {"livenessProbe"}, (
        "while Redis is away, or a node drains, nobody restarts it"
    )
    assert "startupProbe" in asked
    lease_s = load_settings(configuration(), {}).lease_s
    for probe in asked:
        assert own[probe]["timeoutSeconds"] > lease_s + BEYOND_LEASE_S + START_S
        assert own[probe]["periodSeconds"] * own[probe]["failureThreshold"] >= 60


def test_a_node_drains_before_it_ends_and_has_the_time_to(documents: list[Document]) -> None:
    pod, own = pods(documents)["worker"]["spec"], container(documents, "worker")
    *words, drain_s = own["lifecycle"]["preStop"]["exec"]["command"]
    assert words[3:] == ["cluster", "drain", own["command"][own["command"].index("-n") + 1], "--timeout"]
    own_drain_s = load_settings(configuration(), {}).drain_timeout_s
    assert pod["terminationGracePeriodSeconds"] >= int(drain_s) + own_drain_s + EXIT_GRACE_S + START_S


def test_redis_keeps_the_jobs_over_a_restart_and_throws_none_away(documents: list[Document]) -> None:
    (stateful,) = of_kind(documents, "StatefulSet")
    own = container(documents, "redis")
    words = [*own["command"], *own["args"]]
    told = dict(zip(words[1::2], words[2::2], strict=True))
    assert told == {
        "--dir": own["volumeMounts"][0]["mountPath"], "--appendonly": "yes", "--appendfsync": "everysec",
        "--maxmemory-policy": "noeviction",
    }  # fmt: skip
    (claim,) = stateful["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == own["volumeMounts"][0]["name"]


# By load


def test_keda_scales_the_workers_by_metrics_that_are_exported(documents: list[Document]) -> None:
    (scaled,) = of_kind(documents, "ScaledObject")
    workers = [each["metadata"]["name"] for each in of_kind(documents, "Deployment") if "worker" in str(each["spec"])]
    assert scaled["spec"]["scaleTargetRef"] == {"name": scaled["metadata"]["name"]}
    assert scaled["metadata"]["name"] in workers
    assert 1 <= scaled["spec"]["minReplicaCount"] < scaled["spec"]["maxReplicaCount"]
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["metadata"]["ignoreNullValues"] == "false", "without an answer nobody is told that nothing waits"
    (query,) = queries(documents)
    labels = {spec.name: set(spec.labels) for spec in SPECS}
    asked = set(re.findall(r"\bcluster_\w+", query))
    assert asked <= labels.keys()
    assert {"cluster_node_queued_jobs", "cluster_waiting_jobs", "cluster_node_held_jobs"} <= asked
    for by, name in re.findall(r"max by \(([\w, ]+)\) \((cluster_\w+)", query):
        assert set(by.split(", ")) == labels[name], "a label that is left out would hide jobs"


def told_by_two_coordinators(lines: Sequence[str]) -> Iterator[dict[str, str]]:
    for instance in "12":
        for line in lines:
            series, value = line.rsplit(" ", 1)
            yield {"series": series.replace("{", f'{{instance="{instance}",'), "values": f"{value}x10"}


def test_prometheus_tells_keda_how_many_nodes_the_load_is_worth(documents: list[Document], tmp_path: Path) -> None:
    if (promtool := shutil.which("promtool")) is None:
        missing("promtool is not installed: Debian has it in the package prometheus")
    (query,) = queries(documents)
    up, away = ["cluster_up{} 1"], ["cluster_up{} 0"]
    waits = ['cluster_waiting_jobs{type="llm"} 3', 'cluster_waiting_jobs{type="embedding"} 2']
    nodes = [
        'cluster_node_slots{node="a"} 4', 'cluster_node_queued_jobs{node="a"} 15',
        'cluster_node_held_jobs{node="a",type="llm"} 3', 'cluster_node_held_jobs{node="a",type="embedding"} 1',
        'cluster_node_slots{node="b"} 2', 'cluster_node_queued_jobs{node="b"} 0',
        'cluster_node_held_jobs{node="b",type="llm"} 2',
    ]  # fmt: skip
    cases = [
        (up + waits + nodes, [1.5 + 0.5 + 2]),
        (up + waits, [0.5]),
        (up, [0]),
        (away + waits + nodes, []),
        ([], []),
    ]
    tests = [
        {
            "interval": "15s",
            "input_series": list(told_by_two_coordinators(given)),
            "promql_expr_test": [
                {
                    "expr": query,
                    "eval_time": "1m",
                    "exp_samples": [{"labels": "{}", "value": value} for value in expected],
                }
            ],
        }
        for given, expected in cases
    ]
    file = tmp_path / "keda.yml"
    file.write_text(yaml.safe_dump({"evaluation_interval": "15s", "tests": tests}))
    done = subprocess.run([promtool, "test", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# The chart


def values() -> dict[str, Any]:
    found = yaml.safe_load((CHART / "values.yaml").read_text())
    assert isinstance(found, dict)
    return found


def leaves(part: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all values; what Kubernetes gets as it stands is one."""
    if isinstance(part, dict) and part and path[-1:] not in [("resources",), ("env",)]:
        for name, inner in part.items():
            yield from leaves(inner, (*path, name))
    else:
        yield path


def used_values() -> set[tuple[str, ...]]:
    templates = "".join(file.read_text() for file in sorted((CHART / "templates").iterdir()))
    return {tuple(path.split(".")) for path in re.findall(r"\.Values\.([\w.]+)", templates)}


def test_every_value_that_a_template_uses_is_defined_and_every_one_that_is_defined_is_used() -> None:
    defined, used = set(leaves(values())), used_values()
    assert {path if path[0] != "env" else path[:1] for path in used} == defined


def test_a_chart_says_what_it_is() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["apiVersion"], chart["name"], chart["type"]) == ("v2", CHART.name, "application")
    assert chart["appVersion"] == PROJECT["version"]
    oldest = re.match(r">=(\d+\.\d+)", chart["kubeVersion"])
    assert oldest
    assert oldest[1] == VERSIONS[0], "that is the oldest that documents are checked for"


def test_the_values_of_the_chart_say_what_the_manifests_do() -> None:
    given, documents = values(), plain()
    for component in ("worker", "coordinator", "flower", "redis"):
        own = container(documents, component)
        assert given["workers" if component == "worker" else component]["resources"] == own["resources"]
    (scaled,) = of_kind(documents, "ScaledObject")
    assert (given["keda"]["min"], given["keda"]["max"]) == (
        scaled["spec"]["minReplicaCount"], scaled["spec"]["maxReplicaCount"],
    )  # fmt: skip
    assert given["env"].items() <= environment(documents).items()
    assert given["coordinator"]["metricsPort"] == int(environment(documents)["CLUSTER_METRICS_PORT"])
    assert given["workers"]["concurrency"] == int(
        container(documents, "worker")["command"][container(documents, "worker")["command"].index("--concurrency") + 1]
    )
    load_settings({f"{CONF_PREFIX}serves": given["env"]["CLUSTER_SERVES"]}, {})


def test_the_chart_is_the_manifests_where_nothing_is_chosen() -> None:
    """Beside labels, and what only a chart has: a Secret, and sums that restart pods when variables change."""
    own = ("--set", "flower.basicAuth=me:secret", "--set", "keda.enabled=true", "--set", "image.tag=1")
    chart = {(each["kind"], each["metadata"]["name"]): each for each in rendered(*own)}
    manifests = {(each["kind"], each["metadata"]["name"]): each for each in plain()}
    assert chart.keys() - manifests.keys() == {("Secret", "cluster-tasks-flower")}
    assert not manifests.keys() - chart.keys()
    for (kind, _), manifest in manifests.items():
        other = chart[kind, manifest["metadata"]["name"]]
        if kind in ("Deployment", "StatefulSet"):
            ours, theirs = (each["spec"]["template"]["spec"] for each in (manifest, other))
            for field in ("containers", "topologySpreadConstraints"):
                ours.pop(field, None), theirs.pop(field, None)
            assert ours == theirs
        if kind in ("ConfigMap", "ScaledObject"):
            assert {name: manifest[name] for name in manifest.keys() - {"metadata"}} == {
                name: other[name] for name in other.keys() - {"metadata"}
            }


def test_a_chart_of_your_app_names_it_to_every_command() -> None:
    named = {"celery": "-A", "cluster-tasks": "--app"}
    documents = rendered(*RENDERED_WITH, "--set", "app=shop.jobs")
    asked = [words for words in commands(documents) if words[0] in named]
    assert len(asked) == 9
    for words in asked:
        assert words[words.index(named[words[0]]) + 1] == "shop.jobs", words


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--set", "flower.enabled=false", "--set", "redis.enabled=false"), "CLUSTER_BROKER_URL"),
        ((), "flower.basicAuth"),
    ],
)
def test_a_chart_that_lacks_something_says_what(options: tuple[str, ...], told: str) -> None:
    if (helm := shutil.which("helm")) is None:
        pytest.skip("helm is not installed")
    done = subprocess.run([helm, "template", "x", CHART, *options], capture_output=True, text=True, check=False)
    assert (done.returncode != 0, told in done.stderr) == (True, True), done.stderr
