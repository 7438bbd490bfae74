"""An app as it may have grown over years: a namespace of settings, queues, routes, a schedule and bases of its own."""

from __future__ import annotations

import os
import time
from functools import cache
from typing import Any, ClassVar

import redis
from celery import Celery, Task
from kombu import Queue

from cluster_tasks import Cluster, ClusterTask

ADOPTED = "SHOP_ADOPTED"


class Settings:
    """As a Django project has them."""

    CELERY_TASK_DEFAULT_QUEUE = "shop"
    CELERY_TASK_QUEUES = (Queue("shop"), Queue("mail"), Queue("slow"))
    CELERY_TASK_ROUTES = ({"shop.mail": {"queue": "mail"}}, "tests.process.adopting.shop:route")
    CELERY_TASK_SERIALIZER = "json"
    CELERY_WORKER_PREFETCH_MULTIPLIER = 4
    CELERY_BEAT_SCHEDULE: ClassVar = {"tick": {"task": "shop.tick", "schedule": 0.5, "options": {"expires": 30}}}


def route(name: str, *args: Any, **kwargs: Any) -> dict[str, str] | None:
    """Slow things have a queue of their own."""
    return {"queue": "slow"} if name.startswith("shop.slow") else None


class Audited(Task):  # type: ignore[misc]
    """The app's own base class."""

    abstract = True

    def on_success(self, retval: Any, task_id: str, *args: Any) -> None:
        note(f"audited:{task_id}", self.name)


class AuditedJob(ClusterTask, Audited):
    """The same for what the cluster balances."""

    abstract = True


def note(key: str, value: str) -> None:
    """Append to a list in Redis."""
    _store(os.environ["SHOP_URL"]).rpush(f"test:{key}", value)


@cache
def _store(url: str) -> redis.Redis:
    return redis.Redis.from_url(url)


def make_shop(adopted: bool, late: bool = False) -> Celery:
    """Return the app, with or without the one line, which may stand behind the configuration or before it."""
    url = os.environ["SHOP_URL"]
    app = Celery("shop", set_as_current=False)
    if adopted and not late:
        Cluster(app)
    app.config_from_object(Settings(), namespace="CELERY")
    app.conf.update(broker_url=url, result_backend=url)
    if adopted and late:
        Cluster(app)

    @app.task(base=AuditedJob, bind=True, shared=False, name="shop.price", request_type="llm", affinity="article")
    def price(self: Any, article: str, seconds: float = 0.0) -> str:
        note(f"ran:{self.request.id}", self.request.hostname)
        time.sleep(seconds)
        return str(self.request.hostname)

    @app.task(base=AuditedJob, bind=True, shared=False, name="shop.slow_price", request_type="llm")
    def slow_price(self: Any) -> str:
        note(f"ran:{self.request.id}", self.request.hostname)
        return str(self.request.hostname)

    @app.task(base=Audited, bind=True, shared=False, name="shop.mail", acks_late=False)
    def mail(self: Any) -> str:
        note(f"ran:{self.request.id}", self.request.hostname)
        return str(self.request.hostname)

    @app.task(shared=False, name="shop.tick", ignore_result=True)
    def tick() -> None:
        note("ticks", "tick")

    return app


if "SHOP_URL" in os.environ:
    app = make_shop(bool(os.environ.get(ADOPTED)))
