"""What jobs and users' tasks keep so as not to compute it again: ``docs/caching.md``."""

from cluster_tasks.cache.base import Cache, Reading
from cluster_tasks.cache.caches import Caches, create_caches
from cluster_tasks.cache.entry import Entry
from cluster_tasks.cache.flight import Refresh
from cluster_tasks.cache.local import LocalCache, Memory
from cluster_tasks.cache.redis import RedisCache, share
from cluster_tasks.cache.tiered import TieredCache

__all__ = [
    "Cache",
    "Caches",
    "Entry",
    "LocalCache",
    "Memory",
    "Reading",
    "RedisCache",
    "Refresh",
    "TieredCache",
    "create_caches",
    "share",
]
