"""How a node with role ``cache`` holds shards: a keeper in each process that runs jobs."""

from __future__ import annotations

import logging

from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import ConfigurationError
from cluster_tasks.model import NodeRole
from cluster_tasks.shards.keeper import ShardKeeper, WarmStore
from cluster_tasks.shards.manager import SERVED
from cluster_tasks.tasks.ready_made import backends_of
from workers.periodic import Periodic

logger = logging.getLogger(__name__)


class Holding:
    """Keeps this process's part of the shards of a node, on a thread of its own."""

    def __init__(self, cluster: Cluster, node_id: str) -> None:
        self._cluster = cluster
        self._keeper = ShardKeeper(node_id, cluster.assignments, self._store, cluster.clock)
        self._steps = Periodic("shard keeper", cluster.settings.heartbeat_s, self._keeper.step)

    def start(self) -> None:
        """Begin, if the node is one that holds shards. In a process that forks no more: LanceDB starts threads."""
        cluster = self._cluster
        if NodeRole.CACHE not in cluster.settings.roles or SERVED not in cluster.served_types():
            return
        if url := cluster.settings.vector_url:
            logger.info("this node holds no shards: an outside engine has the collections, %s", url)
            return
        try:
            self._store()
        except ConfigurationError as exc:
            logger.error("this node holds no shards: %s", exc)
            return
        self._steps.start()

    def stop(self) -> None:
        """End, as soon as what is being loaded is there. Safe to repeat, and before ``start``."""
        self._keeper.stop()
        self._steps.stop()

    def _store(self) -> WarmStore:
        return backends_of(self._cluster.app).sharded
