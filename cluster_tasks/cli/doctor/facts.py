"""What the doctor knows of a cluster: facts, without judgement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Unknown:
    """Stands for what could not be found out."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowCommand:
    """An entry of Redis' slow log, without the arguments, which may be private."""

    name: str
    took_s: float
    age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The Redis of the jobs, in its own words."""

    info: Mapping[str, Any] = field(default_factory=dict)
    """What INFO tells, numbers as numbers."""
    config: Mapping[str, str] | Unknown = field(default_factory=dict)
    """What CONFIG GET tells."""
    slow: Sequence[SlowCommand] | Unknown = ()
    round_trip_s: float = 0.0
    """Median of a few."""
    ahead_s: float = 0.0
    """How far its clock is ahead of this machine's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeState:
    """A node, as the table of epochs and the registry know it."""

    id: str
    has_epoch: bool = True
    """Whether it may work."""
    beats: bool = True
    """Whether it has beaten while the doctor looked, for up to a lease."""
    registered: bool = True
    coordinator: bool = False
    limit: str = ""
    """Why it is given fewer jobs than it could run."""
    ahead_s: float | None = None
    """How much later than now, by this machine's clock, it has reported last, by its own; None: it has not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """How often coordinators had checked the nodes, when the doctor began to look and when it ended."""

    before: int = 0
    after: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryState:
    """The service that knows the nodes."""

    url: str = ""
    """Without its password."""
    took_s: float = 0.0
    """How long it took to list them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """Jobs of an epoch that does not stand, in the hash of what it held or in what a fence has put away."""

    epoch: str
    """``<node id>/<epoch>``."""
    key: str
    jobs: int
    fenced: bool = False
    """Whether the table of fenced epochs names it: then whoever watches moves the jobs at once."""
    opened: bool = False
    """Whether the set of epochs that were begun names it: then the search for orphans finds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Miscounted:
    """A list whose place in the index of lists says something else than its length."""

    queue: str
    jobs: int
    counted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Jobs:
    """Where jobs are that nobody is at work on."""

    unserved: Sequence[str] | Unknown = ()
    """Why some that wait cannot be run, a sentence each."""
    remains: Sequence[Remains] = ()
    miscounted: Sequence[Miscounted] = ()
    index: str = "cluster:backlog"
    """The key of the index of lists."""
    delayed: int = 0
    overdue: int = 0
    """Of these, those whose time came some seconds ago."""
    undecodable: int = 0
    quarantined: int = 0
    control: int = 0
    """Control tasks that wait for a coordinator."""
    keys_seen_whole: bool = True
    """Whether there was time to look at the name of every key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LockHeld:
    """A lock that somebody holds."""

    name: str
    left_s: float | None = None
    """None: the service does not tell."""
    endless: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All of it."""

    versions: Mapping[str, str] = field(default_factory=dict)
    """Of Python and of packages on this machine; those that are missing are left out."""
    broker: str = ""
    """Its URL without the password."""
    server: Server | Unknown = field(default_factory=Server)
    nodes: Sequence[NodeState] | Unknown = ()
    registry: RegistryState | Unknown = field(default_factory=RegistryState)
    checks: Checks | Unknown = field(default_factory=Checks)
    jobs: Jobs | Unknown = field(default_factory=Jobs)
    locks: Sequence[LockHeld] | Unknown = ()
    results_apart: bool = False
    """Whether results are kept in another Redis than the jobs."""
    registry_apart: bool = False
    """Whether nodes and locks are kept somewhere else than the jobs."""
    cache: str | Unknown = ""
    """Its URL without the password; empty: there is none."""
    cache_with_jobs: bool = False
    """Whether the cache is in the Redis of the jobs."""
    lease_s: float = 3.0
    heartbeat_s: float = 1.0
    max_message_bytes: int = 16 * 1024 * 1024
