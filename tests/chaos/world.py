"""A cluster whose nodes and observers take one step at a time, on a clock that stands still between them.

Redis, scripts, epoch table, evacuation and health check are the real ones; what a node's process would do is done here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import redis

from cluster_tasks.broker.epochs import MAX_EVENTS, EpochTable, Standing
from cluster_tasks.broker.message import place_message, replace_message
from cluster_tasks.broker.placement import Crash
from cluster_tasks.broker.publishing import Publish
from cluster_tasks.clock import ManualClock
from cluster_tasks.errors import BrokerUnavailable, RegistryUnavailable
from cluster_tasks.failover.detector import Detector
from cluster_tasks.failover.evacuation import Evacuation
from cluster_tasks.failover.events import EventLog
from cluster_tasks.failover.health import HealthCheck
from cluster_tasks.failover.quarantine import Quarantine
from cluster_tasks.keys import Keys
from cluster_tasks.model import Node
from cluster_tasks.redis_store import load_script, text
from cluster_tasks.registry.memory import MemoryRegistry
from tests.broker import Broker, job_of, make_message
from tests.chaos.census import census_of
from tests.chaos.faulty import Fuse, Killed, Paused, faulty_client

LEASE_S, STEP_S = 1.0, 0.5
MAX_CRASHES = 3
FAR_S = 4e9
"""Seconds since 1970 of a time that does not come by itself."""
SERVES = {"last": {"llm", "embedding"}, "a": {"llm"}, "b": {"llm"}, "c": {"llm", "embedding"}, "d": {"embedding"}}


class Discovery(MemoryRegistry):
    """A registry that can be away, and forget all."""

    is_down = False

    def forget_all(self) -> None:
        """Be as one that was just started."""
        self._nodes.clear()

    def list(self, *args: Any) -> Sequence[Node]:
        self._answer()
        return super().list(*args)

    def register(self, node: Node) -> None:
        self._answer()
        super().register(node)

    def deregister(self, node_id: str, epoch: str) -> None:
        self._answer()
        super().deregister(node_id, epoch)

    def _answer(self) -> None:
        if self.is_down:
            raise RegistryUnavailable("the test took it away")


@dataclass
class Member:
    """One incarnation of a node. It may have been fenced and not know it yet."""

    node_id: str
    epoch: str
    beaten_s: float
    beats: bool = True
    held: dict[str, bytes] = field(default_factory=dict)
    """Message by tag."""
    held_back: set[str] = field(default_factory=set)


class Observer:
    """A process that checks the health of the others."""

    def __init__(self, url: str, keys: Keys, registry: Discovery, clock: ManualClock) -> None:
        self.fuse = Fuse()
        self.client = client = faulty_client(url, self.fuse)
        detector, events = Detector(clock, LEASE_S), EventLog(client, keys, clock)
        self.health = HealthCheck(
            EpochTable(client, keys), detector, Evacuation(client, keys), registry, events, clock
        )  # fmt: skip
        self.paused: Paused | None = None

    def check(self) -> None:
        """One check, as a coordinator runs it, and what its other threads do after that."""
        self.health.act(self.health.observe())
        self.health.tell_registry()


class World:
    """The cluster, and the books that are kept of it."""

    def __init__(self, url: str) -> None:
        self.url, self.broker, self.clock = url, Broker(url), ManualClock(1000.0)
        self.broker.client.flushall()
        self.keys, self.client = self.broker.keys, self.broker.client
        self.registry = Discovery(self.clock)
        self.events = EventLog(self.client, self.keys, self.clock)
        self.quarantine = Quarantine(self.client, self.keys, self.clock, ttl_s=FAR_S, most=1_000_000)
        self.commit_script = load_script(self.client, "cluster_tasks.broker", "commit")
        self.members: list[Member] = []
        self.observers = [self.new_observer(), self.new_observer()]
        self.jobs: set[str] = set()
        """All that were ever sent."""
        self.ended: dict[str, str] = {}
        """By which delivery a job ended."""
        self.over: dict[str, float] = {}
        """How long an epoch that has ended had not beaten then."""
        self.at_work: dict[str, set[str]] = {}
        """The jobs that an epoch was at work on when it ended."""

    def close(self) -> None:
        """Let go of all connections."""
        for observer in self.observers:
            self.finish(observer)
            observer.client.close()
        self.broker.close()

    def new_observer(self) -> Observer:
        """A process that has observed nothing yet."""
        return Observer(self.url, self.keys, self.registry, self.clock)

    # Who works.

    def standing(self) -> dict[str, str]:
        """Epoch by node, of those that may work."""
        return {node_id: beat.epoch for node_id, beat in self.broker.epochs.beats().items()}

    def join(self, node_id: str) -> Member | None:
        """Let a process of this name begin, unless the name is taken."""
        opened = self.broker.epochs.open(node_id, SERVES[node_id])
        if not isinstance(opened, str):
            return None
        member = Member(node_id, opened, self.clock.monotonic())
        self.members.append(member)
        with suppress(RegistryUnavailable):
            self.registry.register(Node(id=node_id, name=node_id, epoch=opened))
        return member

    def beat(self, *members: Member) -> None:
        """A heartbeat of each: it is refused to the fenced, and to nobody else."""
        standing = self.standing()
        for member in members:
            stands = standing.get(member.node_id) == member.epoch
            assert (self.broker.epochs.beat(member.node_id, member.epoch).standing is not Standing.FENCED) == stands
            if stands:
                member.beaten_s = self.clock.monotonic()

    def pass_time(self, steps: int, check: bool = True) -> None:
        """Let nodes beat and observers look, and (``check``) act; none of them is late."""
        for _ in range(steps):
            self.clock.advance(STEP_S)
            self.beat(*(member for member in self.members if member.beats))
            for observer in self.observers:
                if observer.paused is None:
                    observer.check() if check else observer.health.observe()
            self.note_fences()

    def note_fences(self) -> None:
        """Note how it stood with the epochs that have ended since this was called last, at the time that is now."""
        standing = self.standing()
        for member in self.members:
            if standing.get(member.node_id) != member.epoch and member.epoch not in self.over:
                self.over[member.epoch] = self.clock.monotonic() - member.beaten_s
                at_work = member.held.keys() - member.held_back
                self.at_work[member.epoch] = {job_of(member.held[tag]) for tag in at_work}

    def meet_fate(self, observer: Observer, doing: Callable[[], None], fate: str, at: int) -> None:
        """Let an observer do something; at its command ``at`` (from 0) its fate befalls it, if it comes to that."""
        if fate == "paused":
            observer.paused = Paused(observer.fuse, at, doing)
            if observer.paused.is_done:
                self.finish(observer)
            return
        observer.fuse.arm(at, {"killed": _be_killed, "refused": _be_refused, "reply lost": None}[fate])
        try:
            doing()
        except BrokerUnavailable:
            pass
        except Killed:
            if observer in self.observers:
                self.observers.remove(observer)
        finally:
            observer.fuse.disarm()

    def finish(self, observer: Observer) -> None:
        """Let an observer that was paused come to the end of what it does."""
        if observer.paused is not None:
            paused, observer.paused = observer.paused, None
            paused.go_on()

    # Jobs.

    def stands(self, member: Member) -> bool:
        """Whether an incarnation may work."""
        return self.standing().get(member.node_id) == member.epoch

    def publish(self, target: str, kind: str, is_delayed: bool = False) -> None:
        """Send a job."""
        job = f"job {len(self.jobs) + 1}"
        message = make_message(job, kind)
        queue = self.keys.node_queue(target) if target else ""
        placement = place_message(json.loads(message), message, self.keys, queue)
        self.jobs.add(job)
        self.broker.placer.publish(placement, Publish("test", len(self.jobs)), FAR_S if is_delayed else None, 1.0)

    def make_due(self) -> None:
        """Let the time of all delayed jobs come."""
        for entry in self.client.zrange(self.keys.delayed, 0, -1):
            self.client.zadd(self.keys.delayed, {entry: 0})

    def fetch(self, member: Member, want: int, acked: Sequence[str] = ()) -> None:
        """Fetch as the node does, also when it does not know that it was fenced: then it is given nothing."""
        fetched = self.broker.fetch(member.node_id, member.epoch, want, SERVES[member.node_id], acked)
        assert self.stands(member) == (fetched.status != "fenced")
        assert fetched.status == "ok" or not fetched.messages
        for tag in acked:
            member.held.pop(tag, None)
        for tag, message in fetched.messages.items():
            member.held[tag] = message
            self._look_up_its_past(member, tag, job_of(message))

    def _look_up_its_past(self, member: Member, tag: str, job: str) -> None:
        """As a node does before it starts a job: it may have ended already, or be one to be run no more."""
        crashes = self.crashes(job)
        if self.client.exists(self.keys.terminal(job)):
            self.client.delete(self.keys.crashes(job))
            self.broker.placer.let_go(self.keys.unacked(member.node_id, member.epoch), {tag: job})
            del member.held[tag]
        elif len(crashes) >= MAX_CRASHES:
            self.quarantine.put(job, "jobs.work", member.held[tag], crashes)
            self.commit(member, tag)

    def crashes(self, job: str) -> list[Crash]:
        """The crash deliveries of a job."""
        records: Any = self.client.lrange(self.keys.crashes(job), 0, -1)
        return [Crash.read(record) for record in records]

    def hold_back(self, member: Member, tag: str) -> None:
        """Do not begin with a job yet."""
        unacked, not_started = self._keys_of(member)
        self.broker.placer.hold_back(unacked, not_started, [tag])
        member.held_back.add(tag)

    def commit(self, member: Member, tag: str, leave: bool = False) -> None:
        """End a job under a delivery: only one that stands, and only once. ``leave``: its ack comes later."""
        job, keys, stands = job_of(member.held[tag]), self.keys, self.stands(member)
        unacked, not_started = self._keys_of(member)
        if stands:
            # One whose lease may have run out begins with nothing.
            self.client.srem(not_started, tag)
            member.held_back.discard(tag)
        names = [unacked, keys.terminal(job), "result", keys.counters, keys.crashes(job), keys.followed(job)]
        names.append(keys.kept_end(job))
        done = self.commit_script(names, [tag, "", 0, "its end" if leave else "", "", 3600, "SUCCESS"])
        assert (done == 1) == ((stands and job not in self.ended) or self.ended.get(job) == tag)
        if done == 1:
            self.ended.setdefault(job, tag)
            if not leave:
                del member.held[tag]

    def give_back(self, member: Member, tag: str, is_crash: bool) -> None:
        """Let others do a job, maybe because a process of the pool died of it."""
        crash = Crash(member.node_id, member.epoch, "its process died", self.clock.time()) if is_crash else None
        placement = replace_message(member.held[tag], self.keys, delivered=True)
        moved = self.broker.move_held(member.node_id, member.epoch, [(tag, placement)], crash)
        assert moved == self.stands(member)
        del member.held[tag]

    def release(self) -> None:
        """Send all jobs again that are in quarantine."""
        for kept in self.quarantine.jobs():
            self.jobs.add(self.quarantine.retry(kept.id))

    def do_all_that_is_left(self) -> None:
        """A node that joins now and serves all does every job with those that live, and nothing is left behind."""
        last = self.join("last")
        assert last is not None
        while self.places():
            before = self.places()
            self.make_due()
            for member in self.members:
                if self.stands(member):
                    for tag in list(member.held):
                        self.commit(member, tag)
            self.fetch(last, 100)
            assert last.held or self.places() != before, before
        assert self.ended.keys() == self.jobs
        left = {text(key) for key in self.client.keys("*")}
        assert not [key for key in left if key.startswith(("cluster:crashes", "cluster:not_started"))]
        assert not left & {self.keys.backlog, self.keys.fenced}

    def _keys_of(self, member: Member) -> tuple[str, str]:
        node_id, epoch = member.node_id, member.epoch
        return self.keys.unacked(node_id, epoch), self.keys.not_started(node_id, epoch)

    # Books.

    def places(self) -> dict[str, list[str]]:
        """Where in Redis each job is."""
        places = census_of(self.client, self.keys).places
        kept = self.keys.quarantine
        return {job: found for job, keys in places.items() if (found := [key for key in keys if key != kept])}

    def told(self, kind: str) -> Counter[str]:
        """How often an event of this kind was told, by epoch."""
        return Counter(event.facts["epoch"] for event in self.events.latest(MAX_EVENTS) if event.kind == kind)

    def check_places(self) -> None:
        """Every job is in one place, or has ended and maybe waits for its last word."""
        places = self.places()
        assert places.keys() <= self.jobs
        assert {job: found for job, found in places.items() if len(found) > 1} == {}
        lost = self.jobs - self.ended.keys() - places.keys()
        assert not lost

    def check_fences(self) -> None:
        """Who was fenced had not beaten for a lease."""
        for epoch in self.told("node lost"):
            assert self.over[epoch] >= LEASE_S

    def check_charges(self) -> None:
        """For the loss of a node a job is charged once, and only if it was at work on it."""
        for job in self.jobs - self.ended.keys():
            charged = [crash.epoch for crash in self.crashes(job) if crash.reason == "the node was lost"]
            assert len(charged) == len(set(charged))
            assert all(job in self.at_work[epoch] for epoch in charged)

    def check_events(self) -> None:
        """The end of an epoch is told once, whoever ended it and died."""
        lost, left, moved = (self.told(kind) for kind in ("node lost", "node left", "jobs moved"))
        assert (lost + left).keys() == self.over.keys()
        assert {*(lost + left).values(), *moved.values()} <= {1}

    def check_settled(self) -> None:
        """All failovers are finished, and all jobs are owned by the living or wait."""
        standing = self.standing()
        living = {member.node_id: member.epoch for member in self.members if member.beats and self.stands(member)}
        assert standing == living
        assert self.broker.epochs.fenced() == []
        opened = {text(name) for name in self.client.smembers(self.keys.opened)}
        assert opened == {f"{node_id}/{epoch}" for node_id, epoch in living.items()}
        assert self.told("jobs moved").keys() >= self.told("node lost").keys()
        assert {(node.id, node.epoch) for node in self.registry.list()} <= set(living.items())
        owned = {self.keys.unacked(*member) for member in living.items()}
        owned |= {self.keys.node_queue(node_id) for node_id in living}
        for key in chain.from_iterable(self.places().values()):
            assert key in owned or key.startswith(("waiting.", "suspect.", self.keys.delayed))
        for job in self.jobs - self.ended.keys():
            owed = {epoch for epoch in self.told("node lost") if job in self.at_work[epoch]}
            assert owed <= {crash.epoch for crash in self.crashes(job)}


def _be_killed() -> None:
    raise Killed


def _be_refused() -> None:
    raise redis.ConnectionError("the test cut this connection")
