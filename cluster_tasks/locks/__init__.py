"""What must be done by one at a time: ``base.Locks``, and the stores that the locks live in."""

from __future__ import annotations

from cluster_tasks.clock import Clock
from cluster_tasks.keys import Keys
from cluster_tasks.locks.base import Grant, Held, Locks, LockStore
from cluster_tasks.locks.redis import RedisLocks
from cluster_tasks.redis_store import connect
from cluster_tasks.settings import BROKER_SCHEMES, SecretUrl

__all__ = ["Grant", "Held", "LockStore", "Locks", "RedisLocks", "create_locks"]


def create_locks(
    registry_url: SecretUrl | str | None,
    *,
    broker_url: SecretUrl | str,
    keys: Keys,
    clock: Clock,
    sentinel_master: str = "mymaster",
) -> Locks:
    """Return the locks of a cluster: in the service that is its registry, else in the Redis of its broker.

    Does no I/O.
    """
    address = _text(broker_url if registry_url is None else registry_url)
    if address.partition("://")[0] not in BROKER_SCHEMES:
        # A registry in the memory of one process: the jobs are in Redis all the same.
        address = _text(broker_url)
    return Locks(RedisLocks(connect(address, sentinel_master=sentinel_master), keys), clock)


def _text(url: SecretUrl | str) -> str:
    return url.get_secret_value() if isinstance(url, SecretUrl) else url
