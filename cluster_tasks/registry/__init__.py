"""Which nodes exist: one seam, ``base.Registry``, and its implementations."""

from __future__ import annotations

from importlib.util import find_spec

from cluster_tasks.addresses.consul import SCHEME as CONSUL_SCHEME
from cluster_tasks.addresses.etcd import SCHEME as ETCD_SCHEME
from cluster_tasks.addresses.redis import BROKER_SCHEMES
from cluster_tasks.addresses.secret import SecretUrl
from cluster_tasks.clock import Clock
from cluster_tasks.errors import ConfigurationError, did_you_mean
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import connect
from cluster_tasks.registry.base import Registry, changes
from cluster_tasks.registry.memory import MemoryRegistry
from cluster_tasks.registry.redis import RedisRegistry

__all__ = ["MemoryRegistry", "RedisRegistry", "Registry", "changes", "create_registry"]

MEMORY_SCHEME = "memory"

_in_memory: dict[str, MemoryRegistry] = {}


def create_registry(
    url: SecretUrl | str | None,
    *,
    broker_url: SecretUrl | str,
    keys: Keys,
    clock: Clock,
    sentinel_master: str = "mymaster",
    read_only: bool = False,
) -> Registry:
    """Return the registry that ``url`` names; None stands for the Redis of the broker. Does no I/O.

    With ``read_only``, listing and watching write nothing, so that who may only read can do it.

    ``memory://`` is one registry for each cluster name of this process: who asks twice gets the same.
    Raises ConfigurationError for another scheme, a URL that cannot work, or a library that is not installed.
    """
    chosen = broker_url if url is None else url
    address = chosen.get_secret_value() if isinstance(chosen, SecretUrl) else chosen
    scheme = address.partition("://")[0]
    if scheme == MEMORY_SCHEME:
        return _in_memory.setdefault(keys.name, MemoryRegistry(clock))
    if scheme in BROKER_SCHEMES:
        return RedisRegistry(connect(address, sentinel_master=sentinel_master), keys, clock, read_only=read_only)
    if scheme == ETCD_SCHEME:
        return _etcd_registry(address, keys, clock)
    if scheme == CONSUL_SCHEME:
        from cluster_tasks.registry.consul import ConsulRegistry  # Its client is installed only where it is wanted.

        return ConsulRegistry(address, keys, clock)
    known = (*BROKER_SCHEMES, CONSUL_SCHEME, ETCD_SCHEME, MEMORY_SCHEME)
    raise ConfigurationError(
        f"registry_url={str(SecretUrl(address))!r}: no registry has the scheme {scheme!r}"
        f"{did_you_mean(scheme, known)}; expected one of {', '.join(f'{name}://' for name in known)}"
    )


def _etcd_registry(address: str, keys: Keys, clock: Clock) -> Registry:
    if find_spec("etcd3gw") is None:
        raise ConfigurationError("an etcd:// registry needs etcd3gw: pip install 'cluster-tasks[etcd]'")
    # Not at the top: whoever keeps his nodes elsewhere need not have it.
    from cluster_tasks.registry.etcd import EtcdRegistry

    return EtcdRegistry(address, keys, clock)
