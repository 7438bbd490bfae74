"""Whether every key in a Redis is one that keys.py names."""

from __future__ import annotations

import inspect
import re

import redis

from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import text

CELERYS = r"_kombu\.binding.*|unacked(_index|_mutex)?|.*\.reply\.celery\.pidbox|celery-task(set)?-meta-.*|test:.*"
"""Keys of Celery and Kombu, and of the tests."""


def strange_keys(client: redis.Redis, keys: Keys) -> list[str]:
    """Return the keys that neither keys.py nor Celery names, sorted."""
    made = [getattr(keys, name) for name, value in vars(Keys).items() if isinstance(value, property)]
    for name, value in vars(Keys).items():
        if inspect.isfunction(value) and not name.startswith("_"):
            made.append(getattr(keys, name)(*["anything"] * (len(inspect.signature(value).parameters) - 1)))
    names = [re.escape(name).replace("anything", ".*") for name in made if isinstance(name, str)]
    known = re.compile("|".join([*names, CELERYS]))
    return sorted(name for key in client.scan_iter(count=1000) if not known.fullmatch(name := text(key)))
