"""Collections in Qdrant, where ``CLUSTER_VECTOR_URL`` names one.

Its client is imported with the modules below, by the process that uses it: that takes a second.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from cluster_tasks.addresses.qdrant import parse_qdrant_url
from cluster_tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from cluster_tasks.shards.qdrant.store import QdrantStore

NEEDED = ("qdrant_client", "snowballstemmer")


def open_store(url: str) -> QdrantStore:
    """Return the store that a ``qdrant://`` URL names. Does no I/O.

    Raises ConfigurationError for a wrong URL, or if the client is not installed.
    """
    address = parse_qdrant_url(url)
    if not all(map(find_spec, NEEDED)):
        raise ConfigurationError("collections in Qdrant need its client: install cluster-tasks[qdrant]")
    from cluster_tasks.shards.qdrant.store import QdrantStore

    return QdrantStore(address)
