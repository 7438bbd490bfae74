"""What becomes of a Celery app's configuration when the app is made a cluster."""

from __future__ import annotations

import logging

from celery import Celery
from pydantic import SecretStr

from cluster_tasks.addresses.secret import SecretUrl
from cluster_tasks.broker.results import FENCED_BACKENDS
from cluster_tasks.keys import DEFAULT_NAME
from cluster_tasks.redis_store import CONNECT_TIMEOUT_S, HEALTH_CHECK_S, SOCKET_TIMEOUT_S, is_same_server
from cluster_tasks.settings import CONF_PREFIX, ClusterSettings

logger = logging.getLogger(__name__)


def configure(app: Celery, settings: ClusterSettings) -> None:
    """Bring the configuration of ``app`` in line with the settings of its cluster."""
    conf = app.conf
    # Celery shows its configuration in reports and to Flower: what can hold a password shows masked there.
    conf.update(
        {f"{CONF_PREFIX}{name}": value for name, value in settings if isinstance(value, SecretUrl | SecretStr)}
        | {
            f"{CONF_PREFIX}{name}": value
            for name, value in settings
            if name.endswith(("_fallbacks", "_join")) and value
        }
    )
    broker = settings.broker_url.get_secret_value()
    conf.broker_url = broker
    conf.broker_transport_options = {
        "socket_timeout": SOCKET_TIMEOUT_S, "socket_connect_timeout": CONNECT_TIMEOUT_S, "socket_keepalive": True,
        # Kombu drops a connection that has said nothing for a second longer than this.
        "health_check_interval": 1,
        "master_name": settings.sentinel_master, **conf.broker_transport_options, "cluster_name": settings.name,
        "cluster_timezone": getattr(app.timezone, "key", "UTC"),
        "cluster_max_message_bytes": settings.max_message_bytes,
        "cluster_max_result_bytes": settings.max_result_bytes,
    }  # fmt: skip
    app.add_defaults(
        {
            # Celery waits this long for the result of a child that died; a committed result is safe without.
            "worker_lost_wait": 1.0,
            # A worker that gave up would have to be started by hand after an outage.
            "broker_connection_max_retries": None,
            # With Celery's two minutes, a commit to a master that has fallen silent outlasts the failover.
            "redis_socket_timeout": SOCKET_TIMEOUT_S,
            "redis_socket_connect_timeout": CONNECT_TIMEOUT_S,
            "redis_backend_health_check_interval": HEALTH_CHECK_S,
        }
    )
    if settings.name != DEFAULT_NAME:
        # Remote control and events of two clusters on one Redis are as separate as their jobs.
        channels = {"control_exchange": f"{settings.name}.celery", "event_exchange": f"{settings.name}.celeryev"}
        app.add_defaults(channels)
    if "redbeat" in str(conf.beat_scheduler).lower():
        # Its lock outlives a beat that died by five of its longest sleeps, which are five minutes by default.
        app.add_defaults({"beat_max_loop_interval": settings.lease_s, "redbeat_redis_url": broker})
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
