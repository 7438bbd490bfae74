"""What an app is told becomes the cluster's settings, and what the cluster sets gives way to what the app says."""

from __future__ import annotations

import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from cluster_tasks import Cluster
from cluster_tasks.broker.results import FencedRedisBackend
from cluster_tasks.errors import ConfigurationError
from cluster_tasks.redbeat import RedBeat
from cluster_tasks.redis_store import SOCKET_TIMEOUT_S

PASSWORD = "hidden-word"


def configured(namespace: str | None = None, **keys: Any) -> Cluster:
    """The cluster of an app that is configured by an object, as one of Django is."""
    app = Celery("shop", set_as_current=False)
    app.config_from_object(type("Settings", (), keys), namespace=namespace)
    return Cluster(app)


# Namespaces


def test_keys_of_a_namespace_are_the_clusters_too() -> None:
    cluster = configured(
        "CELERY", CELERY_CLUSTER_LEASE_S=7, CELERY_CLUSTER_NAME="east", CELERY_BROKER_URL="redis://h/3"
    )
    settings = cluster.settings
    assert (settings.lease_s, settings.name, settings.broker_url.get_secret_value()) == (7, "east", "redis://h/3")


def test_a_key_of_a_namespace_that_is_unknown_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'cluster_lease_s'"):
        _ = configured("CELERY", CELERY_CLUSTER_LEASE=7).settings


def test_what_else_the_settings_of_a_site_hold_is_not_the_clusters() -> None:
    assert configured("CELERY", CLUSTER_LEASE_S=7).settings.lease_s == 3


def test_a_secret_in_a_key_of_a_namespace_is_not_shown() -> None:
    cluster = configured("CELERY", CELERY_CLUSTER_REGISTRY_URL=f"consul://:{PASSWORD}@h")
    assert cluster.settings.registry_url is not None
    assert PASSWORD not in repr(cluster.app.conf.table()) + cluster.app.bugreport()


# What the app says


@pytest.mark.parametrize("namespace", [None, "CELERY"])
def test_what_the_app_says_comes_before_what_the_cluster_would_set(namespace: str | None) -> None:
    before = "CELERY_" if namespace else ""
    said = {"worker_lost_wait": 9.0, "broker_connection_max_retries": 5, "control_exchange": "mine"}
    own = {(before + key).upper() if before else key: value for key, value in said.items()}
    name = {"CELERY_CLUSTER_NAME" if before else "cluster_name": "east"}
    conf = configured(namespace, **own, **name).app.conf
    assert {key: conf[key] for key in said} == said
    assert (conf.redis_socket_timeout, conf.event_exchange) == (SOCKET_TIMEOUT_S, "east.celeryev")


def test_the_ready_made_app_sends_events_unless_celeryconfig_says_not_to(tmp_path: Path) -> None:
    asked = "from cluster_tasks.app import app; print(app.conf.worker_send_task_events, app.conf.task_send_sent_event)"
    (tmp_path / "celeryconfig.py").write_text("worker_send_task_events = False\n", encoding="utf-8")
    told = subprocess.run([sys.executable, "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert told.stdout == "False True\n"


def test_the_schedule_of_redbeat_is_where_the_app_says_and_a_node_does_not_tell() -> None:
    cluster = configured(beat_scheduler="redbeat.RedBeatScheduler", broker_url=f"redis://:{PASSWORD}@h/0")
    assert cluster.settings
    assert PASSWORD not in repr(cluster.app.conf.table()) + cluster.app.bugreport()
    beat = RedBeat(cluster.app, lazy=True)
    assert cluster.app.redbeat_conf.redis_url == f"redis://:{PASSWORD}@h/0"
    assert beat.max_interval == 3
    other = configured(beat_scheduler="redbeat.RedBeatScheduler", redbeat_redis_url="redis://other/1")
    assert other.app.conf.beat_scheduler == "cluster_tasks.redbeat:RedBeat"
    RedBeat(other.app, lazy=True)
    assert other.app.redbeat_conf.redis_url == "redis://other/1"


# One Redis


@pytest.mark.parametrize("variable", ["CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"])
@pytest.mark.parametrize("other", ["redis://:hidden-word@other/0", "redis://h/1", "amqp://h"])
def test_a_variable_by_which_celery_would_work_with_another_redis_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, other: str
) -> None:
    monkeypatch.setenv("CLUSTER_BROKER_URL", "redis://h/0")
    monkeypatch.setenv(variable, other)
    with pytest.raises(ConfigurationError, match=f"{variable}=.* is not CLUSTER_BROKER_URL") as caught:
        _ = configured().settings
    assert PASSWORD not in str(caught.value)


def test_a_key_by_which_celery_would_read_from_another_redis_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="broker_read_url=redis://other/0 is not CLUSTER_BROKER_URL"):
        _ = configured(broker_url="redis://h/0", broker_read_url="redis://other/0").settings


