"""A Redis Cluster of a test's own on the loopback: three masters, each with a replica."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import redis
from redis.crc import key_slot

from tests.certificates import Certificate
from tests.waiting import wait_until
from workers.redis_server import HOST, RedisServer, free_port

SLOTS = 16_384
MASTERS = 3
START_S = 60.0
SETTINGS = ("cluster-enabled yes", "cluster-require-full-coverage no")


class RedisCluster:
    """Six servers that die with this process. Over stops and starts they keep their ports and what they know."""

    def __init__(
        self, directory: Path, password: str = "", certificate: Certificate | None = None, node_timeout_ms: int = 1000
    ) -> None:
        """With a ``certificate`` clients speak TLS, and servers to each other, too; this class itself does not."""
        self._password, self._certificate, self._node_timeout_ms = password, certificate, node_timeout_ms
        self._tls_ports: dict[int, int] = {}
        self._met_at: dict[int, tuple[int, ...]] = {}
        self._new = [self._server(directory / f"server{number}") for number in range(2 * MASTERS)]
        self.servers: dict[int, RedisServer] = {}
        """By port."""

    @property
    def url(self) -> str:
        """Of a cache in it."""
        login = f":{quote(self._password, safe='')}@" if self._password else ""
        if self._certificate is None:
            return f"redis+cluster://{login}{','.join(f'{HOST}:{port}' for port in self.servers)}"
        hosts = ",".join(f"{HOST}:{self._tls_ports[port]}" for port in self.servers)
        return f"rediss+cluster://{login}{hosts}?ssl_ca_certs={self._certificate.certificate}"

    def _server(self, directory: Path) -> RedisServer:
        # A bus at its usual place, 10,000 above, could be among the ports of connections.
        port, bus_port = free_port(), free_port()
        settings = [*SETTINGS, f"cluster-node-timeout {self._node_timeout_ms}", f"cluster-port {bus_port}"]
        settings += [f"masterauth {json.dumps(self._password)}"] if self._password else []
        self._met_at[port] = (port, bus_port)
        if self._certificate is None:
            return RedisServer(directory, port, password=self._password or None, extra=settings)
        (certificate, key), tls_port = self._certificate, free_port()
        self._tls_ports[port], self._met_at[port] = tls_port, (tls_port, bus_port)
        settings += [
            f"tls-port {tls_port}", f"tls-cert-file {certificate}", f"tls-key-file {key}",
            f"tls-ca-cert-file {certificate}", "tls-auth-clients no", "tls-cluster yes", "tls-replication yes",
        ]  # fmt: skip
        return RedisServer(directory, port, password=self._password or None, extra=settings)

    def start(self) -> None:
        """Start, and return once every slot has a master and that a replica."""
        for server in self._new:
            server.start()
        self.servers = {server.port: server for server in self._new}
        ports = list(self.servers)
        masters, replicas = ports[:MASTERS], ports[MASTERS:]
        for number, port in enumerate(masters):
            slots = range(SLOTS * number // MASTERS, SLOTS * (number + 1) // MASTERS)
            self.ask(port, "CLUSTER ADDSLOTS", *slots)
            self.ask(port, "CLUSTER SET-CONFIG-EPOCH", number + 1)
        for port in ports[1:]:
            self.ask(ports[0], "CLUSTER MEET", HOST, *self._met_at[port])
        wait_until(lambda: all(len(self._nodes(port)) == len(ports) for port in ports), START_S, "all have met")
        for master, replica in zip(masters, replicas, strict=True):
            self.ask(replica, "CLUSTER REPLICATE", self.ask(master, "CLUSTER MYID"))
        self.wait_until_whole()

    def stop(self) -> None:
        """End all. Safe to repeat."""
        for server in self._new:
            server.kill()

    def empty(self) -> None:
        """Lose all keys."""
        for port in self.masters():
            self.ask(port, "FLUSHALL")

    def ask(self, port: int, command: str, *arguments: Any) -> Any:
        """Send a command to one server. Raises redis.RedisError."""
        password = self._password or None
        with redis.Redis(HOST, port, password=password, socket_timeout=2.0, decode_responses=True) as client:
            return client.execute_command(command, *arguments)

    def masters(self) -> list[int]:
        """The ports of the masters, as one of those that answer sees it."""
        for port, server in self.servers.items():
            if server.running:
                with suppress(redis.RedisError):
                    return [
                        node for node, flags in self._nodes(port).items() if "master" in flags and "fail" not in flags
                    ]
        return []

    def master_of(self, key: str) -> int:
        """The port of the master that has a key."""
        return self._master_of_slot(key_slot(key.encode()))

    def wait_until_whole(self) -> None:
        """Return once those that run agree that every slot has a master, and replicas are in step."""
        wait_until(self._is_whole, START_S, "the cluster is whole")

    def move_slot(self, slot: int, to: int, halfway: Callable[[], None] = lambda: None) -> None:
        """Move a slot to another master, with its keys; ``halfway`` is called when half of them are there."""
        source = self._master_of_slot(slot)
        ids = {port: self.ask(port, "CLUSTER MYID") for port in (source, to)}
        self.ask(to, "CLUSTER SETSLOT", slot, "IMPORTING", ids[source])
        self.ask(source, "CLUSTER SETSLOT", slot, "MIGRATING", ids[to])
        keys = self.ask(source, "CLUSTER GETKEYSINSLOT", slot, 1_000_000)
        self._move_keys(source, to, keys[: len(keys) // 2])
        halfway()
        while keys := self.ask(source, "CLUSTER GETKEYSINSLOT", slot, 1_000_000):
            self._move_keys(source, to, keys)
        for port in (to, source, *(port for port in self.masters() if port not in ids)):
            self.ask(port, "CLUSTER SETSLOT", slot, "NODE", ids[to])

    def _move_keys(self, source: int, to: int, keys: list[str]) -> None:
        if keys:
            self.ask(source, "MIGRATE", HOST, to, "", 0, 5_000, "KEYS", *keys)

    def _master_of_slot(self, slot: int) -> int:
        for low, high, (_, port, *_), *_ in self.ask(self.masters()[0], "CLUSTER SLOTS"):
            if low <= slot <= high:
                return int(port)
        raise AssertionError(f"nobody has slot {slot}")

    def _is_whole(self) -> bool:
        try:
            for port, server in self.servers.items():
                if not server.running:
                    continue
                if self.ask(port, "CLUSTER INFO")["cluster_state"] != "ok":
                    return False
                replication = self.ask(port, "INFO", "replication")
                if replication["role"] == "slave" and replication["master_link_status"] != "up":
                    return False
            covered = self.ask(self.masters()[0], "CLUSTER SLOTS")
        except (redis.RedisError, IndexError):
            return False
        return sum(high - low + 1 for low, high, *_ in covered) == SLOTS and len(self.masters()) == MASTERS

    def _nodes(self, port: int) -> dict[int, str]:
        """The servers that one knows, with their flags."""
        nodes = self.ask(port, "CLUSTER NODES")
        known = {address: node["flags"] for address, node in nodes.items()}
        return {
            int(address.rpartition(":")[2]): flags
            for address, flags in known.items()
            if "handshake" not in flags and "noaddr" not in flags
        }

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
