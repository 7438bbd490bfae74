"""What becomes of a Celery app's configuration when the app is made a cluster."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from celery import Celery
from celery.utils.imports import cwd_in_path
from pydantic import SecretStr

from cluster_tasks.addresses.redis import checked_redis_url, with_tls
from cluster_tasks.addresses.secret import SecretUrl, masked
from cluster_tasks.broker.results import FENCED_BACKENDS
from cluster_tasks.errors import ConfigurationError
from cluster_tasks.keys import DEFAULT_NAME
from cluster_tasks.redis_store import (
    CONNECT_TIMEOUT_S,
    HEALTH_CHECK_S,
    SOCKET_TIMEOUT_S,
    database_of,
    is_same_server,
)
from cluster_tasks.settings import CONF_PREFIX, ENV_PREFIX, ClusterSettings

logger = logging.getLogger(__name__)


REDBEAT = ("redbeat.RedBeatScheduler", "redbeat.schedulers.RedBeatScheduler", "redbeat.schedulers:RedBeatScheduler")
URLS = {"broker_url": "CELERY_BROKER_URL", "broker_read_url": "CELERY_BROKER_READ_URL",
        "broker_write_url": "CELERY_BROKER_WRITE_URL", "result_backend": "CELERY_RESULT_BACKEND"}  # fmt: skip
"""Keys of Celery's, and the variables that it reads before them; ``celery -b`` sets the first."""


def read_celeryconfig(app: Celery) -> None:
    """Have ``app`` configured by the ``celeryconfig.py`` of the current folder, if there is one."""
    # That folder is not on the path of a program that is installed. Celery imports from there all the same.
    with cwd_in_path():
        is_there = find_spec("celeryconfig") is not None
    if is_there:
        app.config_from_object("celeryconfig")


def keys_of_the_cluster(app: Celery) -> dict[str, str]:
    """The keys of the configuration that are the cluster's, as they are written there, by their plain names.

    With ``config_from_object(…, namespace="CELERY")`` ``CELERY_CLUSTER_LEASE_S`` is ``cluster_lease_s``.
    """
    found, before = {}, f"{app.namespace}_" if app.namespace else ""
    for key in map(str, app.conf):
        plain = key.removeprefix(before).lower() if before and key.startswith(before) else key
        if plain.startswith(CONF_PREFIX):
            found[plain] = key
    return found


def given_settings(app: Celery) -> dict[str, Any]:
    """What the configuration of ``app`` says of its cluster: its own keys, and where Celery's say the same."""
    conf = app.conf
    given = {plain: conf[key] for plain, key in keys_of_the_cluster(app).items()}
    if url := conf.broker_url:
        own = with_tls(url, conf.broker_use_ssl) if isinstance(url, str) else url
        given.setdefault(f"{CONF_PREFIX}broker_url", own)
    if master := conf.broker_transport_options.get("master_name"):
        given.setdefault(f"{CONF_PREFIX}sentinel_master", master)
    return given


def add_defaults(app: Celery, defaults: Mapping[str, Any]) -> None:
    """Set what the app itself does not, by whatever way it is configured.

    Celery's method of this name puts them before what ``config_from_object`` has brought.
    """
    for layers in (app.conf.defaults, app.conf.maps):
        # The last are Celery's own.
        layers.insert(len(layers) - 1, defaults)