def test_a_variable_by_which_results_would_go_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_RESULT_BACKEND", "redis://h/1")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "redis://other/1")
    with pytest.raises(ConfigurationError, match=r"CELERY_RESULT_BACKEND=.* is not CLUSTER_RESULT_BACKEND"):
        _ = configured().settings


@pytest.mark.parametrize("spelling", ["redis://h", "redis://h:6379/0", "redis://h/"])
def test_variables_that_name_one_redis_may_both_be_set(monkeypatch: pytest.MonkeyPatch, spelling: str) -> None:
    monkeypatch.setenv("CLUSTER_BROKER_URL", "redis://h/0")
    monkeypatch.setenv("CELERY_BROKER_URL", spelling)
    assert configured().settings.broker_url.get_secret_value() == "redis://h/0"


def test_celerys_variable_alone_names_the_redis_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://other:6380/2")
    cluster = configured(broker_url="redis://h/0")
    assert cluster.settings.broker_url.get_secret_value() == cluster.app.conf.broker_url == "redis://other:6380/2"


# TLS and Sentinel, by Celery's own keys


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_what_celery_is_told_of_tls_holds_for_the_cluster_too(scheme: str) -> None:
    options = {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_ca_certs": "/etc/ca.pem"}
    cluster = configured(broker_url=f"{scheme}://h/0", broker_use_ssl=options)
    assert cluster.settings.broker_url.get_secret_value() == (
        "rediss://h/0?ssl_ca_certs=%2Fetc%2Fca.pem&ssl_cert_reqs=none"
    )
    assert cluster.client.connection_pool.connection_kwargs["ssl_cert_reqs"] == "none"


def test_what_is_not_told_of_tls_is_not_in_the_url() -> None:
    options = {"ssl_keyfile": None, "ssl_certfile": None, "ssl_ca_certs": None, "ssl_cert_reqs": None}
    asked = configured(broker_url="rediss://h/0", broker_use_ssl=options)
    assert asked.settings.broker_url.get_secret_value() == "rediss://h/0?ssl_cert_reqs=none"


def test_what_the_url_says_of_tls_wins() -> None:
    asked = configured(broker_url="rediss://h/0?ssl_cert_reqs=optional", broker_use_ssl={"ssl_cert_reqs": None})
    assert asked.settings.broker_url.get_secret_value() == "rediss://h/0?ssl_cert_reqs=optional"


def test_a_redis_without_tls_by_variable_is_asked_without_it_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_BROKER_URL", "redis://other/0")
    cluster = configured(broker_url="rediss://h/0", broker_use_ssl={"ssl_cert_reqs": ssl.CERT_NONE})
    assert cluster.settings.broker_url.get_secret_value() == "redis://other/0"
    assert not cluster.app.conf.broker_use_ssl


@pytest.mark.parametrize(
    ("broker", "results"),
    [
        ("rediss://h/0?ssl_cert_reqs=CERT_NONE", "rediss://h/1?ssl_cert_reqs=CERT_NONE"),
        ("redis://h/0", "redis://h:6379/1"),
    ],
)
def test_results_in_the_redis_of_the_jobs_are_committed_with_them_however_it_is_written(
    broker: str, results: str
) -> None:
    cluster = configured(broker_url=broker, result_backend=results)
    assert cluster.settings
    assert isinstance(cluster.app.backend, FencedRedisBackend)


def test_the_group_behind_sentinels_is_the_one_that_celery_was_told() -> None:
    cluster = configured(broker_url="sentinel://h:26379/0", broker_transport_options={"master_name": "shop"})
    assert cluster.settings.sentinel_master == "shop"
