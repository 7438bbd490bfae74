"""Which nodes observe all others: a few of them, for each reads all beats, and all would read n² of them."""

from __future__ import annotations

import redis

from cluster_tasks.errors import BrokerUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import foreign_errors, load_script

SEATS = 16
"""So many observe. That they all die in one instant, of many more, takes a fault that takes the others as well."""


class Watchers:
    """The seats of those who observe. A seat is kept by asking for it; that of a node that died is free after a lease.

    While there are no more nodes than seats, each has one.
    """

    def __init__(self, client: redis.Redis, keys: Keys, lease_s: float, seats: int = SEATS) -> None:
        self._client, self._keys, self.seats = client, keys, seats
        self._kept_ms = int(lease_s * 1000)
        self._watch = load_script(client, "cluster_tasks.broker", "watch")

    def take_seat(self, node_id: str) -> tuple[bool, int]:
        """Return whether the node observes now, and how many checks coordinators have run. Raises BrokerUnavailable."""
        keys = self._keys
        with foreign_errors(BrokerUnavailable, f"asking whether {node_id} observes"):
            seated, checks = self._watch([keys.watchers, keys.checks], [node_id, self.seats, self._kept_ms])
        return bool(seated), int(checks)
