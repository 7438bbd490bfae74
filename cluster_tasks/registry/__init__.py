"""Which nodes exist: one seam, ``base.Registry``, and its implementations."""

from __future__ import annotations

from kombu.utils.url import maybe_sanitize_url

from cluster_tasks.clock import Clock
from cluster_tasks.errors import ConfigurationError, did_you_mean
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import connect
from cluster_tasks.registry.base import Registry, changes
from cluster_tasks.registry.memory import MemoryRegistry
from cluster_tasks.registry.redis import RedisRegistry
from cluster_tasks.settings import BROKER_SCHEMES, SecretUrl

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
) -> Registry:
    """Return the registry that ``url`` names; None stands for the Redis of the broker. Does no I/O.

    ``memory://`` is one registry for each cluster name of this process: who asks twice gets the same.
    Raises ConfigurationError for another scheme.
    """
    chosen = broker_url if url is None else url
    address = chosen.get_secret_value() if isinstance(chosen, SecretUrl) else chosen
    scheme = address.partition("://")[0]
    if scheme == MEMORY_SCHEME:
        return _in_memory.setdefault(keys.name, MemoryRegistry(clock))
    if scheme in BROKER_SCHEMES:
        return RedisRegistry(connect(address, sentinel_master=sentinel_master), keys, clock)
    known = (*BROKER_SCHEMES, MEMORY_SCHEME)
    raise ConfigurationError(
        f"registry_url={str(maybe_sanitize_url(address))!r}: no registry has the scheme {scheme!r}"
        f"{did_you_mean(scheme, known)}; expected one of {', '.join(f'{name}://' for name in known)}"
    )
