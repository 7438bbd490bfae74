"""What must be done by one at a time: ``base.Locks``, and the stores that the locks live in."""

from __future__ import annotations

from importlib.util import find_spec

from cluster_tasks.addresses.consul import SCHEME as CONSUL_SCHEME
from cluster_tasks.addresses.consul import parse_consul_url
from cluster_tasks.addresses.etcd import SCHEME as ETCD_SCHEME
from cluster_tasks.addresses.etcd import parse_etcd_url
from cluster_tasks.addresses.redis import BROKER_SCHEMES
from cluster_tasks.addresses.secret import SecretUrl
from cluster_tasks.clock import Clock
from cluster_tasks.errors import ConfigurationError
from cluster_tasks.keys import Keys
from cluster_tasks.locks.base import Grant, Held, Locks, LockStore
from cluster_tasks.locks.redis import RedisLocks
from cluster_tasks.redis_store import connect

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

    Does no I/O. Raises ConfigurationError for a URL that cannot work, or a library that is not installed.
    """
    address = _text(broker_url if registry_url is None else registry_url)
    scheme = address.partition("://")[0]
    if scheme == CONSUL_SCHEME:
        from cluster_tasks.locks.consul import ConsulLocks  # Its client is installed only where it is wanted.

        return Locks(ConsulLocks(parse_consul_url(address), keys), clock)
    if scheme == ETCD_SCHEME:
        return Locks(_in_etcd(address, keys), clock)
    if scheme not in BROKER_SCHEMES:
        # A registry in the memory of one process: the jobs are in Redis all the same.
        address = _text(broker_url)
    return Locks(RedisLocks(connect(address, sentinel_master=sentinel_master), keys), clock)


def _in_etcd(address: str, keys: Keys) -> LockStore:
    if find_spec("etcd3gw") is None:
        raise ConfigurationError("locks in etcd need etcd3gw: pip install 'cluster-tasks[etcd]'")
    # Not at the top: whoever keeps his locks elsewhere need not have it.
    from cluster_tasks.locks.etcd import EtcdLocks

    return EtcdLocks(parse_etcd_url(address), keys)


def _text(url: SecretUrl | str) -> str:
    return url.get_secret_value() if isinstance(url, SecretUrl) else url
