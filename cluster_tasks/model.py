"""What the cluster speaks of: nodes, what they can do and carry, requests, events. All values are frozen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

NODE_ID = re.compile(r"[A-Za-z0-9_.@-]{1,128}")
REQUEST_TYPE = re.compile(r"[a-z][a-z0-9_]{0,63}")


def _checked(pattern: re.Pattern[str], noun: str, value: str) -> str:
    if not pattern.fullmatch(value):
        raise ValueError(f"{noun} {value!r} does not match {pattern.pattern}")
    return value


def check_node_id(value: str) -> str:
    """Return ``value`` if it can be the id of a node. Raises ValueError."""
    if value.endswith(".bound"):
        raise ValueError(f"node id {value!r} ends with .bound, as the second list of a node does")
    return _checked(NODE_ID, "node id", value)


def check_request_type(value: str) -> str:
    """Return ``value`` if it can name a request type. Raises ValueError."""
    return _checked(REQUEST_TYPE, "request type", value)


NodeId = Annotated[str, AfterValidator(check_node_id)]
RequestType = Annotated[str, AfterValidator(check_request_type)]


ZONE = "zone"
"""The entry of a node's metadata that names its datacentre, or whatever fails as one."""


class NodeStatus(StrEnum):
    """Where a node is in its life."""

    ONLINE = "online"
    BUSY = "busy"
    """No free slot."""
    DRAINING = "draining"
    """Finishes what runs; nothing new is placed on it."""
    OFFLINE = "offline"


class NodeRole(StrEnum):
    """What a node is there for."""

    MASTER = "master"
    """A coordinator: runs control tasks only."""
    WORKER = "worker"
    """Runs jobs."""
    CACHE = "cache"
    """Holds index shards and warm caches."""


class EventType(StrEnum):
    """What happened to a node, as seen by a watcher."""

    JOINED = "joined"
    LEFT = "left"
    UPDATED = "updated"


class _Record(BaseModel):
    # Unknown fields are dropped, not refused: nodes of a newer release register beside older readers.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Capacity(_Record):
    """What a node can take. ``max_qps`` and ``max_memory_mb`` of 0 mean: no limit."""

    max_connections: int = Field(default=1, ge=0)
    """Jobs at a time: the size of the pool."""
    max_qps: float = Field(default=0.0, ge=0)
    max_memory_mb: int = Field(default=0, ge=0)
    max_threads: int = Field(default=1, ge=0)


class Recent(_Record):
    """How the last jobs of one task ended on a node."""

    jobs: int = Field(default=0, ge=0)
    failures: int = Field(default=0, ge=0)
    """Those that raised an error; one that is to be tried again counts as well."""
    latency_s: float = Field(default=0.0, ge=0)
    """Median of the time that those ran which did not fail; 0 while there are none."""
    sure_latency_s: float = Field(default=0.0, ge=0)
    """What this median is at least, whatever chance has made of so few runs; 0 while there are too few to say."""


class Load(_Record):
    """What a node carries, as it reported it last."""

    current_connections: int = Field(default=0, ge=0)
    """Jobs it holds: running and reserved. Its list is not counted."""
    current_qps: float = Field(default=0.0, ge=0)
    """Jobs it finished per second, over the last seconds."""
    memory_usage_mb: float = Field(default=0.0, ge=0)
    cpu_usage_percent: float = Field(default=0.0, ge=0)
    """Of the whole machine, 0 to 100."""
    thread_count: int = Field(default=0, ge=0)
    queue_length: int = Field(default=0, ge=0)
    """Jobs in its list, all priorities."""
    success_rate: float = Field(default=1.0, ge=0, le=1)
    """Share of its last jobs that did not fail; 1 while it has no history."""
    recent: Mapping[str, Recent] = Field(default_factory=dict)
    """How its last jobs ended, by the name of their task; none of them long ago."""
    trial: str = ""
    """The trial of the broker that they were part of; empty: none, as for all healthy nodes."""


GIVEN_JOBS = ("", "ramping")
"""Limits of nodes under which jobs are placed on them."""


class Node(_Record):
    """One Celery worker that consumes its own queue."""

    id: NodeId
    name: str = ""
    address: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    """Where it serves metrics; 0: nowhere."""
    status: NodeStatus = NodeStatus.ONLINE
    roles: frozenset[NodeRole] = frozenset({NodeRole.WORKER})
    capacity: Capacity = Capacity()
    load: Load = Load()
    metadata: Mapping[str, str] = Field(default_factory=dict)
    serves: frozenset[RequestType] = frozenset()
    limit: str = ""
    """Why it is given fewer jobs than its pool can run: the ``phase`` of its limit; empty: it is not."""
    epoch: str = ""
    registered_at: float = 0.0
    """Seconds since 1970, by the node's own clock."""
    last_seen: float = 0.0
    """Seconds since 1970, by the node's own clock."""

    @property
    def in_flight(self) -> int:
        """Jobs it holds plus jobs in its list."""
        return self.load.current_connections + self.load.queue_length

    @property
    def zone(self) -> str:
        """The datacentre it is in, or whatever fails as one; empty: it does not say."""
        return self.metadata.get(ZONE, "")

    def accepts(self, request_type: str) -> bool:
        """Whether a job of this type may be placed here now."""
        limit = self.capacity.max_qps
        return (
            self.status in (NodeStatus.ONLINE, NodeStatus.BUSY)
            and request_type in self.serves
            and self.limit in GIVEN_JOBS
            and NodeRole.WORKER in self.roles
            and (not limit or self.load.current_qps < limit)
        )


class NodeEvent(_Record):
    """A change in the set of nodes."""

    type: EventType
    node: Node
    timestamp: float
    """Seconds since 1970, by the clock of whoever wrote the event."""


@dataclass(frozen=True, slots=True)
class NodeFilter:
    """Chooses nodes; what is left out matches all."""

    status: NodeStatus | None = None
    role: NodeRole | None = None
    request_type: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def matches(self, node: Node) -> bool:
        """Whether ``node`` passes every part of this filter."""
        return (
            (self.status is None or node.status is self.status)
            and (self.role is None or self.role in node.roles)
            and (self.request_type is None or self.request_type in node.serves)
            and all(node.metadata.get(key) == value for key, value in self.metadata.items())
        )


@dataclass(frozen=True, slots=True)
class Request:
    """A job as a balancer sees it, before it has a node."""

    type: str
    id: str = ""
    """Empty at publish: Celery's router is not told the task id."""
    size: int = 0
    """Bytes of the arguments, roughly."""
    affinity: str = ""
    """Jobs that share it profit from the same node; empty: any node."""
    metadata: Mapping[str, str] = field(default_factory=dict)