def configure(app: Celery, settings: ClusterSettings) -> None:
    """Bring the configuration of ``app`` in line with the settings of its cluster. Raises ConfigurationError."""
    conf, written = app.conf, keys_of_the_cluster(app)
    # Celery shows its configuration in reports and to Flower: what can hold a password shows masked there.
    shown = {
        f"{CONF_PREFIX}{name}": value
        for name, value in settings
        if isinstance(value, SecretUrl | SecretStr) or (name.endswith(("_fallbacks", "_join")) and value)
    }
    conf.update({written.get(key, key): value for key, value in shown.items()})
    broker = settings.broker_url.get_secret_value()
    conf.broker_url = broker
    for key in ("broker_url", "broker_read_url", "broker_write_url"):
        _check_same(app, key, "broker_url", broker, conf.broker_use_ssl)
    if broker.startswith("redis://"):
        # The URL says whether there is TLS, to all who read it.
        conf.broker_use_ssl = False
    conf.broker_transport_options = {
        "socket_timeout": SOCKET_TIMEOUT_S, "socket_connect_timeout": CONNECT_TIMEOUT_S, "socket_keepalive": True,
        # Kombu drops a connection that has said nothing for a second longer than this.
        "health_check_interval": 1,
        **conf.broker_transport_options, "master_name": settings.sentinel_master, "cluster_name": settings.name,
        "cluster_max_message_bytes": settings.max_message_bytes,
        "cluster_max_result_bytes": settings.max_result_bytes,
    }  # fmt: skip
    add_defaults(
        app,
        {
            # Celery waits this long for the result of a child that died; a committed result is safe without.
            "worker_lost_wait": 1.0,
            # A worker that gave up would have to be started by hand after an outage.
            "broker_connection_max_retries": None,
            # With Celery's two minutes, a commit to a master that has fallen silent outlasts the failover.
            "redis_socket_timeout": SOCKET_TIMEOUT_S,
            "redis_socket_connect_timeout": CONNECT_TIMEOUT_S,
            "redis_backend_health_check_interval": HEALTH_CHECK_S,
        },
    )
    if settings.name != DEFAULT_NAME:
        # Remote control and events of two clusters on one Redis are as separate as their jobs.
        channels = {"control_exchange": f"{settings.name}.celery", "event_exchange": f"{settings.name}.celeryev"}
        add_defaults(app, channels)
    if conf.beat_scheduler in REDBEAT:
        conf.beat_scheduler = "cluster_tasks.redbeat:RedBeat"
    _configure_results(app, settings, broker)
    conf.update(
        # A refused command (READONLY, LOADING) is a reason to reconnect, never to exit.
        broker_channel_error_retry=True,
        broker_connection_retry_on_startup=True,
        # Deliveries outlive a connection here: nothing is cancelled or throttled when one breaks.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_prefetch_count_reduction=False,
    )


def _configure_results(app: Celery, settings: ClusterSettings, broker: str) -> None:
    conf, own = app.conf, settings.result_backend
    results = own.get_secret_value() if own else conf.result_backend or broker
    if own:
        conf.result_backend = results
        _check_same(app, "result_backend", "result_backend", results, conf.redis_backend_use_ssl)
    elif isinstance(results, str):
        with suppress(ValueError):
            # Another than the broker's is Celery's to judge.
            results = checked_redis_url(with_tls(results, conf.redis_backend_use_ssl))
    conf.result_backend = results
    if str(results).startswith("sentinel://"):
        conf.result_backend_transport_options = {
            "master_name": settings.sentinel_master, **conf.result_backend_transport_options,
        }  # fmt: skip
    if is_same_server(str(results), broker):
        app.loader.override_backends = {**app.loader.override_backends, **FENCED_BACKENDS}
    elif not str(results).startswith("disabled"):
        logger.warning(
            "results do not live in the Redis of the jobs, so the end of a job is not one step with its delivery: "
            "of two nodes that run a job, as when one was taken for dead, the first that succeeds is believed"
        )


def _check_same(app: Celery, key: str, setting: str, url: str, tls: object) -> None:
    """Raise ConfigurationError if Celery takes another Redis by a key of its own than the cluster does."""
    told = getattr(app.conf, key)
    if any(_is_same_place(each, url) for each in (told, with_tls(told, tls))):
        return
    # Celery's own view shows a variable before what is configured.
    where = key if told == app.conf.get(key) else URLS[key]
    raise ConfigurationError(
        f"{where}={masked(told)} is not {ENV_PREFIX}{setting.upper()}, which is {masked(url)}: Celery would work "
        "with the one and the cluster with the other; set only one of them (celery -b counts as CELERY_BROKER_URL)"
    )


def _is_same_place(told: str, url: str) -> bool:
    with suppress(ValueError):
        told = checked_redis_url(told)
    return is_same_server(told, url) and database_of(told) == database_of(url)
