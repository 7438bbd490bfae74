"""What the tests of the registry in etcd share."""

from __future__ import annotations

from collections.abc import Callable

from cluster_tasks.clock import SystemClock
from cluster_tasks.errors import RegistryUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.registry.etcd import EtcdRegistry
from tests.contract.test_registry import KEYS
from tests.waiting import wait_until

PATIENCE_S = 60.0
"""For an election, or for a server that hangs to be given up: seconds on a machine of one's own."""
LOST = "registry lost, the watch goes on when it answers"


def registry_at(url: str, keys: Keys = KEYS) -> EtcdRegistry:
    return EtcdRegistry(url, keys, SystemClock())


def patiently(call: Callable[[], object]) -> None:
    """Do what may be done twice until it succeeds."""

    def done() -> bool:
        try:
            call()
        except RegistryUnavailable:
            return False
        return True

    wait_until(done, PATIENCE_S, "the registry answers")
