"""How nodes show in Consul's catalog, where its user interface, health API and DNS find them."""

from __future__ import annotations

import logging
from importlib.metadata import version

from consul import ACLPermissionDenied, ConsulException

from cluster_tasks.addresses.consul import ConsulUrl
from cluster_tasks.consul_store import ConsulClient, foreign_errors
from cluster_tasks.errors import RegistryUnavailable
from cluster_tasks.model import Node

logger = logging.getLogger(__name__)

DEREGISTER_AFTER = "1m"
"""The least that Consul takes: so long after its check turned critical, a service is removed."""


class Catalog:
    """Nodes as services of the agent that is asked, each with a check that its beats pass."""

    def __init__(self, client: ConsulClient, url: ConsulUrl, cluster: str) -> None:
        self._agent, self._url, self._cluster = client.agent, url, cluster
        self._permission = f'service "{url.service}" {{ policy = "write" }}'

    def show(self, node: Node) -> None:
        """Make the node a service whose check is passed. Safe to repeat. Raises RegistryUnavailable."""
        tags = {*self._url.tags, *node.roles, *node.serves, f"version={version('cluster-tasks')}"}
        check = {
            "ttl": f"{round(self._url.ttl_s * 1000)}ms",
            "status": "passing",
            "DeregisterCriticalServiceAfter": DEREGISTER_AFTER,
        }
        with foreign_errors(RegistryUnavailable, "registering a service", self._permission):
            self._agent.service.register(
                self._url.service,
                service_id=self._id(node.id),
                address=node.address,
                port=node.port,
                tags=sorted(tags),
                meta={"cluster": self._cluster, "node": node.id, "epoch": node.epoch},
                check=check,
            )

    def pass_check(self, node: Node) -> None:
        """Tell that the node lives, and show it again if the agent has forgotten it. Raises RegistryUnavailable."""
        with foreign_errors(RegistryUnavailable, "passing a check", self._permission):
            try:
                self._agent.check.ttl_pass(f"service:{self._id(node.id)}")
                return
            except ACLPermissionDenied:
                raise
            except ConsulException as exc:
                # It lost its data, or removed a node that was silent for too long.
                forgotten = str(exc)
        self.show(node)
        logger.info("service registered again", extra={"node": node.id, "reason": forgotten})

    def remove(self, node_id: str) -> None:
        """Take the node's service away if the agent that is asked is the one that has it.

        No other one can; there the check turns critical, and Consul removes it.
        """
        try:
            with foreign_errors(RegistryUnavailable, "removing a service", self._permission):
                self._agent.service.deregister(self._id(node_id))
        except RegistryUnavailable as exc:
            logger.debug("service left to its check", extra={"node": node_id, "reason": str(exc)})

    def _id(self, node_id: str) -> str:
        # Neither a service nor a cluster has a dot in its name, so no two nodes of an agent are one service.
        return f"{self._url.service}.{self._cluster}.{node_id}"
