"""RedBeat, told in the process that beats where it keeps its schedule: a node would show that URL with its password."""

from __future__ import annotations

from typing import Any

from celery import Celery
from redbeat.schedulers import RedBeatScheduler

from cluster_tasks.cluster import cluster_of
from cluster_tasks.configuration import add_defaults


class RedBeat(RedBeatScheduler):  # type: ignore[misc]
    """Takes the place of ``redbeat.RedBeatScheduler`` in an app that is a cluster."""

    def __init__(self, app: Celery, **options: Any) -> None:
        settings = cluster_of(app).settings
        # Its lock outlives a beat that died by five of its longest sleeps, which are five minutes by default.
        own = {
            "beat_max_loop_interval": settings.lease_s,
            "redbeat_redis_url": settings.broker_url.get_secret_value(),
            # Those of the broker are Kombu's.
            "redbeat_redis_options": {},
        }
        add_defaults(app, own)
        super().__init__(app, **options)
